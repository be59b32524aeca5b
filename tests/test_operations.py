"What a network may be made of: followed, left whole or refused by `modularize`, and nothing later."

from __future__ import annotations
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
import pytest
import torch
import torch.nn.functional as F
from networks import random_parts
from torch import Tensor, fx, nn
from torchvision import models
from mwt.channels.description import OWN_ATTRIBUTES, describe_layer, describe_steps, make_layer
from mwt.channels.operations import ATTRIBUTES, FUNCTIONS, LAYERS, METHOD_NAMES, verdict
from mwt.channels.rules import RULES, STOCHASTIC_DEPTH
from mwt.core.files import load_tensors
from mwt.core.signature import Signature
from mwt.methods.modular import ModularModel, mask_table, modularize
from mwt.modules.extract import extract
from mwt.modules.module import SlimModule, load_module, save_module

OLD = Path(__file__).resolve().parent / 'fixtures' / '0.1.0'
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PIXELS = X.sigmoid()


def three_steps(model: ModularModel, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(3):
        loss, _ = model.train().training_loss(x, torch.arange(len(x)) % model.n_classes)
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_(0, 0, 0).clamp_(-1, 1)
        model.after_backward(torch.arange(len(x)) % model.n_classes, i / 3)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def to_the_end(
    net: nn.Module, path: Path, x: Tensor = X, n_classes: int = 4, method: str = 'composable'
) -> tuple[ModularModel, SlimModule]:
    """Modularize, three steps, three more without closed kernels, extract (which compares), save, load: all
    of it, or an error of `modularize`. Images are normalised, as `fit` notes it; the module takes pixels."""
    model = modularize(net, n_classes, method, example_input=x)
    three_steps(model, x)
    n = x.shape[1]
    names = [f'class {i}' for i in range(n_classes)]
    model.signature = Signature(names, list(x.shape[1:]), [0.4] * n, [0.3] * n)
    if smaller := model.smaller():
        three_steps(smaller[0], x)
    module = extract(model, random_parts(model, 0.5), [2, 0])
    loaded = load_module(save_module(module, path / 'module.safetensors'))
    with torch.no_grad():
        assert torch.equal(loaded(x.sigmoid()), module(x.sigmoid()))
    return model, module


def reasons(model: ModularModel) -> dict[str, str]:
    return {i.name: i.reason for i in model.channels.infos}


# Every operation and layer of the tables


HELD: dict[str, Callable[[], Tensor]] = {  # tensors that arguments name: parameters, statistics, an order
    'p': lambda: torch.rand(8),
    'k': lambda: torch.rand(8, 8),
    'w': lambda: torch.rand(8, 8, 8),
    'c': lambda: torch.rand(8, 8, 3, 3),
    's': lambda: torch.rand(8),
    'o': lambda: torch.arange(8).flip(0),
}
MADE: dict[str, Callable[[Tensor], Tensor]] = {  # other arguments, made of the activation
    'x': lambda x: x,
    'mask': lambda x: x > 0,
    'i': lambda x: (x > 0).long(),
    't': lambda x: x.transpose(-1, -2),
    'first': lambda x: x[:, :1],
    'grid': lambda x: x.permute(0, 2, 3, 1)[..., :2],
}


class Probe(nn.Module):
    "A convolution, one operation, and a head for whatever comes out of it."

    def __init__(
        self, call: Callable[..., Any], arguments: tuple[Any, ...] = (), before: Callable = torch.clone
    ) -> None:
        super().__init__()
        self.call, self.arguments, self.before = call, arguments, before
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        for name in [a for a in arguments if isinstance(a, str) and a in HELD]:
            value = HELD[name]()
            if name in 'so':
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def result(self, x: Tensor) -> Any:
        "Of the operation alone."
        return self.call(x, *(self.argument(a, x) for a in self.arguments))

    def argument(self, a: Any, x: Tensor) -> Any:
        if not isinstance(a, str):
            return a
        return MADE[a](x) if a in MADE else getattr(self, a)

    def suits(self, x: Tensor) -> bool:
        """Note what comes out, and make a head for it. Of several results the first counts. A single number,
        or what is no batch, is added to what went in."""
        try:
            x = self.before(x)
            found = self.result(x)
            self.several = isinstance(found, tuple | list)
            found = found[0] if self.several else found
            self.number = isinstance(found, int | float)
            if not self.number and not isinstance(found, Tensor):
                return False
            self.is_batch = not self.number and found.ndim > 1 and len(found) == len(x)
            found = found if self.is_batch else x + torch.as_tensor(found).float().mean()
        except Exception:
            return False  # other arguments
        size = found[0].numel()
        self.head = nn.Linear(max(size, 1), 4)
        return found.ndim > 1 and 0 < size <= 8192

    def features(self, x: Tensor) -> Any:
        x = self.before(self.a(self.stem(x).relu()))
        y = self.result(x)
        if self.several:
            y = y[0]
        if self.is_batch:
            return y
        return x + (y if self.number else y.float().mean())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nan_to_num(self.features(x).float(), 0.0, 0.0, 0.0)
        return self.head(x.clamp(-9, 9).flatten(1))


A = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def probe(*settings: Any) -> Probe | None:
    "The network with an operation, if it suits."
    torch.manual_seed(0)
    net = Probe(*settings).eval()
    with torch.no_grad():
        return net if net.suits(A.clone()) else None


WAYS = [
    (),
    (1,),
    (2,),
    ('x',),
    (1, 2),
    ('x', 'x'),
    ((2, 2),),
    (0.0, 1.0),
    ('w',),
    (1, 'w'),
    ('w', 'w'),
    (1, 0, 2),
    ([8, 8, 8],),
    ((3, 2),),
    ('mask', 0.0),
    ([1, 1],),
    (1, [2, 4]),
    ((0, 2, 3, 1),),
    (0, 2, 3, 1),
    ((-1, 512),),
    (-1, 512),
    (1, 1, 1, 2),
    ((-1, 8, 8, 8),),
    (0.5, False),
    ('p',),
    ('s', 's'),
    ('k',),
    ('k', 'k'),
    ('x', 'k'),
    ('k', 'p'),
    ('c',),
    ('t',),
    ('x', 't'),
    ('grid',),
    (1, 'o'),
    (1, 'o', 'x'),
    (1, 'o', 0.5),
    (1, 'i'),
    (1, 'i', 'x'),
    (1, 'i', 'x', 'sum'),
    (1, 'o', 'x', 'amax'),
    ('i', 1),
    ('i',),
    ('mask', 'x'),
    ('mask',),
    (1, 4, 2),
    ([4, 4], 1),
    ('first', 1, 0),
    (1, True),
    ('x', 'x', 'x'),
]
SHAPES = [
    torch.clone,
    lambda x: x.flatten(2),
    lambda x: x.flatten(2).transpose(1, 2),
    lambda x: x.unsqueeze(2),
    lambda x: x.mean((2, 3)),
    lambda x: x.mean(3),
]
CALLS: list[Callable[..., Any]] = [  # with what an operation begins
    lambda f, x, *a: f(x, *a),
    lambda f, x, *a: f([x, x], *a),
    lambda f, x, *a: f(x > 0, x, *a),
    lambda f, x, *a: f((x > 0).long(), *a),
    lambda f, x, *a: f(x.shape[2], *a),
    lambda f, x, *a: f(x.flatten(), *a),
    lambda f, x, *a: f(x.mean((0, 2, 3)), *a),
    lambda f, x, *a: f(torch.complex(x, x), *a),
]


def first_way(f: Callable[..., Any], ways: list[tuple] = WAYS) -> nn.Module | None:
    "The network in which a function gets the first arguments that suit it; better ones that give a batch."
    second = None
    for call, before in product(CALLS, SHAPES):
        if call is not CALLS[0] and before is not SHAPES[0]:
            continue
        for way in ways:
            net = probe(partial(call, f), way, before)
            if net and net.is_batch:
                return net
            second = second or net
    return second


SETTINGS = [
    (),
    (8,),
    (2,),
    (1,),
    (8, 2),
    (2, 8),
    (8, 8, 3),
    (8, 8),
    (8, 4, 1),
    (1, 0.5),
    (0.0, 1.0),
    (1, (2, 4)),
    (2, 2),
]


def layer_of(name: str) -> nn.Module | None:
    "A network around a layer that is made with the first arguments that suit it."
    for call, arguments in product((CALLS[0], CALLS[3]), SETTINGS):
        for more, before in product(((), ('x',), ('x', 'x'), ('i',)), SHAPES):
            try:
                layer = LAYERS[name](*arguments).eval()
            except Exception:
                continue
            net = probe(Called(layer, call), more, before)
            if net and net.is_batch:
                return net
    return None


class Called(nn.Module):
    "A layer that is given something else than the activation."

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.call(self.layer, x, *more)


def operations() -> Iterator[tuple[str, Callable[[], nn.Module | None]]]:
    for name in sorted(FUNCTIONS):
        yield name, lambda name=name: first_way(FUNCTIONS[name])
    yield 'torch.einsum', lambda: first_way(partial(torch.einsum, 'nc...,nc...->nc...'))
    for name in sorted(METHOD_NAMES):
        yield f'x.{name}', lambda name=name: first_way(lambda x, *a: getattr(x, name)(*a))
    for name in sorted(ATTRIBUTES & set(dir(Tensor))):  # others are of results, as `x.max(1).indices`
        yield f'x.{name} (attribute)', lambda name=name: first_way(lambda x: getattr(x, name), [()])
    for name in sorted(LAYERS):
        yield f'nn.{name}', lambda name=name: layer_of(name)


OPERATIONS = dict(operations())
FOLLOWED_OR_WHOLE = {
    'torch.relu_',
    'torch.std',
    'torch.where',
    'torch.matmul',
    'torch.cat',
    'torch.einsum',
    'operator.matmul',
    'F.max_pool2d',
    'linalg.vector_norm',
    'F.instance_norm',
    'x.max',
    'x.std',
    'x.softmax',
    'x.erf',
    'x.cumsum',
    'x.half',
    'x.topk',
    'x.squeeze',
    'x.view',
    'nn.BatchNorm1d',
    'nn.ConvTranspose2d',
    'nn.InstanceNorm2d',
    'nn.Softsign',
    'nn.LPPool2d',
    'nn.SyncBatchNorm',
    'nn.MultiheadAttention',
    'nn.LSTM',
    'nn.RMSNorm',
    'nn.Softmax2d',
}
FEW = FOLLOWED_OR_WHOLE | set(list(OPERATIONS)[::50])  # what users have met, and a sample of all


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in OPERATIONS]
)
def test_an_operation_runs_to_the_end_or_is_refused_at_once(name: str, tmp_path: Path) -> None:
    net = OPERATIONS[name]()
    if net is None:
        assert name not in FOLLOWED_OR_WHOLE
        pytest.skip('no arguments here suit it')
    try:
        modularize(net, 4, example_input=X)
    except ValueError as e:
        assert name not in FOLLOWED_OR_WHOLE, e
        return
    to_the_end(net, tmp_path)


