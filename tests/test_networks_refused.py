"What is no network, or cannot be trained or cut, is refused before any work; the error says what to pass."

from __future__ import annotations
import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
import torch.nn.utils as utils
from odd_networks import (
    Answers,
    Between,
    Encoder,
    EncoderMixed,
    OwnConv,
    Remembers,
    SharedNorm,
    Small,
    Viewed,
    WithTensors,
    changed,
    few_images,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from mwt.core.nets import input_dtype
from mwt.measure import evaluate, profile
from mwt.methods.base import METHODS
from mwt.methods.modular import ModularModel, fixed_masks, modularize, trial_masks
from mwt.modules.compose import add_head, compose
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import load_module, save_module
from mwt.modules.parts import Parts
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import fit

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore:.*hardly activates:UserWarning'),
    pytest.mark.filterwarnings('ignore:torch.quantize_per:UserWarning'),
]
every_method = pytest.mark.parametrize('method', METHODS)


def of_these(kinds: Iterable[str], *fast: str) -> list[Any]:
    "All of them; the ones that are not named take long and are tried in the slow tests."
    return [k if k in fast else pytest.param(k, marks=pytest.mark.slow) for k in kinds]


DATA = few_images()
X = torch.zeros(2, 3, 16, 16)


def parts_of(model: ModularModel) -> Parts:
    "Parts that keep about half of the kernels."
    masks = torch.cat(list(trial_masks(model.masks.coupled_sets()).values())).expand(model.n_classes, -1)
    layers = len(model.kernels)
    return Parts(
        list(model.classes),
        model.kernels,
        masks.double(),
        masks,
        torch.full((model.n_classes, layers), 0.9),
        torch.ones(model.n_classes),
        samples=2,
    )


def whole_way(net: nn.Module, method: str, folder: Path) -> ModularModel:
    "Modularized, trained, extracted, stored; the module computes what the masked model computes."
    model = modularize(net, 4, method, example_input=X)
    fit(model, DATA, 2, lr=0.02, show_progress=False)
    save_checkpoint(model, folder / 'model.safetensors')
    again = modularize(net, 4, method, example_input=X)
    load_checkpoint(again, folder / 'model.safetensors')
    images, pixels = (next(iter(split))[0] for split in (DATA.test, DATA.test.pixels()))
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))
    parts = parts_of(model)
    module = extract(model, parts, ['0', '2'])
    with torch.no_grad(), fixed_masks(model, parts.split(parts.kept[0])):
        masked = model(images)
    torch.testing.assert_close(
        module(pixels), masked[:, [0, 2]], rtol=1e-4, atol=1e-4 * masked.abs().max().item()
    )
    stored = load_module(save_module(module, folder / 'module.safetensors'))
    with torch.no_grad():
        assert torch.equal(stored(pixels), module(pixels))
    return model


# What is no network


class Holder:
    "A library's object with a network inside."

    def __init__(self) -> None:
        self.model = Small()


NO_NETWORKS: dict[str, tuple[Any, str]] = {
    'nothing': (None, 'not None'),
    'number': (3, 'not 3'),
    'name': ('resnet18', "not 'resnet18'; make the network first"),
    'path': (Path('net.pt'), "not 'net.pt'; make the network first"),
    'class': (Small, r'the class Small; make a network of it first: Small\(...\)'),
    'function': (torch.relu, 'the function relu; call it'),
    'partial': (lambda x: x, 'the function <lambda>; call it'),
    'two networks': ((Small(), Small()), '2 things in a tuple; pass one network at a time'),
    'list': ([Small()], '1 things in a list; pass one network at a time'),
    'dict of networks': (dict(a=Small()), '1 things in a dict; pass one network at a time'),
    'state dict': (Small().state_dict(), r'a state dict; load it into a network'),
    'tensor': (torch.zeros(2), 'an object of type Tensor'),
    'data': (DATA, 'an object of type ImageData'),
    'wrapper': (Holder(), 'a Holder; pass its .model'),
}

