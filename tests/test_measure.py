"Accuracy, costs and the figures of modularity equal naive references; networks by name are what they say."
from __future__ import annotations
import math
import time
from collections.abc import Sequence
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from mwt.core.signature import Signature
from mwt.data.batches import Batches
from mwt.data.sources import image_data
from mwt.core.timing import time_in_turns
from mwt.measure import confusion, count_params, evaluate, n_outputs, profile, profiles
from mwt.methods.mwt import MwT
from mwt.modules.decompose import MaskCounter
from mwt.modules.modularity import jaccard_cohesion, jaccard_coupling, kernel_retention, mean_jaccard
from mwt.networks import NETWORKS, create_model


def stored(samples: int, kernels: int, seed: int, fraction: float = .5) -> Tensor:
    "Masks of so many samples."
    return torch.rand(samples, kernels, generator=torch.Generator().manual_seed(seed)) < fraction


def naive_jaccard(a: Sequence[bool], b: Sequence[bool]) -> float:
    union = sum(x or y for x, y in zip(a, b))
    return sum(x and y for x, y in zip(a, b)) / union if union else 1.


def naive_mean(sets: Sequence[Sequence[bool]]) -> float:
    values = [naive_jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return sum(values) / len(values) if values else math.nan


def close(a: float, b: float) -> bool: return math.isnan(a) and math.isnan(b) or abs(a - b) < 1e-6


# Modularity

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 20), st.integers(0, 1000), st.sampled_from([.0, .2, .5, 1.]),
       st.integers(1, 5))
def test_mean_jaccard(n: int, kernels: int, seed: int, fraction: float, block: int) -> None:
    sets = stored(n, kernels, seed, fraction)
    assert close(mean_jaccard(sets, block), naive_mean(sets.tolist()))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 20), st.integers(0, 1000))
def test_figures_of_modules(classes: int, kernels: int, seed: int) -> None:
    kept, samples = stored(classes, kernels, seed), stored(5 * classes, kernels, seed + 1)
    labels = torch.arange(5 * classes) % classes
    rows = kept.tolist()
    for c in range(classes):
        assert close(kernel_retention(kept)[c].item(), sum(rows[c]) / kernels)
        others = [naive_jaccard(rows[c], r) for i, r in enumerate(rows) if i != c]
        assert close(jaccard_coupling(kept)[c].item(), sum(others) / (classes - 1))
        within = [[x and y for x, y in zip(s, rows[c])] for s in samples[labels == c].tolist()]
        assert close(jaccard_cohesion(samples, labels, kept)[c].item(), naive_mean(within))


def naive_select(active: Sequence[Sequence[bool]], threshold: float) -> list[bool]:
    "One layer, one class: lists of sample masks to kept kernels, as the paper says it."
    frequency = [sum(column) / len(active) for column in zip(*active)]
    while True:
        kept = [f >= threshold for f in frequency]
        if any(kept): return kept
        if threshold <= .05: return [i == frequency.index(max(frequency)) for i in range(len(frequency))]
        threshold -= .05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000), st.sampled_from([.02, .1, .3, .6, .9]),
       st.sampled_from([.5, .9, 1.]))
def test_decomposition(samples: int, kernels: int, seed: int, fraction: float, threshold: float) -> None:
    masks, labels = stored(2 * samples, kernels, seed, fraction), torch.arange(2 * samples) % 2
    counter = MaskCounter(2, kernels, samples=3, device='cpu')
    for rows in torch.arange(2 * samples).split(7): counter.add(masks[rows], labels[rows])      # in batches
    keep, _ = MwT().select(counter.active / counter.seen[:, None], threshold)
    for c in range(2): assert keep[c].tolist() == naive_select(masks[labels == c].tolist(), threshold)


def test_counter_keeps_the_first_samples_of_each_class() -> None:
    masks = stored(40, 6, 0)
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    counter = MaskCounter(3, 6, samples=4, device='cpu')
    for rows in torch.arange(40).split(11): counter.add(masks[rows], labels[rows])
    for c in range(3): assert torch.equal(counter.kept[c, :4], masks[labels == c][:4])


def test_counter_memory_does_not_grow() -> None:
    counter = MaskCounter(3, 6, samples=4, device='cpu')
    def size() -> int: return sum(t.numel() for t in (counter.active, counter.seen, counter.kept))
    before = size()
    for i in range(50): counter.add(stored(64, 6, i), torch.arange(64) % 3)
    assert size() == before and counter.seen.sum() == 50 * 64


@pytest.mark.parametrize('threshold, kept', [(.9, [0]), (.5, [0, 1]), (.05, [0, 1, 2])])
def test_lower_thresholds_keep_more(threshold: float, kept: list[int]) -> None:
    keep, limits = MwT().select(torch.tensor([[.95, .5, .1]], dtype=torch.float64), threshold)
    assert keep[0].nonzero().flatten().tolist() == kept and limits.item() == threshold


# Accuracy

class Brightest(nn.Module):
    "Answers with the number of the brightest channel."
    def forward(self, x: Tensor) -> Tensor: return x.mean((2, 3))


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    "12 images of 3 classes; of each class the first of four looks like the next class."
    labels = torch.arange(12) % 3
    shown = torch.where(torch.arange(12) < 3, (labels + 1) % 3, labels)
    x = torch.zeros(12, 3, 8, 8)
    x[torch.arange(12), shown] = 1
    return x, labels