# The tables


def test_tables_hold_nothing_that_could_act() -> None:
    "No file, code, device, hook or foreign object: names of PyTorch's operators on tensors only."
    words = (
        'load',
        'save',
        'file',
        'import',
        'compile',
        'script',
        'hook',
        'exec',
        'eval',
        'call',
        'apply',
        'map_',
        'storage',
        'numpy',
        'dlpack',
        'data_ptr',
        'backward',
        'empty',
        'resize',
        'share',
        'cuda',
        'pin_',
        'set_',
        'seed',
        'thread',
        'module',
        'pickle',
        'reduce_ex',
        'subclass',
        'tolist',
        'item',
    )
    allowed = {'operator.getitem'}
    for name in [*FUNCTIONS, *METHOD_NAMES]:
        last = name.rpartition('.')[2]
        assert name in allowed or not [w for w in words if w in last], name
        assert not last.startswith('_'), name
    assert not {'data', 'grad', 'grad_fn', 'name', '__class__', '_base', 'is_leaf'} & ATTRIBUTES
    places = {
        'torch',
        'torch.functional',
        'torch.nn.functional',
        'torch._C._nn',
        '_operator',
        'math',
        'torch._C',
        'torch._C._linalg',
        'torch._C._fft',
        'torch._C._special',
        'mwt.channels.operations',
        'mwt.channels.trace',  # put_at_
        'mwt.core.signature',  # normalise
        None,
    }
    assert {getattr(f, '__module__', None) for f in FUNCTIONS.values()} <= places
    assert all(kind.__module__.startswith('torch.nn.modules.') for kind in LAYERS.values())


