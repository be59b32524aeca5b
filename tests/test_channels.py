"Any network: channels followed through every family of torchvision, and through networks made to be awkward."
from __future__ import annotations
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any
import pytest
import torch
from networks import calibrate, lively, random_parts
from shallow import FAMILIES, MAKERS, full_depth, images
from torch import Tensor, fx, nn
from torch.nn import functional as F
from mwt.channels.cut import slice_channels_
from mwt.channels.mapping import ChannelMap, LayerInfo, map_channels, plot_channels
from mwt.channels.rules import RULES, ChannelTracker, pool, rule, spellings
from mwt.methods.base import METHODS
from mwt.methods.modular import ModularModel, fixed_masks, mask_table, modularize, plain
from mwt.methods.shared import weight_origins, without_closed_kernels
from mwt.modules.extract import extract
from mwt.modules.module import load_module, save_module
from mwt.modules.parts import union_masks

DEFAULT = 'composable'
every_method = pytest.mark.parametrize('method', list(METHODS))


def made_modular(net: nn.Module, method: str, x: Tensor, n_classes: int = 10) -> ModularModel:
    "A modular model; skips what a method has nothing to mask in, and says so."
    try: return modularize(net, n_classes, method, example_input=x)
    except ValueError as e:
        if method == DEFAULT or 'no layer is left to mask' not in str(e): raise
        pytest.skip(str(e))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check_exact(
    model: ModularModel, classes: list[int], x: Tensor, path: Path | None = None,
) -> tuple[nn.Module, Tensor]: # the module, and its answer for `x`
    "Slim equals masked, is smaller, and survives the file system. In float64: rounding hides nothing."
    model, x = model.double(), x.double()
    parts = random_parts(model, 1 / (1 + len(classes)), seed=len(classes))
    masks = union_masks(parts, classes)
    calibrate(model, masks)
    module = extract(model, parts, classes)
    with fixed_masks(model, masks), torch.no_grad(): expected = model(x)[:, classes]
    with torch.no_grad(): slim = module(x)
    scale = expected.abs().max().item()
    assert expected.std(0).max() > 1e-6 * scale, 'the comparison would be empty'
    assert torch.allclose(slim, expected, rtol=0, atol=1e-9 * scale), (slim - expected).abs().max()
    assert count(module) < count(plain(model))
    if path is not None:
        loaded = load_module(save_module(module, path))
        with torch.no_grad(): assert torch.equal(loaded(x), slim), 'loaded module differs'
    return module, slim


def check_step(model: ModularModel, x: Tensor) -> None:
    "One step of training: all gradients are finite."
    labels = torch.arange(len(x))
    loss, _ = model.train().training_loss(x, labels)
    loss.backward()
    model.after_backward(labels, 0.)
    assert loss.isfinite()
    for name, p in model.named_parameters(): assert p.grad is None or p.grad.isfinite().all(), name
    model.zero_grad()


def check_family(net: nn.Module, name: str, method: str, path: Path) -> tuple[nn.Module, Tensor, Tensor]:
    "A step, then cuts to some classes and to all, one of them saved; that module, images, and its answer."
    x = images(name)
    if name == 'squeezenet1_1': net.classifier[1].bias.data += 3           # it ends in a ReLU
    model = made_modular(net, method, x)
    check_step(model, x)
    check_exact(model.eval(), list(range(10)), x)
    module, slim = check_exact(model, [7, 2], x, path)
    return module, x.double(), slim


def in_turns(names: Sequence[str], slow: Container[str] = ()) -> list[Any]:
    "Each name with one of the methods, in turns; with the others it is a slow test."
    cases = []
    for n, name in enumerate(names):
        for m, method in enumerate(METHODS):
            marks = [] if m == n % len(METHODS) and name not in slow else pytest.mark.slow
            cases.append(pytest.param(name, method, id=f'{name}-{method}', marks=marks))
    return cases


