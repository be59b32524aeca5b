"Layer-wise modules: residual blocks, similarity, drift, local retraining, shorter modules."
from __future__ import annotations
import gc, io, weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any
import pytest
import torch
from helpers import same_state, state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from mwt.core.errors import MwtError, WrongType, WrongValue
from mwt.core.nets import evaluating
from mwt.core.signature import weights_of
from mwt.data.batches import Batches, ImageData, from_tensors
from mwt.layers import similarity as chapter
from mwt.layers.blocks import find_blocks
from mwt.layers.edit import drop_blocks, repeat_blocks
from mwt.layers.retrain import Student, block_sums, drifting, moments, overlap, retrain_blocks
from mwt.layers.shorten import shorten
from mwt.layers.similarity import Similarity, centred_gram, modularity, segments, similarity
from mwt.measure import count_params, evaluate, profile
from mwt.methods.modular import modularize
from mwt.modules.module import as_module, load_module, save_module
from mwt.networks import create_model
from mwt.train.fit import fit

QUIET = dict(show_progress=False)


class Chain(nn.Module):
    "Residual blocks in a row; what stands before and behind each addition can be chosen."
    def __init__(self, blocks: int = 3, relu: str = 'plain', norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(blocks))
        self.skips = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.act = nn.ReLU(inplace=True)
        self.relu, self.head = relu, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.relu != 'none': x = x.relu()
        for conv, norm, skip in zip(self.convs, self.norms, self.skips):
            x = norm(conv(x)) + skip(x)
            if self.relu == 'plain': x = x.relu()
            if self.relu == 'in place': x = self.act(x)
        return self.head(x.mean((2, 3)))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    "Weights and statistics that are not those of a fresh network."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point(): t.copy_(torch.rand(t.shape, generator=generator) * .6 + .2 * (t != 0))
    for name, p in model.named_parameters():
        if p.ndim > 1: p.data.sub_(p.data.mean())
    return model.eval()


def images(n: int, channels: int = 1, side: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    "Bright squares in one of three places: something to learn; labels in turn."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (n, channels, side, side), generator=generator)
    y = torch.arange(n) % 3
    for i in range(n): x[i, :, 2 * y[i]:2 * y[i] + 3, 1:5] += 150
    return x.to(torch.uint8), y


@pytest.fixture(scope='module')
def data() -> ImageData:
    return from_tensors(images(96), images(48, seed=1), valid=images(48, seed=2), classes=['a', 'b', 'c'],
                        batch_size=24, augment=None, device='cpu')


def shifted(batches: Batches, by: int = 60) -> Batches:
    "The same images with noise."
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(-by, by + 1, batches.images.shape, generator=generator)
    return batches._replace(images=(batches.images + noise).clamp(0, 255).to(torch.uint8))


@pytest.fixture(scope='module')
def trained(data: ImageData) -> nn.Module:
    torch.manual_seed(0)
    net = Chain()
    fit(net, data, epochs=4, lr=.1, **QUIET)
    return net.eval()


# Blocks

def own_networks() -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    import timm
    from torchvision import models
    from torchvision.models.resnet import BasicBlock, ResNet
    wide = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]]
    return { # network; blocks, those that can be left out
        'rescnn': (lambda: create_model('rescnn', width=.05), 3, 3),
        'resnet18': (lambda: create_model('resnet18', width=.05), 8, 5),
        'torchvision resnet': (lambda: ResNet(BasicBlock, [2, 2, 1, 1], num_classes=4), 6, 3),
        'torchvision mobilenet': (lambda: models.MobileNetV2(
            4, .5, inverted_residual_setting=wide), 2, 2),
        'torchvision vit': (lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4), 4, 4),
        'timm resnet': (lambda: timm.create_model('resnet10t', num_classes=4), 4, 1),
        'timm convnext': (lambda: timm.create_model('convnext_atto', num_classes=4, depths=(1, 1, 2, 1),
                                                    dims=(8, 8, 16, 16)), 5, 5),
        'simcnn': (lambda: create_model('simcnn', width=.05), 0, 0)}


@pytest.mark.parametrize('name', own_networks())
def test_blocks_are_found_without_knowing_the_network(name: str) -> None:
    make, blocks, removable = own_networks()[name]
    net, x = make().eval(), torch.randn(2, 3, 32, 32)
    found = find_blocks(net, x)
    assert (len(found), len(found.removable)) == (blocks, removable)
    assert len(set(found.names)) == blocks
    if not blocks: return
    short = drop_blocks(net, found.removable, x)
    assert len(find_blocks(short, x)) == blocks - removable
    assert count_params(short) == count_params(net) - sum(
        found.params(b) for b in found if not b.projection)
    longer = repeat_blocks(net, found.removable[0], example_input=x)
    assert len(find_blocks(longer, x)) == blocks + 1
    with torch.no_grad(): assert short(x).shape == longer(x).shape == net(x).shape