def test_no_function_of_the_tables_opens_a_file(tmp_path: Path) -> None:
    "A path in place of a tensor or a number is refused by each of them."
    path = tmp_path / 'here'
    for name, function in FUNCTIONS.items():
        if name.startswith('operator'):
            continue
        for arguments in ((str(path),), (torch.zeros(2), str(path)), (str(path), 8), ([str(path)],)):
            try:
                function(*arguments)
            except Exception:
                continue
    assert not path.exists() and not list(tmp_path.iterdir())


def test_whatever_is_followed_can_be_stored() -> None:
    refused = [key for key in RULES if verdict(key) == 'refused' and key != STOCHASTIC_DEPTH]
    assert not refused


def test_names_in_files_of_version_0_1_0() -> None:
    "Those of its lists, and those in its files."
    paths = list(OLD.rglob('modules/*.safetensors'))
    assert paths
    for path in paths:
        _, about = load_tensors(path, 'module')
        assert {layer['type'] for layer in about['layers'].values()} <= LAYERS.keys()
        for step in about['steps']:
            if step['kind'] == 'function':
                assert step['target'] in FUNCTIONS
            if step['kind'] == 'method':
                assert step['target'] in METHOD_NAMES
    lists = {
        'operator': 'add iadd sub isub mul imul truediv floordiv mod neg pow getitem',
        'torch': 'add sub mul div cat concat stack flatten reshape permute transpose squeeze unsqueeze chunk '
        'split mean sum amax relu sigmoid tanh softmax clamp exp sqrt rsqrt pow matmul abs neg square clone '
        'movedim swapaxes unbind',
        'F': 'relu relu6 leaky_relu elu gelu silu mish hardtanh hardswish hardsigmoid softplus sigmoid tanh '
        'softmax log_softmax dropout conv2d linear batch_norm layer_norm group_norm max_pool2d avg_pool2d '
        'pad adaptive_avg_pool2d adaptive_max_pool2d interpolate normalize',
    }
    for place, names in lists.items():
        for name in names.split():
            assert f'{place}.{name}' in FUNCTIONS, name
    assert 'stochastic_depth' in FUNCTIONS
    methods = (
        'add add_ sub sub_ mul mul_ div div_ view reshape flatten permute transpose contiguous squeeze '
        'unsqueeze chunk split mean sum amax size dim relu relu_ sigmoid sigmoid_ tanh softmax clamp '
        'clamp_ expand expand_as pow sqrt exp abs neg square clone movedim swapaxes unbind float'
    )
    assert set(methods.split()) <= METHOD_NAMES and {'shape', 'ndim'} <= ATTRIBUTES