MODULAR = modularize(Small(), 4, example_input=X)
PARTS = parts_of(MODULAR)
USES: dict[str, Callable[[Any], Any]] = {
    'modularize': lambda net: modularize(net, 4, example_input=X),
    'fit': lambda net: fit(net, DATA, 1, show_progress=False),
    'evaluate': lambda net: evaluate(net, DATA.test),
    'profile': lambda net: profile(net, repeats=1),
    'decompose': lambda net: decompose(net, DATA.train, show_progress=False),
    'extract': lambda net: extract(net, PARTS, ['0']),
}


@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('thing, says', NO_NETWORKS.values(), ids=NO_NETWORKS)
def test_no_network(thing: Any, says: str, use: str) -> None:
    with pytest.raises(TypeError, match=f'model must be a network.*{says}'):
        USES[use](thing)


class TwoInputs(Small):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


class ByName(Small):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return super().forward(x * scale)


class NoInput(Small):
    def forward(self) -> Tensor:
        return super().forward(torch.zeros(1, 3, 8, 8))


class WithDefault(Small):
    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return super().forward(x if y is None else x + y)


class AnyNumber(Small):
    def forward(self, *images: Tensor) -> Tensor:
        return super().forward(images[0])


TAKES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    'two inputs': (TwoInputs, 'needs the inputs x, y; it must take one batch'),
    'one by name': (ByName, 'needs the inputs x, scale; it must take one batch'),
    'none': (NoInput, 'takes no input; it must take one batch'),
    'list of layers': (lambda: nn.ModuleList([Small()]), 'ModuleList has no forward pass'),
    'dict of layers': (lambda: nn.ModuleDict(dict(a=Small())), 'ModuleDict has no forward pass'),
}


@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('make, says', TAKES.values(), ids=TAKES)
def test_inputs(make: Callable, says: str, use: str) -> None:
    with pytest.raises(ValueError, match=says):
        USES[use](make())


def test_inputs_with_defaults(tmp_path: Path) -> None:
    whole_way(WithDefault(), 'composable', tmp_path)
    with pytest.raises(ValueError, match=r'takes any number of inputs \(\*images\)'):
        modularize(AnyNumber(), 4)


Named = namedtuple('Named', 'logits aux')
ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    'tuple': (lambda y: (y, y), 'a tuple of 2'),
    'tuple of one': (lambda y: (y,), 'a tuple of 1'),
    'list': (lambda y: [y], 'a list of 1'),
    'named tuple': (lambda y: Named(y, y), 'a Named of 2'),
    'dict': (lambda y: dict(logits=y), r"a dict with the keys \['logits'\]"),
    'ordered': (lambda y: OrderedDict(logits=y), r"a OrderedDict with the keys \['logits'\]"),
    'nothing': (lambda y: None, 'nothing'),
    'number': (lambda y: 1.0, 'a float'),
    'map': (lambda y: y[:, :, None, None], r'a tensor of shape \(\d+, 4, 1, 1\).*flatten\(1\)'),
    'labels': (lambda y: y.argmax(1), r'a tensor of shape \(\d+,\)'),
}


@pytest.mark.parametrize('use', ['modularize', 'fit', 'evaluate'])
@pytest.mark.parametrize('change, says', ANSWERS.values(), ids=ANSWERS)
def test_answers(change: Callable, says: str, use: str) -> None:
    with pytest.raises(ValueError, match=f'Answers answers with {says}'):
        USES[use](Answers(change))