def test_additions_that_are_no_blocks() -> None:
    "Of numbers, of constants, of a thing to itself, of what holds no weights."
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
            self.place = nn.Parameter(torch.zeros(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x) + 1
            x = x + self.place
            x = x + x
            x = x + x.relu()
            return self.head(x.mean((2, 3)))

    assert len(find_blocks(Net(), torch.zeros(2, 1, 8, 8))) == 0


def test_a_projection_is_told_apart_from_an_identity() -> None:
    "Also one that only selects: a stride, padding with zeros, another shape."
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1, 2)
            self.c, self.head = nn.Conv2d(8, 1, 1), nn.Linear(8, 3)
            self.d = nn.Conv2d(1, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.a(x) + 1 * x
            skip = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            x = self.b(x) + skip
            x = x + self.c(x)           # one channel is added to all eight: still `x` where it is zero
            x = x.mean(1, keepdim=True)
            x = x + self.d(x)           # one channel becomes eight: it does not fit behind the sum
            return self.head(x.mean((2, 3)))

    found = find_blocks(Net(), torch.zeros(2, 1, 8, 8))
    assert [b.projection for b in found] == [True, True, False, True]
    with pytest.raises(WrongValue, match="'a' changes what passes by.*can be given: c$"):
        drop_blocks(Net(), 'a', torch.zeros(2, 1, 8, 8))


def test_modular_models_and_no_networks_are_refused(data: ImageData) -> None:
    model = modularize(create_model('resnet18', width=.05, in_channels=1), 3 + 7)
    for call in (find_blocks, lambda m: similarity(m, data.valid), lambda m: drop_blocks(m, 'a'),
                 lambda m: retrain_blocks(m, data, 'a')):
        with pytest.raises(WrongType, match='plain'): call(model)
        with pytest.raises(WrongType, match='must be a network'): call('resnet18')


# Dropping and repeating

@pytest.mark.parametrize('relu', ['plain', 'in place', 'none'])
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('gone', [[0], [1], [0, 1], [1, 2], [0, 1, 2]])
def test_dropping_is_zeroing_the_branch(relu: str, norm: bool, gone: list[int]) -> None:
    net, x = lively(Chain(relu=relu, norm=norm)), torch.randn(3, 1, 8, 8)
    names = find_blocks(net, x).names
    zeroed = deepcopy(net)
    for i in gone:
        for p in zeroed.convs[i].parameters(): p.data.zero_()
        if norm:
            zeroed.norms[i].running_mean.zero_()
            zeroed.norms[i].bias.data.zero_()
    before = state(net)
    short = drop_blocks(net, [names[i] for i in gone], x)
    with torch.no_grad():
        expected, whole = zeroed(x), net(x)
        assert torch.equal(short(x), expected) and not torch.equal(expected, whole)
    assert same_state(net, before) and not short.training
    for i in range(3): assert any(k.startswith(f'convs.{i}.') for k in short.state_dict()) == (i not in gone)
    assert all(torch.equal(t, before[k]) for k, t in short.state_dict().items())
    short.head.weight.data.zero_()
    assert net.head.weight.abs().sum() > 0, 'weights are copies'


def test_a_sum_that_is_changed_in_place_leaves_others_alone() -> None:
    "Without the addition, an activation in place would write into what somebody else reads."
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = (x + self.b(x)).relu_()
            return self.head(torch.cat([x, y], 1).mean((2, 3)))

    net, x = lively(Net()), torch.randn(2, 1, 8, 8)
    zeroed = deepcopy(net)
    for p in zeroed.b.parameters(): p.data.zero_()
    short = drop_blocks(net, 'b', x)
    with torch.no_grad(): assert torch.equal(short(x), zeroed(x))
    module = drop_blocks(as_module(net, list('abc'), (1, 8, 8)), 'b')
    with torch.no_grad(): assert torch.allclose(module(x), zeroed(x), atol=1e-6)


def naive(net: Chain, x: Tensor, order: list[int]) -> Tensor:
    "The blocks in this order."
    x = net.stem(x).relu()
    for i in order: x = (net.norms[i](net.convs[i](x)) + x).relu()
    return net.head(x.mean((2, 3)))


@pytest.mark.parametrize('module', [False, True])
def test_repeating_blocks(module: bool) -> None:
    net, x = lively(Chain()), torch.randn(3, 1, 8, 8)
    names = find_blocks(net, x).names
    whole = as_module(net, list('abc'), (1, 8, 8)) if module else net
    assert find_blocks(whole, x).names == names
    longer = repeat_blocks(whole, names[:2], times=3, example_input=x)
    with torch.no_grad():
        assert torch.allclose(longer(x), naive(net, x, [0, 0, 0, 1, 1, 1, 2]), atol=1e-6)
    pointers = [p.data_ptr() for p in longer.parameters()]
    assert len(set(pointers)) == len(pointers), 'copies have weights of their own'
    again = drop_blocks(longer, find_blocks(longer, x).names[1:3], x)
    with torch.no_grad():
        assert torch.allclose(again(x), naive(net, x, [0, 1, 1, 1, 2]), atol=1e-6)


def test_a_shorter_network_is_an_ordinary_one(data: ImageData, trained: nn.Module, tmp_path: Any) -> None:
    names, x = find_blocks(trained, torch.zeros(2, 1, 8, 8)).names, next(iter(data.test))[0]
    short = drop_blocks(trained, names[1], x)
    with torch.no_grad(): expected = short(x)
    buffer = io.BytesIO()
    torch.save(short.state_dict(), buffer)
    buffer.seek(0)
    other = drop_blocks(lively(Chain()), names[1], x)
    other.load_state_dict(torch.load(buffer))
    with torch.no_grad(): assert torch.equal(other(x), expected)
    exported = torch.export.export(short, (x,)).module()
    with torch.no_grad(): assert torch.allclose(exported(x), expected, atol=1e-6)
    fit(short, data, epochs=4, lr=.1, **QUIET)
    assert short.signature.classes == ['a', 'b', 'c'] and evaluate(short, data.test) > .5

    module = as_module(trained, data.classes, data.shape, signature=trained.signature)
    pixels = next(iter(data.test.pixels()))[0]
    thin = drop_blocks(module, names[1])
    again = load_module(save_module(thin, tmp_path/'m.safetensors'))
    with torch.no_grad():
        assert torch.equal(again(pixels), thin(pixels))
        assert torch.allclose(again(pixels), expected, atol=1e-4)
    assert again.classes == data.classes and again.takes_pixels
    assert torch.export.export(thin, (pixels,)) is not None


def test_frozen_weights_stay_frozen_in_a_shorter_module() -> None:
    module = as_module(lively(Chain()), list('abc'), (1, 8, 8))
    module.get_submodule('stem').weight.requires_grad_(False)
    short = drop_blocks(module, find_blocks(module).names[0])
    assert [name for name, p in short.named_parameters() if not p.requires_grad] == ['stem.weight']


@pytest.mark.parametrize('blocks, says', [
    ('convs:9', "unknown block 'convs:9'; did you mean 'convs:[123]'.*given: convs:1, convs:2, convs:3"),
    ([], 'no block given'), (['convs:1', 3], 'unknown block 3'), (3, 'blocks must be names')])
def test_wrong_names_are_refused_with_those_that_can_be_given(blocks: Any, says: str) -> None:
    net = create_model('rescnn', width=.05, seed=0)
    for edit in (drop_blocks, repeat_blocks):
        with pytest.raises(MwtError, match=says): edit(net, blocks)


# Similarity

def closed_form(x: Tensor, y: Tensor) -> Tensor:
    "The unbiased estimate of HSIC, with linear kernels, as Song et al. (2012) write it."
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    k, l = (a.double().flatten(1) @ a.double().flatten(1).T for a in (x, y))
    k, l = k - k.diag().diag(), l - l.diag().diag()
    return ((k @ l).trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one) / (
        n * (n - 3))


def cka(x: Tensor, y: Tensor) -> float:
    a, b = centred_gram(x, len(x)), centred_gram(y, len(y))
    return ((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()).item()


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 20), st.integers(1, 12), st.integers(0, 1000), st.floats(.01, 100))
def test_similarity_of_a_batch(n: int, features: int, seed: int, scale: float) -> None:
    "The closed form; 1 for itself; blind to rotation, scale and offset."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    ours = (centred_gram(x, n) * centred_gram(y, n)).sum() / (n * (n - 3))
    assert torch.allclose(ours, closed_form(x, y), rtol=1e-6, atol=1e-8)
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, scale * x @ turn + 3) == pytest.approx(1, abs=1e-6)
    assert cka(x @ turn, y) == pytest.approx(cka(x, y), abs=1e-6)