@pytest.mark.parametrize(
    'layer',
    [
        nn.MultiheadAttention(8, 2, bias=False),
        nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4, batch_first=True),
        nn.GRU(3, 4, num_layers=2, bidirectional=True),
        nn.RNN(3, 4, nonlinearity='relu'),
        nn.LSTM(3, 4, proj_size=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False),
        nn.PReLU(4),
        nn.Threshold(0.1, 2.0),
        nn.LayerNorm((2, 3), elementwise_affine=False),
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        nn.InstanceNorm2d(3, affine=True),
        nn.Upsample(scale_factor=2.0, mode='nearest'),
        nn.Unflatten(1, (2, 4)),
        nn.Embedding(4, 2, padding_idx=1),
        nn.Bilinear(2, 3, 4),
        nn.Softmax(1),
        nn.Hardtanh(-2, 2),
    ],
    ids=str,
)
def test_a_layer_and_its_description(layer: nn.Module) -> None:
    about = json.loads(json.dumps(describe_layer('layer', layer)))
    made = make_layer('layer', about)
    assert type(made) is type(layer) and made.extra_repr() == layer.extra_repr()
    made.load_state_dict(layer.state_dict())


# Networks


class Base(nn.Module):
    "Two convolutions and a head; what lies between them is the subject."

    def __init__(self, kind: str = '') -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.middle(self.a(self.stem(x).relu()).relu()))
        return self.head(self.last(x.relu()).relu().mean((2, 3)))