@pytest.mark.parametrize(
    'wrong, error, says',
    [
        ('32x32', TypeError, 'not a str'),
        ([3, 16, 16], TypeError, 'not a list'),
        (torch.zeros(3, 16, 16), ValueError, r'not a tensor of shape \(3, 16, 16\)'),
        (torch.zeros(1, 4, 16, 16), ValueError, 'accepted no input'),
    ],
    ids=['text', 'shape', 'one image', 'channels'],
)
def test_example_inputs(wrong: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        modularize(Small(), 4, example_input=wrong)


# Wrapped networks


class DistributedDataParallel(nn.Module):
    "Stands for PyTorch's, which needs several processes."

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def quantized() -> nn.Module:
    net = nn.Sequential(quantization.QuantStub(), Small(), quantization.DeQuantStub()).eval()
    net.qconfig = quantization.get_default_qconfig('fbgemm')
    quantization.prepare(net, inplace=True)
    net(X)
    return quantization.convert(net)


def prepared() -> nn.Module:
    net = Small().train()
    net.qconfig = quantization.get_default_qat_qconfig('fbgemm')
    return quantization.prepare_qat(net)


WRAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    'DataParallel': (lambda: nn.DataParallel(Small()), 'pass the network inside, model.module'),
    'DistributedDataParallel': (lambda: DistributedDataParallel(Small()), 'model.module'),
    'averaged': (lambda: AveragedModel(Small()), 'pass the network inside, model.module'),
    'compiled': (lambda: torch.compile(Small()), 'pass the network that was compiled, model._orig_mod'),
    'scripted': (lambda: torch.jit.script(Small().eval()), 'pass the network that was scripted or traced'),
    'traced': (lambda: torch.jit.trace(Small().eval(), X), 'pass the network that was scripted or traced'),
    'exported': (
        lambda: torch.export.export(Small().eval(), (X,)).module(),
        'pass the network that was exported',
    ),
    'quantized': (quantized, r'0 \(Quantize\) is quantized or prepared for it; pass the network as it was'),
    'dynamic': (
        lambda: quantization.quantize_dynamic(Small(), {nn.Linear}),
        r'head \(Linear\) is quantized',
    ),
    'on meta': (lambda: Small().to('meta'), 'a.weight is on the device meta'),
    'lazy': (
        changed(lambda n: setattr(n, 'b', nn.LazyConv2d(8, 3))),
        r'b \(LazyConv2d\) is not initialised',
    ),
    'lazy head': (changed(lambda n: setattr(n, 'head', nn.LazyLinear(4))), r'head \(LazyLinear\) is not'),
    'lazy norm': (changed(lambda n: setattr(n, 'norm_b', nn.LazyBatchNorm2d())), 'norm_b'),
    'complex': (
        changed(lambda n: setattr(n, 'b', nn.Conv2d(8, 8, 3, dtype=torch.complex64))),
        'b.weight is made of',
    ),
    'NaN': (changed(lambda n: nn.init.constant_(n.b.weight, torch.nan)), 'b.weight holds NaN'),
    'infinite': (changed(lambda n: n.norm_b.running_var.fill_(torch.inf)), 'norm_b.running_var holds NaN'),
}


@pytest.mark.parametrize('use', ['modularize', 'fit'])
@pytest.mark.parametrize('make, says', WRAPPED.values(), ids=WRAPPED)
def test_wrapped(make: Callable, says: str, use: str) -> None:
    with pytest.raises(ValueError, match=says):
        USES[use](make())


@pytest.mark.parametrize('use', ['decompose', 'extract'])
def test_wrapped_later(use: str) -> None:
    "A modular model goes into a wrapper too, while it is trained."
    with pytest.raises(ValueError, match='pass the network inside, model.module'):
        USES[use](nn.DataParallel(MODULAR))


@pytest.mark.parametrize('wrap', [nn.DataParallel, AveragedModel, torch.jit.script])
def test_wrapped_networks_are_judged(wrap: Callable) -> None:
    net = Small().eval()
    with torch.no_grad():  # as it answers at random, it gets some images right
        net.head.bias[0] += 9
    assert evaluate(wrap(net), DATA.test) == evaluate(net, DATA.test) == 0.25


INSIDE: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    'DataParallel': (nn.DataParallel, r'b is wrapped \(DataParallel\).*model.b.module'),
    'scripted': (torch.jit.script, 'b is wrapped'),
    'compiled': (torch.compile, r'b is wrapped \(OptimizedModule\).*model.b._orig_mod'),
}