def test_confusion_from_any_source(images: tuple[Tensor, Tensor]) -> None:
    x, labels = images
    expected = [[3, 1, 0], [0, 3, 1], [1, 0, 3]]
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Brightest())
    net[0].weight.data = torch.eye(3)[..., None, None]
    resident = Batches((x * 255).byte(), labels, ['a', 'b', 'c'], 5, mean=torch.zeros(3), std=torch.ones(3))
    loader = DataLoader(TensorDataset(x, labels), batch_size=5)
    for batches in (resident, loader, list(loader)):
        assert confusion(net, batches).tolist() == expected
        assert evaluate(net, batches) == pytest.approx(9 / 12)
    assert confusion(net, resident, ['a', 'b']).tolist() == [[3, 1], [1, 3]] # neither: the first
    assert confusion(net, loader, ['0', '1']).tolist() == [[3, 1], [1, 3]] # neither: the first


def test_a_network_that_knows_some_classes_is_judged_on_those(images: tuple[Tensor, Tensor]) -> None:
    x, labels = images
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), Brightest())
    net[0].weight.data = torch.eye(3)[[2, 0]][..., None, None]
    net.signature = Signature(['c', 'a'])
    batches = Batches((x * 255).byte(), labels, ['a', 'b', 'c'], 5, mean=torch.zeros(3), std=torch.ones(3))
    assert n_outputs(net) == 2
    assert confusion(net, batches).sum() == 8
    with pytest.raises(ValueError, match=r"unknown class 'b'.*known: 'c', 'a'"):
        confusion(net, batches, ['a', 'b'])


def test_what_cannot_be_judged_is_refused() -> None:
    net, data = create_model('simcnn', width=.1, in_channels=1), image_data('digits', device='cpu')
    with pytest.raises(TypeError, match='holds several splits; give one of them'): evaluate(net, data)
    with pytest.raises(TypeError, match='can be gone through only once'): evaluate(net, iter(data.test))
    with pytest.raises(ValueError, match='make the network with in_channels=1'):
        evaluate(create_model('simcnn', width=.1), data.test)


# Costs

def test_turns_and_their_ratios() -> None:
    order: list[str] = []
    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)
    found = time_in_turns({'a': lambda: call('a', .002), 'b': lambda: call('b', .01)}, torch.device('cpu'),
                          rounds=3, warmup=1)
    assert order == ['a', 'b'] * 4
    assert found['a']['ratio'] == 1 and found['b']['ratio'] > 1
    for t in found.values(): assert 0 < t['low'] <= t['seconds'] <= t['high']
    with pytest.raises(ValueError, match='rounds'): time_in_turns({}, torch.device('cpu'), rounds=0)


def test_a_model_that_has_a_plain_form_is_profiled_in_it() -> None:
    full = create_model('simcnn', width=.25)
    class Masked(nn.Module):
        def plain(self) -> nn.Module: return full
    net = create_model('simcnn', width=.1)
    [row, *_] = profile(net, Masked(), repeats=1).rows
    assert row['full'] == f'{count_params(full):,}' and row['network'] == f'{count_params(net):,}'
    one, two = profiles([net, full], repeats=1)
    assert one.flops < two.flops and one.latency > 0


def test_networks_of_several_types_are_profiled_side_by_side() -> None:
    single, double = create_model('simcnn', width=.1), create_model('simcnn', width=.1).double()
    a, b = profiles([single, double], repeats=1)
    assert (a.params, a.flops) == (b.params, b.flops)


# Networks by name

def test_the_networks_of_the_tables() -> None:
    "What MODA reports: VGG16 with hidden layers of 4096 and no dropout, MobileNet of 27 convolutions."
    with torch.device('meta'):
        vgg = create_model('vgg16_bn', hidden=4096, dropout=0)
        mobile = create_model('mobilenet_v1')
    assert [m.out_features for m in vgg.classifier if isinstance(m, nn.Linear)] == [4096, 4096, 10]
    assert [m.p for m in vgg.classifier if isinstance(m, nn.Dropout)] == [0, 0]
    convs = [m for m in mobile.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 27 and sum(m.groups > 1 for m in convs) == 13
    assert [m.stride[0] for m in convs if m.groups > 1] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert count_params(mobile) == 3_217_226


def test_options_leave_names_alone() -> None:
    usual, given = (create_model('vgg16_bn', width=.1, seed=0, **o) for o in ({}, dict(hidden=64)))
    assert list(usual.state_dict()) == list(given.state_dict())
    linear = given.classifier[3]
    assert linear.weight.std().item() == pytest.approx(.01, rel=.1) and not linear.bias.any()


@pytest.mark.parametrize('name', NETWORKS)
def test_small_images_pass(name: str) -> None:
    smallest = 13 if name == 'lenet5' else 8
    for channels, side in ((1, smallest), (3, 32)):
        net = create_model(name, 4, .1, channels).eval()
        assert net(torch.zeros(2, channels, side, side)).shape == (2, 4)


@pytest.mark.parametrize('name, options, words', [
    ('vgg16_bn', dict(hiden=64), "unknown option of vgg16_bn 'hiden'; did you mean 'hidden'"),
    ('vgg16_bn', dict(hidden=0), 'hidden must be a whole number at least 1, not 0'),
    ('vgg16_bn', dict(dropout=1.5), 'dropout must be a number at least 0 and at most 1, not 1.5'),
    ('resnet_cifar', dict(depth=45), 'depth must be 6n \\+ 2, not 45; take 44 or 50'),
    ('resnet_cifar', dict(depth=2), 'depth must be a whole number at least 8'),
    ('simcnn', dict(hidden=64), "simcnn has no option 'hidden'; leave it out"),
    ('torchvision/resnet18', dict(hidden=64), "torchvision/resnet18 takes no option 'hidden'")])
def test_wrong_options_are_refused(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words): create_model(name, **options)
