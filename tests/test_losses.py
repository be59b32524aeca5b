"The losses, and their gradients, equal all pairs one by one in float64."
from __future__ import annotations
from collections.abc import Sequence
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F
from mwt.methods.losses import cohesion_loss, coupling_loss, mask_losses


def naive(masks: Sequence[Tensor], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    "Equations 2 and 3 of MwT as they stand, with loops; a mean over no pairs is 0."
    cohesion, coupling = [], []
    for m in masks:
        pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
        same = [F.cosine_similarity(m[i], m[j], dim=0) for i, j in pairs if labels[i] == labels[j]]
        other = [F.cosine_similarity(m[i], m[j], dim=0) for i, j in pairs if labels[i] != labels[j]]
        cohesion.append(1 - torch.stack(same).mean() if same else m.sum() * 0)
        coupling.append(torch.stack(other).mean() if other else m.sum() * 0)
    return torch.stack(cohesion).mean(), torch.stack(coupling).mean()


def batch(size: int, kernels: Sequence[int], seed: int, dtype: torch.dtype = torch.float64,
          scale: float = 1.) -> list[Tensor]:
    "Masks as a generator makes them: some kernels exactly off, no mask entirely off."
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(size, k, generator=generator, dtype=torch.float64).sub(.3).relu() for k in kernels]
    for m in masks: m[:, 0] += .05
    return [m.mul(scale).to(dtype).requires_grad_() for m in masks]


def gradients(loss: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, masks, retain_graph=True, allow_unused=True)


def assert_equal(labels: list[int], kernels: Sequence[int], seed: int, scale: float = 1.) -> None:
    masks, y = batch(len(labels), kernels, seed, scale=scale), torch.tensor(labels)
    for fast, slow in zip((cohesion_loss(masks, y), coupling_loss(masks, y)), naive(masks, labels)):
        assert abs(fast.item() - slow.item()) < 1e-6
        for a, b in zip(gradients(fast, masks), gradients(slow, masks)):
            assert torch.isfinite(a).all() and torch.allclose(a, b, rtol=0, atol=1e-6)


labels_of = {
    'any batch': st.lists(st.integers(0, 4), min_size=1, max_size=16),
    'one class': st.integers(1, 12).map(lambda n: [3] * n),
    'all different': st.integers(1, 12).map(lambda n: list(range(n))),
    'large labels': st.lists(st.sampled_from([0, 999, 10**6]), min_size=2, max_size=10)}


@pytest.mark.parametrize('kind', labels_of)
def test_equal_all_pairs(kind: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(labels_of[kind], st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(0, 1000))
    def check(labels: list[int], kernels: list[int], seed: int) -> None: assert_equal(labels, kernels, seed)
    check()


def test_activations_need_not_lie_below_one() -> None:
    "Some methods pull the outputs of a layer together; those have no upper bound."
    assert_equal([0, 0, 1, 2, 2, 2, 1, 0], (5, 12), 0, scale=80.)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=64), st.integers(0, 1000))
def test_known_number_of_classes_changes_nothing(labels: list[int], seed: int) -> None:
    y, masks = torch.tensor(labels), batch(len(labels), (5, 30), seed)
    for a, b in zip(mask_losses(masks, y), mask_losses(masks, y, n_classes=10)):
        assert abs(a.item() - b.item()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=128), st.integers(0, 1000))
def test_float32_is_exact_enough(labels: list[int], seed: int) -> None:
    single, double = (mask_losses(batch(len(labels), (64, 512), seed, t), torch.tensor(labels))
                      for t in (torch.float32, torch.float64))
    for a, b in zip(single, double): assert abs(a.item() - b.item()) < 1e-6


@settings(max_examples=20, deadline=None)
@given(st.permutations(list(range(8))), st.integers(0, 100))
def test_order_of_samples_does_not_matter(order: list[int], seed: int) -> None:
    labels, [m] = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3]), batch(8, (6,), seed)
    for a, b in zip(mask_losses([m], labels), mask_losses([m[order]], labels[order])):
        assert abs(a.item() - b.item()) < 1e-12


def test_masks_entirely_off_are_harmless() -> None:
    for labels in ([0], [0, 0], [0, 1], [0, 0, 1, 1]):
        m = torch.zeros(len(labels), 5, requires_grad=True)
        losses = mask_losses([m], torch.tensor(labels))
        sum(losses).backward()
        assert all(torch.isfinite(v) for v in losses) and torch.isfinite(m.grad).all()


def test_computed_in_float32_under_autocast() -> None:
    m = torch.rand(8, 16).bfloat16()
    with torch.autocast('cpu', torch.bfloat16): losses = mask_losses([m], torch.arange(8) % 2)
    assert all(v.dtype == torch.float32 for v in losses)
    for a, b in zip(losses, mask_losses([m.float()], torch.arange(8) % 2)): assert a == b


def test_memory_is_linear_in_the_batch() -> None:
    "No (batch x batch) table: the largest tensor saved for the backward pass grows with the batch."
    def largest(size: int) -> int:
        sizes, m = [0], batch(size, (16,), 0)
        def note(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            mask_losses(m, torch.arange(size) % 10)
        return max(sizes)
    assert largest(2048) <= 2.2 * largest(1024)


def test_no_masks_is_an_error() -> None:
    with pytest.raises(ValueError, match='masks is empty'): mask_losses([], torch.tensor([0]))