@pytest.mark.parametrize('wrap, says', INSIDE.values(), ids=INSIDE)
def test_wrapped_inside(wrap: Callable, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        modularize(changed(lambda n: setattr(n, 'b', wrap(n.b)))(), 4)


def test_prepared_for_quantization() -> None:
    with pytest.raises(ValueError, match=r'a \(Conv2d\) is quantized or prepared'):
        modularize(prepared(), 4)


def test_compiled_in_place_and_symbolically_traced() -> None:
    net = Small()
    net.compile()
    for again in (net, torch.fx.symbolic_trace(Small())):
        modularize(again, 4, example_input=X)


# Weights that two layers share, or that are computed

SHARED: dict[str, tuple[Callable[[Small], Any], str]] = {
    'two convolutions': (
        lambda n: setattr(n, 'b', tied_to(n)),
        r'a2.weight and b.weight|b.weight and a2.weight',
    ),
    'two norms': (
        lambda n: setattr(n.norm_b, 'weight', n.norm_a.weight),
        'norm_a.weight and norm_b.weight',
    ),
    'biases': (lambda n: setattr(n.b, 'bias', n.a.bias), 'a.bias and b.bias are the same tensor'),
    'bias and norm': (lambda n: setattr(n.norm_b, 'bias', n.b.bias), 'b.bias'),
    'statistics': (lambda n: setattr(n.norm_b, 'running_mean', n.norm_a.running_mean), 'running_mean'),
    'memory': (lambda n: setattr(n.norm_b.weight, 'data', n.norm_a.weight.data), 'norm_b.weight'),
    'head': (lambda n: setattr(n, 'other', linear_tied_to(n.head)), 'head.weight and other.weight'),
    'two names in a layer': (lambda n: setattr(n.b, 'kernel', n.b.weight), 'b.weight and b.kernel'),
}


def tied_to(net: Small) -> nn.Conv2d:
    net.a2 = nn.Conv2d(8, 8, 3, padding=1)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.weight = net.a2.weight
    return conv


def linear_tied_to(head: nn.Linear) -> nn.Linear:
    linear = nn.Linear(8, 4, bias=False)
    linear.weight = head.weight
    return linear


@pytest.mark.parametrize('change, says', SHARED.values(), ids=SHARED)
def test_shared_weights(change: Callable, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        modularize(changed(change)(), 4, example_input=X)


FOLD = r"b: its weight is computed anew at each call .* fold it first with torch\.nn\.utils\."
COMPUTED: dict[str, tuple[Callable[[Small], Any], str]] = {
    'weight norm': (
        lambda n: parametrizations.weight_norm(n.b),
        FOLD + 'parametrize.remove_parametrizations',
    ),
    'old weight norm': (lambda n: utils.weight_norm(n.b), FOLD + 'remove_weight_norm'),
    'spectral norm': (lambda n: parametrizations.spectral_norm(n.b), FOLD + 'parametrize'),
    'old spectral norm': (lambda n: utils.spectral_norm(n.b), FOLD + 'remove_spectral_norm'),
    'own': (lambda n: parametrize.register_parametrization(n.b, 'weight', nn.Tanh()), FOLD + 'parametrize'),
    'orthogonal head': (lambda n: parametrizations.orthogonal(n.head), 'head: its weight is computed'),
    'pruned': (lambda n: prune.l1_unstructured(n.b, 'weight', 0.3), FOLD + 'prune.remove'),
    'pruned kernels': (lambda n: prune.ln_structured(n.b, 'weight', 0.3, 2, 0), FOLD + 'prune.remove'),
    'pruned twice': (
        lambda n: [prune.random_unstructured(n.b, 'weight', 0.3) for _ in range(2)],
        FOLD + 'prune',
    ),
    'pruned bias': (
        lambda n: prune.random_unstructured(n.norm_a, 'bias', 0.3),
        r"norm_a: its bias .*'bias'\)",
    ),
}
FOLDED: dict[str, Callable[[Small], Any]] = {
    'weight norm': lambda n: parametrize.remove_parametrizations(n.b, 'weight'),
    'old weight norm': lambda n: utils.remove_weight_norm(n.b),
    'old spectral norm': lambda n: utils.remove_spectral_norm(n.b),
    'pruned': lambda n: prune.remove(n.b, 'weight'),
}


@pytest.mark.parametrize('kind', COMPUTED)
def test_computed_weights(kind: str) -> None:
    change, says = COMPUTED[kind]
    net = changed(change)()
    with pytest.raises(ValueError, match=says):
        modularize(net, 4, example_input=X)
    if kind not in FOLDED:
        return
    FOLDED[kind](net)  # as the error says
    modularize(net, 4, example_input=X)


# What a trace does not see

HOOKS: dict[str, tuple[Callable[[Small], Any], str]] = {
    'of a layer': (lambda n: n.b.register_forward_hook(lambda m, a, y: y + 1), 'b: a forward hook changes'),
    'before a layer': (
        lambda n: n.b.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
        'b: a forward hook',
    ),
    'of the network': (
        lambda n: n.register_forward_hook(lambda m, a, y: 2 * y),
        'model: a forward hook changes',
    ),
    'before the network': (
        lambda n: n.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
        'model: a forward hook',
    ),
    'in place': (
        lambda n: n.norm_a.register_forward_hook(lambda m, a, y: y.add_(1)),
        'norm_a: a forward hook',
    ),
    'forward of a layer': (
        lambda n: setattr(n.b, 'forward', lambda x: 2 * x),
        'b: its forward pass was replaced',
    ),
    'forward of the network': (
        lambda n: setattr(n, 'forward', lambda x: n.head(x.mean((2, 3)))),
        'was replaced',
    ),
}


@pytest.mark.parametrize('change, says', HOOKS.values(), ids=HOOKS)
def test_hooks_that_change_something(change: Callable, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        modularize(changed(change)(), 4, example_input=X)


def test_hooks_that_look(tmp_path: Path) -> None:
    seen: list[int] = []
    net = Small()
    net.b.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    whole_way(net, 'composable', tmp_path)
    assert seen and len(net.b._forward_hooks) == 1


INLINE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    'ReLU': lambda net, x: nn.ReLU()(x),
    'ReLU in place': lambda net, x: nn.ReLU(inplace=True)(x),
    'pooling': lambda net, x: nn.MaxPool2d(2)(x),
    'several': lambda net, x: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Identity())(x),
    'upsampling': lambda net, x: nn.Upsample(scale_factor=2)(x),
}


@every_method
@pytest.mark.parametrize('kind', of_these(INLINE, 'ReLU', 'several'))
def test_layers_made_in_forward(kind: str, method: str, tmp_path: Path) -> None:
    whole_way(Between(INLINE[kind]), method, tmp_path)


LAYERS = [nn.Conv2d(8, 8, 1)]
FOREIGN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    'convolution': (
        lambda net, x: nn.Conv2d(8, 8, 1)(x),
        'Between calls a Conv2d that is no part of the network',
    ),
    'norm': (lambda net, x: nn.BatchNorm2d(8)(x), 'calls a BatchNorm2d that is no part'),
    'several': (
        lambda net, x: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1))(x),
        'calls a Sequential that is no',
    ),
    'kept in a list': (lambda net, x: LAYERS[0](x), r'calls a Conv2d .* in nn.ModuleList or nn.ModuleDict'),
    'dropout': (lambda net, x: nn.Dropout()(x), 'makes a Dropout, which drops values in use too'),
}