# Slow are those that are deep, and whose blocks another family or test has too: GoogLeNet's, ResNet's,
# MobileNet v2's, those of RegNet Y; ShuffleNet is cut by every method in test_extract.
CASES = in_turns(FAMILIES, slow={'inception_v3', 'wide_resnet50_2', 'mnasnet0_5', 'regnet_x_400mf',
                                 'shufflenet_v2_x0_5'})


@pytest.mark.parametrize('name, method', CASES)
def test_family(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_family(lively(MAKERS[name]()), name, method, tmp_path/'module.safetensors')


@pytest.mark.slow
@every_method
@pytest.mark.parametrize('name', FAMILIES)
def test_family_at_full_depth(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = lively(full_depth(name)), tmp_path/'module.safetensors'
    module, x, slim = check_family(net, name, method, path)
    exported = torch.export.export(module, (x,)).module()           # of other networks in test_extract
    with torch.no_grad(): assert torch.allclose(exported(x), slim, rtol=1e-9)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check_shrunk(net: nn.Module, x: Tensor, multiple: int = 8) -> None:
    "Without closed kernels a model computes the same, and learns the same."
    model = modularize(lively(net), 10, 'composable', example_input=x, dense=False).double().eval()
    generator = torch.Generator().manual_seed(0)
    gates = model.masks.gates
    gates.gates.copy_(torch.rand(gates.gates.shape, generator=generator) < .05)
    for group in gates.groups.unique():         # at least one
        gates.gates[0, (gates.groups == group).nonzero()[0, 0]] = 1
    targets = torch.rand(len(x), 10, generator=generator) < .5
    small, origins = without_closed_kernels(model, multiple), weight_origins(model, multiple)
    answers = [m(x.double(), targets) for m in (model, small)]
    assert torch.allclose(*answers, rtol=1e-9) and answers[0].std() > 0
    for a in answers: a.square().sum().backward()
    grads, dense = gradients(small), gradients(model)
    assert grads.keys() == dense.keys()
    assert sum(g.numel() for g in grads.values()) < sum(g.numel() for g in dense.values())
    for name, grad in grads.items():
        expected = dense[name].flatten()[origins[name]]
        assert torch.allclose(grad.flatten(), expected, atol=1e-9 * (1 + grad.abs().max().item())), name
    assert all(len(at.unique()) == len(at) for at in origins.values())


SHRUNK = ['resnet18', 'densenet121', 'mobilenet_v2', 'shufflenet_v2_x0_5', 'regnet_y_400mf']


@pytest.mark.parametrize('name', SHRUNK)
def test_training_without_closed_kernels(name: str) -> None:
    torch.manual_seed(0)
    check_shrunk(MAKERS[name](), images(name))


class Block(nn.Module):
    "What awkward networks are made of; `kind` says which."
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.n1, self.n2, self.wide = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=4)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.join, self.point = nn.Conv2d(24, 12, 1), nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.rand(12, 1, 1) + .5)
        self.group_norm, self.layer_norm = nn.GroupNorm(3, 12), nn.LayerNorm(12)
        self.register_buffer('order', torch.arange(12).flip(0))
        self.register_buffer('rows', torch.arange(8).flip(0))
        for layer in (self.stem, self.a, self.b, self.c, self.grouped, self.deep, self.join):
            nn.init.kaiming_normal_(layer.weight)
        if kind == 'conv head': self.head = nn.Conv2d(12, 4, 1)
        else: self.head = nn.Linear(12 * 9 if kind == 'flatten' else 12, 4)

    def middle(self, x: Tensor) -> Tensor:
        k = self.kind
        if k == 'pre-norm': return x + self.b(F.relu(self.n2(self.a(F.relu(self.n1(x))))))
        if k == 'concat': return self.join(F.relu(self.wide(torch.cat([self.a(x), self.b(x)], 1))))
        if k == 'grouped': return self.join(F.relu(self.grouped(F.relu(self.a(x)))))
        if k == 'depthwise': return self.b(F.relu(self.n1(self.deep(F.relu(self.a(x))))))
        if k == 'squeeze': return self.b(x * torch.sigmoid(self.a(x.mean((2, 3), keepdim=True))))
        if k == 'sigmoid': return self.b(torch.sigmoid(self.a(x)))
        if k == 'twice': return self.a(F.relu(self.a(F.relu(self.n1(x)))))
        if k == 'chunk': return self.a(torch.cat(x.chunk(2, 1)[::-1], 1))
        if k == 'slices': return self.a(torch.cat([x[:, 6:], x[:, :6]], 1))
        if k == 'scale': return self.b(F.relu(self.a(x) * self.scale))
        if k == 'shift': return self.b(F.relu(self.a(x) + self.scale))
        if k == 'group norm': return self.b(F.relu(self.group_norm(self.a(x))))
        if k == 'layer norm': return self.b(self.last(self.point(self.layer_norm(self.first(self.a(x))))))
        if k == 'pointwise': return self.b(self.last(F.gelu(self.point(self.first(self.a(x))))))
        if k == 'attention': return self.b(x * torch.sigmoid(self.a(x).mean(1, keepdim=True)))
        if k == 'divide': return self.b(F.relu(self.a(x) / (1 + self.c(x).abs())))
        if k == 'shuffle': return self.a(self.shuffled(x))
        if k == 'norm sum': return F.relu(self.n1(self.a(x) + self.b(x)))
        return self.b(F.relu(self.a(x)))

    def first(self, x: Tensor) -> Tensor: return x.permute(0, 2, 3, 1)          # channels last
    def last(self, x: Tensor) -> Tensor: return x.permute(0, 3, 1, 2)           # and back

    def shuffled(self, x: Tensor) -> Tensor:
        groups = x.view(x.shape[0], 3, x.shape[1] // 3, 8, 8).transpose(1, 2)
        return groups.reshape(x.shape[0], x.shape[1], 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.middle(F.relu(self.stem(x))))))
        if self.kind == 'conv head': return self.head(x).mean((2, 3))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 3 if self.kind == 'flatten' else 1), 1))