def test_large_offsets_do_not_drown_the_estimate() -> None:
    "Outputs of a ReLU are all positive, and single precision has seven digits."
    x, y = torch.randn(40, 30), torch.randn(40, 20)
    y[:, :20] += x[:, :20]
    assert cka(x + 1000, y + 1000) == pytest.approx(cka(x.double(), y.double()), abs=1e-3)


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    "What the three convolutions after the stem return, caught by hooks."
    found: list[Tensor] = []
    hooks = [conv.register_forward_hook(lambda m, a, y: found.append(y.clone())) for conv in net.convs]
    with evaluating(net): net(x)
    for hook in hooks: hook.remove()
    return found


def test_it_is_what_hooks_and_the_closed_form_say(data: ImageData, trained: nn.Module) -> None:
    whole = data.test.with_batch_size(48)
    found = similarity(trained, whole, **QUIET)
    seen = outputs(trained, next(iter(whole.plain()))[0])
    for i, a in enumerate(seen):
        for j, b in enumerate(seen):
            expected = closed_form(a, b) / (closed_form(a, a) * closed_form(b, b)).sqrt()
            assert found.between(f'convs.{i}', f'convs.{j}') == pytest.approx(expected.item(), abs=1e-4)
    assert found.names == ['stem', 'convs.0', 'convs.1', 'convs.2', 'head'] and found.images == 48
    assert torch.allclose(found.matrix, found.matrix.T)
    assert torch.allclose(found.matrix.diagonal(), torch.ones(5).double())