@pytest.mark.parametrize('use, says', FOREIGN.values(), ids=FOREIGN)
def test_layers_that_are_no_part_of_the_network(use: Callable, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        modularize(Between(use), 4, example_input=X)


def after(*statements: Callable[[Tensor], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    "Statements whose results nobody uses."

    def use(net: nn.Module, x: Tensor) -> Tensor:
        for statement in statements:
            statement(x)
        return x

    return use


STATEMENTS: dict[str, Callable[[], nn.Module]] = {
    'x.relu_()': lambda: Between(after(lambda x: x.relu_())),
    'x.clamp_(0, 6)': lambda: Between(after(lambda x: x.clamp_(0, 6))),
    'x.add_(1)': lambda: Between(after(lambda x: x.add_(1))),
    'F.relu(x, inplace=True)': lambda: Between(after(lambda x: F.relu(x, inplace=True))),
    'torch.relu_(x)': lambda: Between(after(torch.relu_)),
    'self.relu(x)': lambda: Between(lambda net, x: (net.extra(x), x)[1], nn.ReLU(inplace=True)),
    'y.add_(x); y.relu_()': lambda: Between(
        lambda net, x: (lambda y: (y.add_(x), y.relu_(), y)[2])(net.extra(x)), nn.Conv2d(8, 8, 1)
    ),
}


@every_method
@pytest.mark.parametrize('kind', of_these(STATEMENTS, 'x.relu_()', 'self.relu(x)'))
def test_statements_whose_result_nobody_uses(kind: str, method: str, tmp_path: Path) -> None:
    whole_way(STATEMENTS[kind](), method, tmp_path)


def test_what_a_network_remembers_is_no_obstacle(tmp_path: Path) -> None:
    for method in ('composable', 'moda'):
        whole_way(Remembers(), method, tmp_path)
    net = Remembers()
    net.train()(X)  # the result has a history, which cannot be copied
    modularize(net, 4, example_input=X)


def test_layer_asked_for_its_class() -> None:
    "A point has taken the place of the layer, so the network would do something else."

    def use(net: nn.Module, x: Tensor) -> Tensor:
        return torch.relu(x) if isinstance(net.b, nn.Conv2d) else x - 1

    net = Between(use)
    with pytest.raises(ValueError, match='cannot be cut exactly.*asks for the class of a layer'):
        modularize(net, 4, 'mwt', example_input=X)


# Several names


@every_method
@pytest.mark.parametrize('kind', [Encoder, EncoderMixed])
def test_layers_under_two_names(kind: type, method: str, tmp_path: Path) -> None:
    model = whole_way(kind(), method, tmp_path).eval()
    x = torch.randn(2, 3, 16, 16)
    off = {name: torch.zeros(k) for name, k in model.kernels.items()}
    with torch.no_grad(), fixed_masks(model, off):
        without = model(x)
    with torch.no_grad():
        assert (model(x) - without).abs().max() > 1e-3  # masks act
    names = [n for n, _ in model.plain().named_modules(remove_duplicate=False)]
    assert names == [n for n, _ in kind().named_modules(remove_duplicate=False)]


def test_filter_sees_all_names() -> None:
    for prefix in ('conv', 'body.0', 'blocks.0.0'):
        model = modularize(Encoder(), 4, example_input=X, filter_fn=lambda layer, name: name != prefix)
        assert 'conv' not in model.kernels and 'conv2' in model.kernels


@pytest.mark.parametrize('dense', [False, True])
def test_smaller_model_under_two_names(dense: bool) -> None:
    model = modularize(Encoder(), 4, example_input=X, dense=dense).eval()
    gates = model.masks.gates.gates
    with torch.no_grad():
        gates[:, ::2] = 0
    small, origins = model.smaller()
    x, targets = torch.randn(2, 3, 16, 16), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x, targets), model(x, targets))
    if dense: origins = {f'net.{name}' for name in small.masks.inner.grids}
    assert {'net.body.0.weight', 'net.conv.weight'} <= set(origins)


def test_shared_norm(tmp_path: Path) -> None:
    whole_way(SharedNorm(), 'composable', tmp_path)
    for method, says in (('mwt', 'its norm norm_a runs more than once'), ('moda', 'no ReLU of it has')):
        with pytest.raises(ValueError, match=f'no layer is left to mask.*{says}'):
            modularize(SharedNorm(), 4, method, example_input=X)


# Frozen layers

FROZEN: dict[str, Callable[[str], bool]] = {
    'first': lambda name: name.startswith('a.'),
    'norms': lambda name: name.startswith('norm'),
    'all but the head': lambda name: not name.startswith('head'),
    'head': lambda name: name.startswith('head'),
    'biases': lambda name: name.endswith('bias'),
}


@every_method
@pytest.mark.parametrize('part', of_these(FROZEN, 'first', 'all but the head'))
def test_frozen_weights_do_not_move(part: str, method: str, tmp_path: Path) -> None:
    net, frozen = Small(), FROZEN[part]
    for name, p in net.named_parameters():
        p.requires_grad_(not frozen(name))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    model = modularize(net, 4, method, example_input=X)
    fit(model, DATA, 2, lr=0.05, weight_decay=0.1, show_progress=False)
    now, module = dict(model.plain().named_parameters()), extract(model, parts_of(model), ['0', '2'])
    for name, p in now.items():
        assert torch.equal(p, before[name]) == frozen(name), name
        assert p.requires_grad != frozen(name), name
    slim, copied, both = (
        model.cut(parts_of(model).split(parts_of(model).kept[0])),
        copy.deepcopy(model),
        compose([module]),
    )
    for other in (slim, module, add_head(module), copied.plain()):
        assert all(p.requires_grad != frozen(n) for n, p in other.named_parameters() if 'new_head' not in n)
    assert all(p.requires_grad != frozen(n.removeprefix('part0.')) for n, p in both.named_parameters())
    if smaller := model.smaller():
        plain = smaller[0].plain()
        assert all(p.requires_grad != frozen(n) for n, p in plain.named_parameters())


def test_statistics_of_frozen_norms_follow_the_images() -> None:
    "As in PyTorch, where freezing concerns weights, and the mode statistics."
    net = Small()
    net.norm_a.requires_grad_(False)
    model = modularize(net, 4, example_input=X)
    fit(model, DATA, 2, show_progress=False)
    assert not torch.equal(model.plain().norm_a.running_mean, net.norm_a.running_mean)


@pytest.mark.parametrize('method', [None, 'composable', 'moda'])
def test_nothing_to_train(method: str | None) -> None:
    net: nn.Module = Small().requires_grad_(False)
    if method:
        net = modularize(net, 4, method, example_input=X)
    with pytest.raises(ValueError, match='has nothing to train: all its weights are frozen'):
        fit(net, DATA, 1, show_progress=False)


# Types of numbers


@every_method
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('how', of_these(['alone', 'example', 'later'], 'example'))
def test_types_are_kept(dtype: torch.dtype, how: str, method: str, tmp_path: Path) -> None:
    net = Small() if how == 'later' else Small().to(dtype)
    model = modularize(net, 4, method, example_input=X.to(dtype) if how == 'example' else None)
    model = model.to(dtype)
    assert model.example().dtype == input_dtype(model) == dtype
    parts = decompose(model, DATA.train, show_progress=False)
    module = extract(model, parts, ['0', '2'])
    stored = load_module(save_module(module, tmp_path / 'module.safetensors'))
    for made in (
        module,
        stored,
        extract(model, parts, ['0', '2'], fuse=True),
        compose([module]),
        add_head(module),
    ):
        assert {p.dtype for p in made.parameters()} == {dtype}
    with torch.no_grad():
        pixels = model.example().sigmoid()
        assert torch.equal(stored(pixels), module(pixels))
    assert evaluate(stored, DATA.test) == evaluate(module, DATA.test)
    with pytest.raises(
        ValueError, match=f'weights are {dtype}, and training is done in float32; call model.float'
    ):
        fit(model, DATA, 1, show_progress=False)


def test_example_of_another_type() -> None:
    with pytest.raises(ValueError, match='accepted no input of the sizes'):
        modularize(Small().half(), 4, example_input=X)


@every_method
def test_buffers_follow(method: str, tmp_path: Path) -> None:
    "Buffers of any type survive a cut and a smaller model, and move with the model."
    model = whole_way(WithTensors(), method, tmp_path)
    plain, net = model.plain(), WithTensors()
    for name in ('mean', 'flags', 'table'):
        assert torch.equal(getattr(plain, name), getattr(net, name))
    model = model.double().eval()
    with torch.no_grad():
        model.plain().eval()(model.example())
    extract(model, parts_of(model), ['0'])


# Views

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    'x.view(x.size(0), -1)': lambda x: x.view(x.size(0), -1),
    'x.view(x.shape[0], -1)': lambda x: x.view(x.shape[0], -1),
    'x.view(x.size()[0], -1)': lambda x: x.view(x.size()[0], -1),
    'x.view(-1, 2048)': lambda x: x.view(-1, 2048),
    'x.view(b, c, -1)': lambda x: x.view(x.size(0), x.size(1), -1).flatten(1),
    'x.reshape(x.size(0), -1)': lambda x: x.reshape(x.size(0), -1),
    'torch.reshape': lambda x: torch.reshape(x, (x.shape[0], -1)),
    'unflatten': lambda x: x.unflatten(1, (2, 4)).flatten(1),
    'contiguous': lambda x: x.contiguous().view(x.size(0), -1),
}