KINDS = [
    'pre-norm', 'concat', 'grouped', 'depthwise', 'squeeze', 'sigmoid', 'twice', 'chunk', 'slices', 'scale',
    'shift', 'group norm', 'layer norm', 'pointwise', 'attention', 'divide', 'shuffle', 'norm sum',
    'conv head', 'flatten', 'plain']


@pytest.mark.parametrize('kind, method', in_turns(KINDS))
def test_awkward_network(kind: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    if (kind, method) == ('divide', 'moda'):
        with pytest.raises(ValueError, match='no ReLU of it'):
            modularize(Block(kind), 4, method, example_input=x)
        return
    model = modularize(lively(Block(kind)), 4, method, example_input=x).eval()
    for classes in ([2], [3, 0]): check_exact(model, classes, x, tmp_path/'module.safetensors')


def mapped(net: nn.Module) -> tuple[ChannelMap, dict[str, LayerInfo]]: # the map, and its layers by name
    channels = map_channels(net, torch.randn(2, 3, 8, 8))
    return channels, {info.name: info for info in channels.infos}


def check_cut(net: nn.Module, seed: int = 0) -> nn.Module: # the slim network
    "A cut of the plain network computes what the network with silenced kernels computes."
    net = lively(net).double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    channels = map_channels(net, x)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(len(channels.root), generator=generator) < .6         # by root: coupled layers agree
    rows = {name: kept[channels.root[channels.layers[name].writes]] for name in channels.kernels}
    keep = {name: row for name, row in rows.items() if row.any()}
    model = modularize(net, 4, 'composable', example_input=x).double().eval()
    masks = {name: keep.get(name, torch.ones(k, dtype=torch.bool)) for name, k in model.kernels.items()}
    with fixed_masks(model, masks), torch.no_grad(): expected = model(x)
    slim = slice_channels_(plain(model), channels, {name: masks[name] for name in model.kernels})
    with torch.no_grad(): assert torch.allclose(slim(x), expected, rtol=1e-9)
    return slim


class Spelled(nn.Module):
    "Applies one operation in the middle."
    def __init__(self, operation: object) -> None:
        super().__init__()
        self.operation = operation
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor: return self.head(self.b(self.operation(self.a(x))).mean((2, 3)))


TWINS = {
    'torch.relu_': torch.relu_, 'F.relu_': F.relu_, 'x.relu_': lambda x: x.relu_(), 'nn.ReLU': nn.ReLU(True),
    'torch.dropout': lambda x: torch.dropout(x, .5, False), 'F.dropout': lambda x: F.dropout(x, .5, False),
    'torch.max_pool2d': lambda x: torch.max_pool2d(x, 2), 'F.max_pool2d': lambda x: F.max_pool2d(x, 2),
    'torch.clamp_': lambda x: torch.clamp_(x, 0, 1), 'x.clamp_': lambda x: x.clamp_(min=0),
    'x ** 2': lambda x: x ** 2, 'x.mul_': lambda x: x.mul_(2),
    'torch.swapdims': lambda x: torch.swapdims(x, 2, 3),
    'F.leaky_relu_': F.leaky_relu_, 'F.hardtanh_': F.hardtanh_, 'nn.Softshrink': nn.Softshrink(),
    'by name': lambda x: torch.relu(input=x),
    'torch.concatenate': lambda x: torch.concatenate([x, -x], 2), 'F.pad': lambda x: F.pad(x, (1, 1))}


@pytest.mark.parametrize('name', TWINS)
def test_every_spelling_of_an_operation_is_followed(name: str) -> None:
    net = Spelled(TWINS[name])
    assert not mapped(net)[1]['a'].reason
    check_cut(net)


def test_spellings_are_derived_from_pytorch() -> None:
    assert spellings('relu') == [torch.relu, torch.relu_, F.relu, 'relu', 'relu_', nn.ReLU]
    assert {torch.sigmoid_, F.sigmoid, 'sigmoid_', nn.Sigmoid} < set(spellings('sigmoid'))
    assert spellings('no such operation') == []
    assert all(isinstance(key, str) or callable(key) for key in RULES)


def statement(x: Tensor) -> Tensor:
    "Changed in place, the result is thrown away."
    x.sigmoid_()
    return x


LOSERS = {
    'statement': (statement, 'sigmoid_'), 'sigmoid_': (torch.sigmoid_, 'sigmoid_'),
    'softplus': (F.softplus, 'softplus'), 'layer': (nn.Softplus(), 'operation'),
    'pad': (lambda x: F.pad(x, (1, 1), value=1.), 'pad'),
    'sum': (lambda x: x + 1, 'add'), 'quotient': (lambda x: 1 / (x.exp() + 1), 'exp')}


@pytest.mark.parametrize('name', LOSERS)
def test_lost_zeros_are_noticed(name: str) -> None:
    operation, lost = LOSERS[name]
    reason = mapped(Spelled(operation))[1]['a'].reason
    assert f'behind {lost}, which turns zeros into something else' in reason
    check_cut(Spelled(operation))


class Odd(Spelled):
    "Tensors that are read for their type or shape only, and indices that are tensors."
    def __init__(self, kind: str) -> None:
        super().__init__(None)
        self.kind = kind
        self.register_buffer('order', torch.arange(8).flip(0))
        self.register_buffer('rows', torch.arange(8).flip(0))
        self.table, self.scale = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.kind == 'dtype': x = x.to(self.b.weight.dtype)
        if self.kind == 'type of': x = x.type_as(self.b.weight).to(self.scale)
        if self.kind == 'shape': x = x * self.table.shape[0] + self.scale.ndim * x
        if self.kind == 'order': x = x[:, self.order]
        if self.kind == 'rows': x = x[:, :, self.rows]
        if self.kind == 'computed': x = x[:, x.mean((0, 2, 3)).argsort()]
        if self.kind == 'table': x = x * self.table[self.order[:1] // 2].view(1, 8, 1, 1)
        if self.kind == 'constant': x = x * torch.arange(1., 9.).view(8, 1, 1)
        return self.head(self.b(x).mean((2, 3)))


@pytest.mark.parametrize('kind', ['dtype', 'type of', 'shape', 'rows'])
def test_what_needs_no_channels_holds_none(kind: str) -> None:
    channels, infos = mapped(Odd(kind))
    assert not infos['a'].reason and not channels.tensors
    check_cut(Odd(kind))


@pytest.mark.parametrize('kind, reason', [('order', 'picks some of its channels'), ('computed', 'reads it'),
                                          ('table', 'picks some of its channels'),
                                          ('constant', 'made in the forward pass')])
def test_index_tensors_hold_their_channels(kind: str, reason: str) -> None:
    "Values are never read from tensors without memory."
    first, second = (mapped(Odd(kind)) for _ in range(2))
    assert torch.equal(first[0].root, second[0].root)
    assert reason in first[1]['a'].reason
    check_cut(Odd(kind))


class Blur(nn.Module):
    "A layer of a user's own: smooths each channel with the same filter."
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('filter', torch.full((1, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return F.conv2d(x.reshape(n * c, 1, h, w), self.filter, padding=1).reshape(n, c, h, w)


class OwnBlur(Blur): pass


class Other(Blur):
    def forward(self, x: Tensor) -> Tensor: return super().forward(x) + 1


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    "Rules that a test registers are gone after it."
    for key in (Blur, nn.LayerNorm): monkeypatch.setitem(RULES, key, RULES.get(key))
    for key in (Blur, nn.LayerNorm): RULES.pop(key)


@pytest.mark.parametrize('kind', [Blur, OwnBlur])
def test_a_rule_teaches_an_operation(rules: None, kind: type[nn.Module]) -> None:
    assert 'conv2d reads it' in mapped(Spelled(kind()))[1]['a'].reason
    assert check_cut(Spelled(kind())).a.out_channels == 8

    @rule(Blur)
    def blur(tracker: ChannelTracker, node: fx.Node, layer: nn.Module) -> object:
        return pool(tracker, node, layer)

    assert not mapped(Spelled(kind()))[1]['a'].reason
    assert check_cut(Spelled(kind())).a.out_channels < 8


def test_a_subclass_that_computes_something_else_has_no_rule(rules: None) -> None:
    rule(Blur)(pool)
    assert mapped(Spelled(Other()))[1]['a'].reason


def test_a_rule_replaces_the_fallback_for_a_layer_of_pytorch(rules: None) -> None:
    "A rule may pin as well, with a reason of its own."
    @rule(nn.LayerNorm)
    def whole(tracker: ChannelTracker, node: fx.Node, layer: nn.Module) -> object:
        [activation] = tracker.inputs(node)
        tracker.groups.pin(activation.ids, 'normalised as a whole')
        return activation

    assert mapped(Block('layer norm'))[1]['a'].reason == 'normalised as a whole'


class OwnConv(nn.Conv2d): pass


class OwnLinear(nn.Linear): pass


def test_subclass_of_a_known_layer(tmp_path: Path) -> None:
    net = Spelled(nn.ReLU())
    net.a, net.head = OwnConv(3, 8, 3, padding=1), OwnLinear(8, 4)
    channels, infos = mapped(net)
    assert channels.head == 'head' and not infos['a'].reason
    assert check_cut(net).a.out_channels < 8


class Optional(nn.Module):
    "A forward pass with arguments that nobody passes here, and a check of shapes."
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, features: bool = False, scale: Tensor | None = None) -> Tensor:
        torch._assert(x.ndim == 4, 'four dimensions')
        x = F.relu(torch.add(self.a(x), other=1.) - 1)
        if scale is not None: x = x * scale
        x = F.relu(self.b(x)).mean((2, 3))
        return x if features else self.head(x)


def test_optional_arguments_keep_their_defaults(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = modularize(lively(Optional()), 4, example_input=x).eval()
    assert [i.name for i in model.channels.infos if i.reason] == ['a', 'head']      # a number was added
    check_exact(model, [1, 2], x, tmp_path/'module.safetensors')


@pytest.mark.parametrize('kind, layer, reason', [
    ('sigmoid', 'a', 'sigmoid'), ('slices', 'stem', 'picks some of its channels'),
    ('group norm', 'a', 'GroupNorm reads it'), ('layer norm', 'a', 'LayerNorm reads it'),
    ('shift', 'a', 'scale'), ('attention', 'a', 'mean reads it')])
def test_what_cannot_be_cut_is_named(kind: str, layer: str, reason: str) -> None:
    assert reason in mapped(Block(kind))[1][layer].reason
    assert reason in str(mask_table(modularize(Block(kind), 4, example_input=torch.randn(2, 3, 8, 8))))


def test_channels_of_a_grouped_convolution_are_coupled() -> None:
    channels, _ = mapped(Block('grouped'))
    roots = channels.root[channels.layers['grouped'].writes]
    assert len(roots.unique()) == 4         # one group of channels for each group of the convolution ...
    inputs = channels.root[channels.layers['a'].writes]
    assert torch.equal(inputs.unique(), roots.unique())     # ... together with its inputs
    assert not channels.stays[roots].any()


def test_picture_of_coupled_channels() -> None:
    channels, infos = mapped(Block('depthwise'))
    ax = plot_channels(channels)
    letters = {name: [] for name in infos}
    for text in sorted(ax.texts, key=lambda t: t.get_position()[1]):
        letters[list(infos)[text.get_position()[0]]].append(text.get_text())
    assert letters['a'] == letters['deep'] and not set(letters['a']) & set(letters['b'])
    assert [len(row) for row in letters.values()] == [info.kernels for info in channels.infos]
    assert plot_channels(channels, ax) is ax


def test_filter_leaves_coupled_layers_alone_too() -> None:
    x = torch.randn(2, 3, 8, 8)
    chosen = lambda layer, name: name != 'deep'
    model = modularize(Block('depthwise'), 4, 'composable', example_input=x, filter_fn=chosen)
    reasons = {i.name: i.reason for i in model.channels.infos}
    assert reasons['deep'] == 'left out by filter_fn'
    assert reasons['a'] == 'coupled to a layer that stays'
    assert not reasons['b']


def test_coupled_layers_need_one_mask() -> None:
    model = modularize(Block('depthwise'), 4, 'composable', example_input=torch.randn(2, 3, 8, 8))
    masks = {name: torch.ones(k) for name, k in model.kernels.items()} | {'deep': torch.zeros(12)}
    with pytest.raises(ValueError, match='is coupled with others'), fixed_masks(model, masks): pass


class Fickle(nn.Module):
    "Runs another way each time."
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.mean() > 0: x = self.b(x)
        return self.head(x.mean((2, 3)))


def test_network_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(ValueError, match='Fickle cannot be traced'): modularize(Fickle(), 2)


def check_timm(name: str, side: int = 64) -> None:
    import timm                             # takes seconds

    torch.manual_seed(0)
    x = torch.randn(2, 3, side, side)
    model = modularize(lively(timm.create_model(name, num_classes=10)), 10, example_input=x).eval()
    check_exact(model, [2, 5], x)


def test_timm() -> None:
    check_timm('resnet10t')


TIMM = ['resnet18', 'mobilenetv2_100', 'densenet121', 'regnety_002', 'res2net50_14w_8s', 'hrnet_w18_small',
        'dla34', 'xception41']


@pytest.mark.slow
@pytest.mark.parametrize('name', TIMM)
def test_timm_at_full_depth(name: str) -> None:
    check_timm(name)