def test_batches_add_up_to_the_whole(data: ImageData, trained: nn.Module) -> None:
    "Small batches come close to one large batch, closer with more passes."
    whole = similarity(trained, data.train.with_batch_size(96), **QUIET).matrix
    errors = [(similarity(trained, data.train.with_batch_size(12), passes=passes, **QUIET).matrix - whole)
              .abs().max().item() for passes in (1, 16)]
    assert errors[1] < errors[0] and errors[1] < .02


def test_the_order_of_batches_does_not_count(data: ImageData, trained: nn.Module) -> None:
    trained.signature, known = None, trained.signature
    try:
        batches = list(data.train.shuffled(3))
        results = [similarity(trained, some, **QUIET).matrix for some in (batches, batches[::-1])]
    finally: trained.signature = known
    assert torch.allclose(*results, atol=1e-9)


def test_batches_count_by_their_images(data: ImageData, trained: nn.Module) -> None:
    "Of unequal batches each adds its own unbiased estimate, weighted by its size."
    plain = deepcopy(trained)
    plain.signature = None
    x, y = next(iter(data.train.with_batch_size(96).plain()))
    pieces = [(x[:60], y[:60]), (x[60:68], y[60:68]), (x[68:71], y[68:71])]      # the last is too small
    found = similarity(plain, pieces, **QUIET)
    seen = [outputs(trained, piece) for piece, _ in pieces[:2]]
    def total(i: int, j: int) -> Tensor: return sum(len(o[i]) * closed_form(o[i], o[j]) for o in seen)
    expected = total(0, 2) / (total(0, 0) * total(2, 2)).sqrt()
    assert found.between('convs.0', 'convs.2') == pytest.approx(expected.item(), abs=1e-4)
    assert found.images == 68


def test_sorted_splits_are_shuffled(data: ImageData, trained: nn.Module, recwarn: Any) -> None:
    "A folder lists one class after the other; batches of one class each would say something else."
    order = data.train.labels.argsort(stable=True)
    sorted_split = data.train._replace(images=data.train.images[order], labels=data.train.labels[order],
                                       shuffle=False, batch_size=32)
    whole = similarity(trained, data.train.with_batch_size(96), **QUIET).matrix
    found = similarity(trained, sorted_split, passes=4, **QUIET).matrix
    assert (found - whole).abs().max() < .05
    assert not [w for w in recwarn if 'one class' in str(w.message)]


class NoSync(TorchDispatchMode):
    "Inside the block no value may be read off a tensor."
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert 'local_scalar_dense' not in str(func) and 'nonzero' not in str(func), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_in_a_batch(data: ImageData, trained: nn.Module) -> None:
    graph, nodes, _ = chapter.watched_in(trained, data.shape, ['all'])
    batch, labels = next(iter(data.train.plain()))
    watch, sums = chapter.Watch(trained, graph, nodes), chapter.Sums()
    with NoSync(), evaluating(trained):
        for _ in range(2): sums.add(torch.stack(watch.of(batch)), labels)
    assert sums.images == 48