@pytest.mark.parametrize('kind', of_these(VIEWS, 'x.view(x.size(0), -1)', 'unflatten'))
def test_views_are_trained(kind: str, tmp_path: Path) -> None:
    fit(Viewed(VIEWS[kind]), DATA, 1, show_progress=False)
    for method in ('composable', 'moda'):
        whole_way(Viewed(VIEWS[kind]), method, tmp_path)


def test_weights_are_viewed() -> None:
    net = Small()
    net.a = OwnConv(3, 8, 3)
    fit(net, DATA, 1, show_progress=False)
    fit(modularize(net, 4, example_input=X), DATA, 2, show_progress=False)


# Other ranks


@pytest.mark.parametrize('kind', [nn.Conv1d, nn.Conv3d])
def test_other_ranks_are_trained(kind: type) -> None:
    "Also five-dimensional weights, which have no channels-last order."
    net = Small()
    net.unused = kind(8, 8, 3)
    fit(net, DATA, 1, show_progress=False)


def at_depth(net: nn.Module, x: Tensor) -> Tensor:
    "Channels as two channels of four slices, and back."
    return net.extra(x.reshape(x.shape[0], 2, 4, *x.shape[2:])).reshape(x.shape)


def along_pixels(net: nn.Module, x: Tensor) -> Tensor:
    return net.extra(x.flatten(2)).view(x.shape)