class Kept(Base):
    "Tensors that no state dict holds, and tensors that are read for their type."

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer('hidden', torch.rand(8, 1, 1) + 0.5, persistent=False)
        self.register_buffer('rows', torch.arange(8).flip(0))
        self.plain = torch.rand(1, 8, 1, 1) + 0.5
        self.low = nn.Linear(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        k = self.kind
        if k == 'buffer':
            return x * self.hidden
        if k == 'plain':
            return x * self.plain
        if k == 'both':
            return x * self.plain.view(8, 1, 1) + self.hidden
        if k == 'tensor':
            return x * torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]).view(8, 1, 1)
        if k == 'number':
            return x * torch.tensor(2.0) + torch.tensor([1.0])
        if k == 'dtype':
            return x.to(self.b.weight.dtype).type_as(self.low.weight).to(self.plain)
        if k == 'device':
            return x.to(self.b.weight.device) + torch.zeros(8, 1, 1, device=x.device, dtype=x.dtype)
        if k == 'half':
            return x.to(torch.float64).to(torch.float32).contiguous(memory_format=torch.channels_last)
        if k == 'order':
            return x[:, self.rows]
        if k == 'flip':
            return x[:, :, self.rows] + x.index_select(3, self.rows)
        if k == 'positions':
            return x + torch.arange(x.shape[-1], device=x.device).view(1, 1, 1, -1)
        if k == 'numbered':
            return x * torch.arange(1, x.shape[1] + 1).view(-1, 1, 1)
        if k == 'count':
            return x / x.shape[1] + x.size(1)
        if k == 'weight':
            return x * self.b.weight.mean() + self.a.weight.shape[0]
        raise AssertionError(k)


@pytest.mark.parametrize(
    'kind',
    [
        'buffer',
        'plain',
        'both',
        'tensor',
        'number',
        'dtype',
        'device',
        'half',
        'order',
        'flip',
        'positions',
        'numbered',
        'count',
        'weight',
    ],
)
def test_tensors_that_a_network_holds(kind: str, tmp_path: Path) -> None:
    net = Kept(kind)
    names = set(vars(net)) | set(net.state_dict())
    to_the_end(net, tmp_path)
    assert set(vars(net)) | set(net.state_dict()) == names, 'the network of the user was changed'


def test_a_buffer_that_no_state_dict_holds_is_cut(tmp_path: Path) -> None:
    for kind, name in (('buffer', 'hidden'), ('plain', 'plain')):
        model, module = to_the_end(Kept(kind), tmp_path)
        assert not reasons(model)['a'] and getattr(module, name).numel() < 8


class Behind(Base):
    "What treats the answers behind the head, or mixes them."

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.prior, self.frequency = nn.Parameter(torch.randn(4)), torch.rand(1, 4)
        self.register_buffer('table', torch.randn(3, 4))
        self.norm, self.more, self.mix = nn.BatchNorm1d(4), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x).relu()).relu().mean((2, 3))
        y, k = self.head(x), self.kind
        if k == 'head + prior':
            return y + self.prior
        if k == 'prior + head':
            return self.prior + y
        if k == 'head * frequency':
            return y * self.frequency
        if k == 'norm':
            return self.norm(y)
        if k == 'norm * prior':
            return (self.norm(y) * self.prior).tanh() / 2 + 1
        if k == 'two heads':
            return (self.more(x) + y) / 2
        if k == 'maximum':
            return torch.maximum(self.more(x), y)
        if k == 'where':
            return torch.where(y > 0, y, self.prior)
        if k == 'table':
            return y + self.table[0]
        if k == 'constant':
            return y + torch.tensor([1.0, 2.0, 3.0, 4.0])
        if k == 'view':
            return y.view(-1, 4)
        if k == 'again':
            return y + self.mix(y)
        if k == 'softmax':
            return y * y.softmax(1)
        if k == 'centred':
            return y - y.mean(1, keepdim=True)
        if k == 'order':
            return y[:, [1, 0, 2, 3]]
        if k == 'log':
            return F.log_softmax(y, 1)
        raise AssertionError(k)


@pytest.mark.parametrize(
    'kind',
    [
        'head + prior',
        'prior + head',
        'head * frequency',
        'norm',
        'norm * prior',
        'two heads',
        'maximum',
        'where',
    ],
)
def test_what_treats_each_class_by_itself_is_cut_along(kind: str, tmp_path: Path) -> None:
    model, module = to_the_end(Behind(kind), tmp_path)
    assert module(PIXELS).shape == (2, 2)