def test_memory_holds_no_outputs(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    "When a layer is looked at, hardly any output of an earlier one is alive; after a batch, none."
    net, alive, most = Chain(blocks=12), weakref.WeakSet(), [0]
    look = centred_gram

    def watching(features: Tensor, n: int) -> Tensor:
        alive.add(features)
        most[0] = max(most[0], len(alive))
        return look(features, n)

    monkeypatch.setattr(chapter, 'centred_gram', watching)
    monkeypatch.setattr(chapter.Watch.__init__, '__defaults__', (watching,))
    found = similarity(net, data.train, of='all', **QUIET)
    gc.collect()
    assert len(found) > 40 and most[0] <= 5 and not len(alive)


def test_modes_statistics_and_flags_are_those_of_before(data: ImageData) -> None:
    net = Chain().train()
    net.norms[1].eval()
    before, modes = state(net), [m.training for m in net.modules()]
    similarity(net, data.train, of=['layers', 'blocks', 'norms'], **QUIET)
    drifting(net, data.valid, shifted(data.valid), **QUIET)
    find_blocks(net, torch.zeros(2, 1, 8, 8))
    assert same_state(net, before) and [m.training for m in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_any_data_will_do(data: ImageData, trained: nn.Module) -> None:
    "A split, a module with pixels, a loader, a list of batches: the same network says the same."
    first = similarity(trained, data.train.with_batch_size(96), of='blocks', **QUIET)
    module = as_module(trained, data.classes, data.shape, signature=trained.signature)
    other = similarity(module, data.train.with_batch_size(96), of='blocks', **QUIET)
    assert other.names == first.names and torch.allclose(other.matrix, first.matrix, atol=1e-4)
    x, y = next(iter(data.train.with_batch_size(96).plain()))
    plain = deepcopy(trained)
    plain.signature = None
    loader = DataLoader(TensorDataset(x, y), batch_size=96)
    for source in (loader, [(x, y)]):
        found = similarity(plain, source, of='blocks', **QUIET)
        assert torch.allclose(found.matrix, first.matrix, atol=1e-4)


def test_a_constant_layer_is_said_to_be_one(data: ImageData) -> None:
    net = lively(Chain())
    net.convs[1].weight.data.zero_()
    found = similarity(net, data.train, **QUIET)
    at = found.names.index('convs.1')
    assert found.matrix[at].isnan().all() and found.matrix.isnan().sum() == 2 * len(found) - 1
    assert ['convs.1'] in segments(found, 0)
    found.plot()


def test_shared_layers_are_numbered(data: ImageData) -> None:
    net = Chain(relu='in place')
    assert similarity(net, data.train, of='activations', **QUIET).names == ['relu', 'act:1', 'act:2', 'act:3']


@pytest.mark.parametrize('change, says', [
    (dict(of='heads'), "unknown of 'heads'"), (dict(of=[]), 'of must be one or several'),
    (dict(of=3), 'of must be'),
    (dict(passes=0), 'passes must be'), (dict(seed=-1), 'seed must be'),
    (dict(show_progress='no'), 'show_progress must be'), (dict(data='train'), 'must be'),
    (dict(data='all'), 'holds several splits'), (dict(data='small'), 'at least 4 images'),
    (dict(data='colour'), 'channels'), (dict(model='flat', of='blocks'), 'no blocks to compare'),
    (dict(model='lost'), 'NaN')])
def test_bad_similarity(change: dict[str, Any], says: str, data: ImageData) -> None:
    colour = from_tensors(images(30, 3), images(30, 3), device='cpu')
    splits = dict(train='train', all=data, small=data.train.with_batch_size(3), colour=colour.train)
    lost = Chain()
    lost.stem.weight.data[0] = float('nan')
    models = dict(flat=nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)), lost=lost)
    call = dict(model=Chain(), data=data.train) | change | QUIET | {
        k: v for k, v in change.items() if k == 'show_progress'}
    if isinstance(call['model'], str): call['model'] = models[call['model']]
    if isinstance(call['data'], str): call['data'] = splits[call['data']]
    with pytest.raises(MwtError, match=says): similarity(**call)


def test_batches_of_one_class_are_warned_of(data: ImageData) -> None:
    x, y = next(iter(data.train.with_batch_size(96).plain()))
    order = y.argsort(stable=True)
    sorted_loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=32)
    with pytest.warns(UserWarning, match='one class only'): similarity(Chain(), sorted_loader, **QUIET)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_segments_cover_all_layers_once(neighbours: list[float], threshold: float) -> None:
    n = len(neighbours) + 1
    matrix = torch.eye(n).double()
    for i, value in enumerate(neighbours): matrix[i, i + 1] = matrix[i + 1, i] = value
    names = [f'l{i}' for i in range(n)]
    found = segments(Similarity(matrix, names, 10), threshold)
    assert sum(found, []) == names
    assert len(found) == 1 + sum(value <= threshold for value in neighbours)
    alone = sum(len(segment) == 1 for segment in found)
    assert modularity(Similarity(matrix, names, 10), threshold) == pytest.approx(1 - alone / n)


