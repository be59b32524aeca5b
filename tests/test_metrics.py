"Kernel retention, cohesion, coupling and decomposition equal naive references on stored masks."
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from mwt.modules.decompose import MaskCounter, select_kernels
from mwt.modules.modularity import jaccard_cohesion, jaccard_coupling, kernel_retention, mean_jaccard


def stored(samples, kernels, seed, share=.5):
    return torch.rand(samples, kernels, generator=torch.Generator().manual_seed(seed)) < share


def naive_jaccard(a, b):
    union = sum(x or y for x, y in zip(a, b))
    return sum(x and y for x, y in zip(a, b)) / union if union else 1.


def naive_mean(sets):
    values = [naive_jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return sum(values) / len(values) if values else math.nan


def same(a, b): return math.isnan(a) and math.isnan(b) or abs(a - b) < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 20), st.integers(0, 1000), st.sampled_from([.0, .2, .5, 1.]), st.integers(1, 5))
def test_mean_jaccard(n, kernels, seed, share, block):
    sets = stored(n, kernels, seed, share)
    assert same(mean_jaccard(sets, block), naive_mean(sets.tolist()))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 20), st.integers(0, 1000))
def test_figures_of_modules(classes, kernels, seed):
    modules, samples = stored(classes, kernels, seed), stored(5 * classes, kernels, seed + 1)
    labels = torch.arange(5 * classes) % classes
    rows = modules.tolist()
    for c in range(classes):
        assert same(kernel_retention(modules)[c].item(), sum(rows[c]) / kernels)
        assert same(jaccard_coupling(modules)[c].item(), sum(naive_jaccard(rows[c], r) for i, r in enumerate(rows) if i != c) / (classes - 1))
        within = [[x and y for x, y in zip(s, rows[c])] for s in samples[labels == c].tolist()]
        assert same(jaccard_cohesion(samples, labels, modules)[c].item(), naive_mean(within))


def naive_select(active, threshold):
    "One layer, one class: lists of sample masks to kept kernels, as the paper says it."
    frequency = [sum(column) / len(active) for column in zip(*active)]
    while True:
        kept = [f >= threshold for f in frequency]
        if any(kept): return kept
        if threshold <= .05: return [i == frequency.index(max(frequency)) for i in range(len(frequency))]
        threshold -= .05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000), st.sampled_from([.02, .1, .3, .6, .9]), st.sampled_from([.5, .9, 1.]))
def test_decomposition(samples, kernels, seed, share, threshold):
    masks, labels = stored(2 * samples, kernels, seed, share), torch.arange(2 * samples) % 2
    counter = MaskCounter(2, kernels, samples=3, device='cpu')
    for part in torch.arange(2 * samples).split(7): counter.add(masks[part], labels[part])      # in batches
    keep, _ = select_kernels(counter.active / counter.seen[:, None], threshold)
    for c in range(2): assert keep[c].tolist() == naive_select(masks[labels == c].tolist(), threshold)


def test_counter_keeps_the_first_samples_of_each_class():
    masks, labels = stored(40, 6, 0), torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    counter = MaskCounter(3, 6, samples=4, device='cpu')
    for part in torch.arange(40).split(11): counter.add(masks[part], labels[part])
    for c in range(3): assert torch.equal(counter.kept[c, :4], masks[labels == c][:4])


def test_counter_memory_does_not_grow():
    counter = MaskCounter(3, 6, samples=4, device='cpu')
    size = lambda: sum(t.numel() for t in (counter.active, counter.seen, counter.kept))
    before = size()
    for i in range(50): counter.add(stored(64, 6, i), torch.arange(64) % 3)
    assert size() == before and counter.seen.sum() == 50 * 64


@pytest.mark.parametrize('threshold, kept', [(.9, [0]), (.5, [0, 1]), (.05, [0, 1, 2])])
def test_lower_thresholds_keep_more(threshold, kept):
    keep, limits = select_kernels(torch.tensor([[.95, .5, .1]], dtype=torch.float64), threshold)
    assert keep[0].nonzero().flatten().tolist() == kept and limits.item() == threshold