@pytest.mark.parametrize(
    'kind', ['table', 'constant', 'view', 'again', 'softmax', 'centred', 'order', 'log']
)
def test_what_mixes_the_classes_is_refused_at_once(kind: str) -> None:
    with pytest.raises(ValueError, match='let the network end with'):
        modularize(Behind(kind), 4, example_input=X)


@fx.wrap
def closed(x: Tensor) -> Tensor:
    "A function that a library has closed to traces."
    return F.relu(x) * 2


class Looks(Base):
    "Operations that are left whole, and followed ones in unusual forms."

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.inorm = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.InstanceNorm2d(8)
        self.affine, self.sync = (
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.SyncBatchNorm(8),
        )
        self.spatial, self.rows = nn.Conv2d(2, 1, 3, padding=1), nn.LSTM(8, 8, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        k, (n, c, h, w) = self.kind, x.shape
        flat = x.flatten(2).transpose(1, 2)
        if k == 'cbam':
            both = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
            return x * self.spatial(both).sigmoid()
        if k == 'named result':
            return x * x.max(dim=1, keepdim=True).values.sigmoid()
        if k == 'einsum':
            return (
                x
                + torch.einsum('ncp,nqp->ncq', x.flatten(2), flat.transpose(1, 2)).mean(2)[..., None, None]
            )
        if k == '@':
            return (flat @ flat.transpose(1, 2) @ flat).transpose(1, 2).reshape(n, c, h, w)
        if k == 'std':
            return x / (x.std((2, 3), keepdim=True) + x.var(dim=1, keepdim=True) + 1)
        if k == 'where':
            return torch.where(x > 0.5, x, torch.zeros_like(x))
        if k == 'mha':
            return (
                self.attention(flat, flat, flat, need_weights=False)[0].transpose(1, 2).reshape(n, c, h, w)
            )
        if k == 'sdpa':
            return F.scaled_dot_product_attention(flat, flat, flat).transpose(1, 2).reshape(x.shape)
        if k == 'transposed':
            return self.up(x)
        if k == 'instance norm':
            return self.inorm(x)
        if k == 'affine':
            return self.affine(x).relu()
        if k == 'sync':
            return self.sync(x)
        if k == 'residual norm':
            return x + self.inorm(self.up(x)[:, :, ::2, ::2])
        if k == 'pointwise':
            return torch.maximum(x, x.erf()) + torch.lerp(x, x.sin(), 0.5)
        if k == 'assignment':
            frame = x.new_zeros((h, w))
            frame[1:-1, 1:-1] = 1
            return x * frame
        if k == 'closed':
            return closed(x)
        if k == 'lstm':
            return self.rows(flat)[0].transpose(1, 2).reshape(n, c, h, w)
        if k == 'expand':
            return x.mean((2, 3), keepdim=True).expand(-1, 8, -1, -1) + x
        if k == 'branch':
            if x.shape[-1] % 3:
                x = F.pad(x, (0, 1))
            return sum(piece for piece in x.chunk(3, 3))
        raise AssertionError(k)


LOOKS = [
    'cbam',
    'named result',
    'einsum',
    '@',
    'std',
    'where',
    'mha',
    'sdpa',
    'transposed',
    'instance norm',
    'affine',
    'sync',
    'residual norm',
    'pointwise',
    'branch',
    'assignment',
    'closed',
    'expand',
    'lstm',
]


@pytest.mark.parametrize('kind', LOOKS)
def test_networks_that_look(kind: str, tmp_path: Path) -> None:
    model, module = to_the_end(Looks(kind), tmp_path)
    if kind in ('instance norm', 'affine', 'sync', 'where', 'pointwise', 'branch', 'closed'):
        assert not reasons(model)['a']
    assert module.last.out_channels < 8


def test_the_table_names_what_holds_a_layer() -> None:
    model = modularize(Looks('mha'), 4, example_input=X)
    assert 'MultiheadAttention reads it' in str(mask_table(model))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Named(nn.Linear):
    pass


class Same(nn.Conv2d):
    "Pads by the size of its input, as TensorFlow does."

    def forward(self, x: Tensor) -> Tensor:
        pad = max(self.kernel_size[0] - 1, 0)
        if pad > 0:
            x = F.pad(x, [pad // 2, pad - pad // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Standardised(nn.Conv2d):
    "Its weight is computed from another."

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize('method', ['composable', 'mwt', 'moda'])
@pytest.mark.parametrize('kind', [OwnForward, Named])
def test_a_head_of_a_class_of_its_own(kind: type[nn.Module], method: str, tmp_path: Path) -> None:
    net = Base()
    net.head = kind(8, 4)
    model, module = to_the_end(net, tmp_path, method=method)
    assert model.head == 'head' and module(PIXELS).shape == (2, 2)


@pytest.mark.parametrize('method', ['composable', 'mwt', 'moda'])
def test_convolutions_of_a_class_of_its_own_are_cut(method: str, tmp_path: Path) -> None:
    net = Base()
    net.a, net.b = Same(8, 8, 3), Same(8, 8, 3, groups=8)
    model, module = to_the_end(net, tmp_path, method=method)
    assert not reasons(model)['a'] and 'Same' in type(model.plain().a).__name__
    net.a = Standardised(8, 8, 1)
    assert reasons(to_the_end(net, tmp_path)[0])['stem'].startswith('conv2d reads it')


class SideExit(nn.Module):
    "Answers twice while it is trained, in one of several ways."

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.a, self.b = (
            kind,
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
        )
        self.side, self.head = (
            nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4)),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Any:
        x = self.a(self.stem(x).relu()).relu()
        side = self.side(x) if self.training else None
        answer = self.head(self.b(x).relu().mean((2, 3)))
        if not self.training:
            return answer
        return dict(tuple=(answer, side), list=[answer, side])[self.kind]


@pytest.mark.parametrize('kind', ['tuple', 'list'])
def test_a_side_exit_is_kept_whole(kind: str, tmp_path: Path) -> None:
    model, module = to_the_end(SideExit(kind), tmp_path)
    found = reasons(model)
    assert 'side.0 runs in training only' in found['a'] and not found['stem'] and 'side.0' not in found
    assert not [name for name in module.state_dict() if name.startswith('side')]


@pytest.mark.slow
def test_inception_needs_large_images() -> None:
    net = models.inception_v3(weights=None, num_classes=4, init_weights=False)
    with pytest.raises(
        ValueError, match='not in training, with images of size .3, 75, 75.*aux_logits=False'
    ):
        modularize(net, 4, example_input=torch.randn(2, 3, 75, 75))


def test_what_a_file_cannot_hold_is_said_before_training() -> None:
    class Needs(Base):
        def middle(self, x: Tensor) -> Tensor:
            return x * x[x > 0].mean()

    class Draws(Base):
        def middle(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    hooked, pruned = Base(), Base()
    hooked.a.register_forward_hook(lambda layer, args, out: out * 2)
    pruned.a.register_buffer('kept', torch.ones(8))
    for net, says in (
        (Needs(), 'depends on the values'),
        (hooked, 'hook'),
        (pruned, 'a: this'),
        (Draws(), 'changes'),
    ):
        with pytest.raises(ValueError, match=says):
            modularize(net, 4, example_input=X)


class Does(Base):
    "Something in the middle."

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.gamma, self.branch = nn.Parameter(torch.zeros(8, 1, 1)), nn.Conv2d(8, 8, 1)

    def middle(self, x: Tensor) -> Tensor:
        return self.call(self, x)


NO_GRADIENT: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    'comparison': (lambda net, x: (x > 0).float(), 'to any masked layer: gt passes none on'),
    'places': (lambda net, x: x.argsort(1).float(), 'to any masked layer: argsort passes none on'),
    'detached': (lambda net, x: x.detach(), 'to any masked layer: detach passes none on'),
    'no derivative': (lambda net, x: x // 1, 'not in training.*floor_divide is not implemented'),
    'overwritten': (lambda net, x: x.exp().mul_(x).exp_().mul_(x), 'not in training.*inplace operation'),
}


@pytest.mark.parametrize('call, says', NO_GRADIENT.values(), ids=NO_GRADIENT)
def test_what_cannot_learn_is_refused_at_once(call: Callable, says: str) -> None:
    net = Does(call)
    net.b, net.last = nn.Identity(), nn.Identity()  # nothing is masked behind it
    with pytest.raises(ValueError, match=says):
        modularize(net, 4, example_input=X)


def test_a_gradient_that_some_layers_lack_is_enough(tmp_path: Path) -> None:
    "Attention that is not learned, say."
    to_the_end(Does(lambda net, x: x * (x > 0) + x.detach().sigmoid()), tmp_path)


def unlike(net: nn.Module, x: Tensor) -> Tensor:
    "A branch that begins as nothing, and is another one where a point stands in its place."
    y = net.branch(x)
    return x + net.gamma * (y.relu() if isinstance(net.branch, nn.Conv2d) else y - 1)


def test_fresh_weights_hide_nothing() -> None:
    with pytest.raises(ValueError, match='cannot be cut exactly: .*class of a layer'):
        modularize(Does(unlike), 4, 'mwt', example_input=X)


def test_zeros_that_make_nan_are_refused_at_once() -> None:
    net = Does(lambda net, x: net.branch(x) * net.branch(x).square().mean((2, 3), keepdim=True).rsqrt())
    with pytest.raises(ValueError, match='answers NaN where a channel is all zeros'):
        modularize(net, 4, example_input=X)


class Root(Base):
    "Takes numbers from 0 to 1 only."

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sqrt())


@pytest.mark.parametrize('method', ['composable', 'mwt', 'moda'])
def test_networks_for_numbers_from_0_to_1(method: str) -> None:
    model = modularize(Root(), 4, method, example_input=X)
    three_steps(model, PIXELS)
    module = extract(model, random_parts(model, 0.5), [2, 0])
    assert module(PIXELS).isfinite().all()


class Squeezed(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.b(self.a(self.stem(x).relu()).relu()).relu())
        return self.head(x.relu().mean((2, 3), keepdim=True).squeeze())


@pytest.mark.parametrize('method', ['composable', 'mwt', 'moda'])
def test_a_squeeze_never_takes_the_channels(method: str) -> None:
    model = modularize(Squeezed(), 4, method, example_input=X)
    module = extract(model, random_parts(model, None), [2, 0])  # one kernel a layer
    assert module.a.out_channels == 1 and module(X).shape == (2, 2)


def test_constant_sizes_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    "A rule of a user's may be wrong: its layer counts on eight channels."

    class Eight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 8, 8, 8)

    monkeypatch.setitem(RULES, Eight, RULES['contiguous'])
    net = Does(lambda net, x: net.eight(x))
    net.eight = Eight()
    with pytest.raises(ValueError, match='cannot be cut: it fails without some kernels .Given groups'):
        modularize(net, 4, example_input=X)


@pytest.mark.parametrize('kind', ['lstm', 'mha', 'cbam'])
def test_results_of_several_parts_are_no_obstacle_to_masks_behind_activations(
    kind: str, tmp_path: Path
) -> None:
    to_the_end(Looks(kind), tmp_path, method='moda')


# Names


class Calls(Base):
    "A layer or a buffer of some name."

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.called, self.kind = name, kind
        if kind == 'layer':
            self.add_module(name, nn.Conv2d(8, 8, 1))
        else:
            self.register_buffer(name, torch.rand(8, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        own = getattr(self, self.called)
        return own(x).relu() if self.kind == 'layer' else x * own


def test_names_that_modules_use_are_known() -> None:
    model = modularize(Base(), 4, example_input=X)
    module = extract(model, random_parts(model, 0.5), [0])
    own = {n for n in dir(module) if n[0] != '_' and not hasattr(nn.Module(), n)} - module._modules.keys()
    assert own <= set(OWN_ATTRIBUTES) and {'classes', 'signature'} <= own


@pytest.mark.parametrize('name, method', [
    *product([*OWN_ATTRIBUTES, 'normalised', 'net', 'masks', 'output'], ['composable']),
    *product(['point0', 'whole'], ['moda'])])
def test_names_are_no_obstacle_or_refused_at_once(name: str, method: str, tmp_path: Path) -> None:
    for kind in ('layer', 'buffer'):
        net = Calls(name, kind)
        taken = name in ('pixel_mean', 'pixel_std', 'normalised', 'signature')
        if taken or kind == 'buffer' and name in OWN_ATTRIBUTES:
            with pytest.raises(ValueError, match=f"something called '{name}'"):
                modularize(net, 4, method, example_input=X)
        else:
            to_the_end(net, tmp_path, method=method)


def test_steps_name_operations_of_every_spelling() -> None:
    targets = {s['target'] for s in describe_steps(Looks('cbam').eval(), X)}
    assert {'max', 'operator.getitem', 'torch.cat'} <= targets