@pytest.mark.parametrize('threshold', [-.1, 1.1, float('nan'), 'high', None, True])
def test_bad_thresholds(threshold: Any) -> None:
    with pytest.raises(MwtError, match='threshold must be a number'):
        segments(Similarity(torch.eye(2), ['a', 'b'], 4), threshold)
    with pytest.raises(MwtError, match='similarity must be'): segments(torch.eye(2))


# Drift

def test_drift_is_found_where_it_is(data: ImageData, trained: nn.Module) -> None:
    "A block whose weights answer to what has changed loses most; order and pairing are checked."
    clean, other = data.test, shifted(data.test)
    drift = drifting(trained, clean, other, **QUIET)
    assert len(drift.names) == 3 and len(drift.alike) == 4
    assert drift.drops == pytest.approx([a - b for a, b in zip(drift.alike, drift.alike[1:])])
    top = max(range(3), key=drift.drops.__getitem__)
    assert drift.worst(1) == [drift.names[top]] and drift.worst(9) == drift.names
    assert 0 < drift.alike[0] < 1
    drift.plot()
    x, y = (next(iter(s.with_batch_size(48).plain()))[0] for s in (clean, other))
    expected = closed_form(x, y) / (closed_form(x, x) * closed_form(y, y)).sqrt()
    whole = drifting(trained, clean.with_batch_size(48), other, **QUIET)
    assert whole.alike[0] == pytest.approx(expected.item(), abs=1e-4)


def test_unpaired_drift(data: ImageData, trained: nn.Module) -> None:
    "The same images in any order and number overlap; others less."
    shuffled = data.test.sample(40, seed=3)
    near = drifting(trained, data.test, shuffled, paired=False, **QUIET)
    far = drifting(trained, data.test, shifted(shuffled, 120), paired=False, **QUIET)
    assert all(a > .95 for a in near.alike) and min(far.alike) < min(near.alike)


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(.1, 3), st.floats(.1, 3))
def test_overlap_is_that_of_normal_distributions(m1: float, m2: float, s1: float, s2: float) -> None:
    "Against the integral of the square root of the product of two densities."
    def sums(mean: float, spread: float) -> Tensor:
        return torch.tensor([[1.], [mean], [mean**2 + spread**2]], dtype=torch.float64)
    x = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    a, b = (torch.distributions.Normal(torch.tensor(m).double(), torch.tensor(s).double()).log_prob(x)
            for m, s in ((m1, s1), (m2, s2)))
    integral = torch.trapezoid((.5 * (a + b)).exp(), x).item()
    assert overlap(sums(m1, s1), sums(m2, s2)) == pytest.approx(integral, abs=1e-3)


def test_moments_of_constant_channels() -> None:
    a, b = torch.zeros(6, 2, 3, 3), torch.ones(6, 2, 3, 3)
    assert overlap(moments(a, 6), moments(a, 6)) == pytest.approx(1)
    assert overlap(moments(a, 6), moments(b, 6)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('other, says', [
    ('same', 'the same as the clean ones'), ('fewer', 'have n '), ('other order', 'no pairs'),
    ('classes', 'have classes'), ('splits', 'several splits')])
def test_bad_drift(other: str, says: str, data: ImageData, trained: nn.Module) -> None:
    test = data.test
    plain = deepcopy(trained)
    plain.signature = None
    flipped = test._replace(images=test.images.flip(0), labels=test.labels.flip(0))
    renamed = test._replace(classes=['x', 'y', 'z'])
    others = dict(same=test, fewer=test.sample(20), classes=renamed, splits=data) | {'other order': flipped}
    with pytest.raises(MwtError, match=says): drifting(plain, test, others[other], **QUIET)
    with pytest.raises(WrongValue, match='no residual block'):
        drifting(create_model('simcnn', width=.05, in_channels=1), test, shifted(test), **QUIET)


# Retraining

def test_only_the_chosen_blocks_change(data: ImageData, trained: nn.Module) -> None:
    "Bit by bit, statistics of norms too; the network that was given, its modes and flags stay as they were."
    names = find_blocks(trained, torch.zeros(2, 1, 8, 8)).names
    before = state(trained)
    other = ImageData(*(shifted(s) for s in data.splits().values()))
    better = retrain_blocks(trained, other, names[1], clean=data.train, epochs=2, lr=.05, **QUIET)
    after = state(better)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.rsplit('.', 1)[0] for k in changed} == {'convs.1', 'norms.1'}
    assert {'convs.1.weight', 'norms.1.running_mean'} <= changed
    assert same_state(trained, before) and not better.training
    assert all(p.requires_grad for p in better.parameters()) and better.signature == trained.signature