def along_channels(net: nn.Module, x: Tensor) -> Tensor:
    "Attention as in ECA: a convolution over the means of the channels."
    means = net.extra(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
    return x * means.sigmoid()[:, :, None, None]


VOLUMES: dict[str, Callable[[], nn.Module]] = {
    'used': lambda: Between(at_depth, nn.Conv3d(2, 2, 3, padding=1)),
    'transposed': lambda: Between(at_depth, nn.ConvTranspose3d(2, 2, 1)),
    'subclass': lambda: Between(at_depth, type('Deep', (nn.Conv3d,), {})(2, 2, 1)),
    'unused': lambda: Between(lambda net, x: x, nn.Conv3d(2, 2, 1)),
}


@every_method
@pytest.mark.parametrize('kind', VOLUMES)
def test_convolutions_over_volumes_are_refused_by_name(kind: str, method: str) -> None:
    with pytest.raises(ValueError, match=r'extra \((Conv3d|ConvTranspose3d|Deep)\) runs over volumes'):
        modularize(VOLUMES[kind](), 4, method, example_input=X)


def test_a_function_over_volumes_is_refused_by_name() -> None:
    def through_a_volume(net: nn.Module, x: Tensor) -> Tensor:
        return F.conv3d(x.unsqueeze(2), net.b.weight[:, :, None], padding=(0, 1, 1)).squeeze(2)

    net = Between(through_a_volume)
    with pytest.raises(ValueError, match='the operation conv3d cannot be stored'):
        modularize(net, 4, example_input=X)


LINES = {
    'along pixels': (along_pixels, nn.Conv1d(8, 8, 3, padding=1)),
    'along channels': (along_channels, nn.Conv1d(1, 1, 3, padding=1)),
}


@every_method
@pytest.mark.parametrize('kind', LINES)
def test_convolutions_over_lines_are_left_whole(kind: str, method: str, tmp_path: Path) -> None:
    use, extra = LINES[kind]
    model = whole_way(Between(use, copy.deepcopy(extra)), method, tmp_path)
    [reason] = [i.reason for i in model.channels.infos if i.name == 'a']
    assert reason == 'extra: Conv1d reads it'