def test_autograd_records_nothing_below(data: ImageData, trained: nn.Module) -> None:
    "What the first chosen block reads has no gradient, and what it returns has one."
    net = deepcopy(trained)
    found = block_sums(net, data.shape)
    student = Student(net, found, found.items[1:2], lambda x: torch.zeros(len(x), 4, 8, 8), .5).train()
    seen: dict[str, bool] = {}
    for name in ('stem', 'convs.0', 'convs.1', 'convs.2', 'head'):
        net.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: seen.update({name: (a[0].requires_grad, y.requires_grad)}))
    loss, _ = student.training_loss(*next(iter(data.train)))
    loss.backward()
    no, yes = (False, False), (True, True)
    assert seen == {'stem': no, 'convs.0': no, 'convs.1': (False, True), 'convs.2': yes, 'head': yes}
    learns = {n for n, p in net.named_parameters() if p.grad is not None}
    assert learns == {'convs.1.weight', 'convs.1.bias', 'norms.1.weight', 'norms.1.bias'}
    assert {n for n, m in net.named_modules() if m.training} == {'convs.1', 'norms.1'}


@pytest.mark.parametrize('relu', ['plain', 'in place'])
def test_the_published_loss(relu: str, data: ImageData, trained: nn.Module) -> None:
    "Half the mean square distance of the first chosen block's sum from the twin's, half cross-entropy."
    net = Chain(relu=relu)
    net.load_state_dict(trained.state_dict())
    net.eval()
    clean, other = data.train.plain(), shifted(data.train).plain()
    found = block_sums(net, data.shape)
    (a, y), (b, _) = next(iter(clean)), next(iter(other))
    student = Student(net, found, found.items[1:], lambda x: sums(trained, x), .25).eval()

    def sums(network: nn.Module, x: Tensor) -> Tensor:
        x = network.stem(x).relu()
        x = (network.norms[0](network.convs[0](x)) + x).relu()
        return network.norms[1](network.convs[1](x)) + x

    loss, logged = student.training_loss(torch.cat([b, a], 1), y)
    with torch.no_grad():
        distance = ((sums(net, b) - sums(trained, a))**2).mean()
        entropy = nn.functional.cross_entropy(net(b), y)
    assert loss.item() == pytest.approx((.25 * distance + .75 * entropy).item(), rel=1e-5)
    assert logged['activation'].item() == pytest.approx(distance.item(), rel=1e-5)


def test_damaged_blocks_are_mended(data: ImageData, trained: nn.Module) -> None:
    "With the sound network as teacher; plain networks and modules alike."
    names = find_blocks(trained, torch.zeros(2, 1, 8, 8)).names
    damaged = deepcopy(trained)
    with torch.no_grad(): damaged.convs[1].weight.copy_(torch.randn(damaged.convs[1].weight.shape))
    low = evaluate(damaged, data.test)
    better = retrain_blocks(damaged, data, names[1], teacher=trained, epochs=6, lr=.1, **QUIET)
    assert evaluate(better, data.test) > low
    module = as_module(damaged, data.classes, data.shape, signature=damaged.signature)
    mended = retrain_blocks(module, data, names[1], weight=0, epochs=6, lr=.1, **QUIET)
    assert type(mended) is type(module) and evaluate(mended, data.test) > low
    twins = shifted(data.train, 2)
    pair = retrain_blocks(module, data, names[1], clean=twins, epochs=1, **QUIET)
    assert pair.takes_pixels and not same_state(pair, module)
    before, after = weights_of(module), weights_of(mended)
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith(('convs.1', 'norms.1')))


def test_pairs_are_learned_in_step(data: ImageData, trained: nn.Module) -> None:
    "Shuffled and moved alike: with the twins equal but for a constant, every pair differs by that constant."
    from mwt.data.augment import Augment
    from mwt.layers.retrain import Pairs, paired_data
    dark = data.train._replace(images=data.train.images // 2, augment=Augment(pad=0, flip=True))
    other = dark._replace(images=dark.images + 10)
    plain = deepcopy(trained)
    plain.signature = None
    found = paired_data(ImageData(other, data.valid, data.test), dark.plain(), plain).train.seed(3)
    assert isinstance(found, Pairs)
    for batch, _ in found:
        difference = (batch[:, :1] - batch[:, 1:]) * 255 * data.train.std[:, None, None]
        assert torch.allclose(difference, torch.tensor(10.), atol=1e-3)


@pytest.mark.parametrize('change, says', [
    (dict(blocks='block:7'), 'unknown block'), (dict(blocks=[]), 'no block given'),
    (dict(weight=1.5), 'weight must be'), (dict(epochs=0), 'epochs must be'),
    (dict(compile=True), 'no option'),
    (dict(lr=-1), 'lr must be'), (dict(momentun=1), "no option 'momentun'"),
    (dict(teacher=Chain(2)), 'no block'),
    (dict(model=create_model('simcnn', 3, .05, 1)), 'has no residual block'),
    (dict(teacher='none'), 'must be a network'), (dict(clean='same'), 'the same as the clean'),
    (dict(clean='fewer'), 'have n '), (dict(data='four'), 'answers for 3 classes, the data has 4'),
    (dict(data='none'), 'train and a valid')])
def test_bad_retraining(change: dict[str, Any], says: str, data: ImageData) -> None:
    x, y = images(40)
    four = from_tensors((x, torch.arange(40) % 4), (x, torch.arange(40) % 4), device='cpu')
    given = dict(same=data.train, fewer=data.train.sample(20), four=four, none=5)
    net = Chain()
    before = state(net)
    call = dict(model=net, data=data, blocks='block:3', epochs=1) | change
    for name in ('data', 'clean'):
        if isinstance(call.get(name), str): call[name] = given[call[name]]
    with pytest.raises(MwtError, match=says): retrain_blocks(**call, **QUIET)
    assert same_state(net, before)


# Shortening

@pytest.mark.parametrize('by', ['accuracy', 'similarity'])
def test_a_module_is_shortened(by: str, data: ImageData) -> None:
    "A block that has learned nothing goes; accuracy stays; the module itself stays."
    torch.manual_seed(0)
    net = Chain()
    for p in net.norms[1].parameters(): p.data.zero_().requires_grad_(False)
    fit(net, data, epochs=6, lr=.1, **QUIET)
    module = as_module(net, data.classes, data.shape, dict(params=1000, flops=10), net.signature)
    before = state(module)
    short, table = shorten(module, data, most_lost=0., by=by, epochs=1, lr=.001, **QUIET)
    names = find_blocks(module).names
    gone = [row['left out'] for row in table.rows[1:-1]]
    assert names[1] in gone and (by == 'accuracy' or gone[0] == names[1])
    assert table.rows[-1]['left out'] == '(fine-tuned)'
    assert len(find_blocks(short)) == 3 - len(gone) and short.full == module.full
    assert count_params(short) < count_params(module) and same_state(module, before)
    figures = [float(row['accuracy'].split()[0]) for row in table.rows[:-1]]
    assert figures == sorted(figures) or min(figures) >= figures[0]
    assert profile(short, against=module, repeats=1) is not None and not short.training


def test_nothing_is_lost_where_every_block_is_needed(data: ImageData, trained: nn.Module) -> None:
    module = as_module(trained, data.classes, data.shape, signature=trained.signature)
    whole = evaluate(module, data.valid)
    assert all(evaluate(drop_blocks(module, n), data.valid) < whole for n in find_blocks(module).names)
    short, table = shorten(module, data, most_lost=0., epochs=1, **QUIET)
    assert len(table) == 1 and same_state(short, module)


@pytest.mark.parametrize('change, says', [
    (dict(module='net'), 'not an extracted module'), (dict(module='flat'), 'no residual block'),
    (dict(module='fresh'), 'no better than guessing'), (dict(most_lost=-1), 'most_lost must be'),
    (dict(by='luck'), "unknown by 'luck'"), (dict(epochs=-1), 'epochs must be'),
    (dict(data='other'), 'class')])
def test_bad_shortening(change: dict[str, Any], says: str, data: ImageData, trained: nn.Module) -> None:
    fresh = Chain(norm=False)
    fresh.head.weight.data.zero_()
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    modules = dict(net=trained, flat=as_module(flat, data.classes, data.shape),
                   fresh=as_module(fresh, data.classes, data.shape),
                   ok=as_module(trained, data.classes, data.shape))
    x, y = images(40)
    other = from_tensors((x, y), (x, y), classes=['x', 'y', 'z'], device='cpu')
    call = dict(module='ok', data=data) | change
    call['module'] = modules[call['module']]
    if call['data'] == 'other': call['data'] = other
    with pytest.raises(MwtError, match=says): shorten(**call, **QUIET)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(data: ImageData, trained: nn.Module) -> None:
    cuda = data.to('cuda')
    net = deepcopy(trained).cuda()
    a, b = (similarity(n, d.test.with_batch_size(48), of='all', **QUIET).matrix
            for n, d in ((trained, data), (net, cuda)))
    assert torch.allclose(a, b, atol=.01, equal_nan=True)
    other = ImageData(*(shifted(s.to('cpu')).to('cuda') for s in cuda.splits().values()))
    names = drifting(net, cuda.test, other.test, **QUIET).worst(1)
    better = retrain_blocks(net, other, names, clean=cuda.train, epochs=1, **QUIET)
    assert next(drop_blocks(better, names).parameters()).is_cuda
