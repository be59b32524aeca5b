"The slim network computes what the masked model computes, for all networks and methods, also from a file."
from __future__ import annotations
import copy
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any
import pytest
import torch
import torchvision
from networks import NETWORKS, calibrate, lively, random_parts
from shallow import small_resnet
from torch import Tensor, nn
from mwt.core.signature import weights_of
from mwt.channels.cut import slice_channels_
from mwt.methods.base import METHODS
from mwt.methods.modular import ModularModel, fixed_masks, modularize, plain
from mwt.methods.points import mask_points
from mwt.modules.compose import add_head, compose
from mwt.modules.extract import check_exact, extract
from mwt.modules.module import SlimModule, load_module, save_module
from mwt.modules.parts import Parts, union_masks
from mwt.modules.speed import fold_norms, joining_order, round_masks
from mwt.networks import create_model


def n_params(net: nn.Module) -> int: return sum(p.numel() for p in net.parameters())


def count(net: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in net.modules())


def cases(networks: Iterable[str], all_methods: Container[str]) -> list[Any]:
    "Every network with the default method, and some with all; what is left is slow."
    pairs = [(n, m) for n in networks for m in METHODS]
    slow = {pair: pair[1] != 'composable' and pair[0] not in all_methods for pair in pairs}
    return [pytest.param(p, id='-'.join(p), marks=[pytest.mark.slow] * slow[p]) for p in pairs]


@pytest.fixture(scope='module', params=cases(NETWORKS, all_methods=('simcnn', 'resnet18')))
def model(request: pytest.FixtureRequest) -> ModularModel:
    torch.manual_seed(0)
    network, method = request.param
    return modularize(lively(NETWORKS[network]()), n_classes=10, method=method).eval()


def masked_logits(model: ModularModel, parts: Parts, classes: list[int], x: Tensor) -> Tensor:
    with torch.no_grad(), fixed_masks(model, union_masks(parts, classes)): return model(x)[:, classes]


PARTS = [ # fraction of kernels, classes
    pytest.param(.3, [4], id='a third, one class'),
    pytest.param(.3, [7, 2], id='a third, two', marks=pytest.mark.slow),
    pytest.param(.7, [*range(10)], id='most, ten'),
    pytest.param(None, [7, 2], id='one kernel a layer, two')]


@pytest.mark.parametrize('fraction, classes', PARTS)
def test_slim_equals_masked(
    model: ModularModel, fraction: float | None, classes: list[int], tmp_path: Path
) -> None:
    parts = random_parts(model, fraction, seed=len(classes))
    calibrate(model, union_masks(parts, classes))
    model = copy.deepcopy(model).double()               # where rounding errors cannot hide a mistake
    module = extract(model, parts, classes)
    x = torch.randn(8, *model.input_shape, generator=torch.Generator().manual_seed(1)).double()
    expected = masked_logits(model, parts, classes, x)
    with torch.no_grad(): slim = module(x)
    # one neuron behind a ReLU may be silent
    assert fraction is None or expected.std(0).max() > 2e-4, 'the comparison would be empty'
    assert torch.allclose(slim, expected, rtol=0, atol=1e-9), (slim - expected).abs().max()
    loaded = load_module(save_module(module, tmp_path/'module.safetensors'))
    with torch.no_grad(): assert torch.equal(loaded(x), slim)
    assert loaded.classes == [parts.classes[c] for c in classes]


def test_slim_is_smaller_and_ordinary(model: ModularModel) -> None:
    module = extract(model, random_parts(model, .3), [0, 1])
    assert n_params(module) < n_params(plain(model))
    assert not mask_points(module) and weights_of(module).keys() <= plain(model).state_dict().keys()
    heads = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert heads[-1].out_features == 2


# every kind of cut, on a network with shortcuts and one with a wide head
@pytest.mark.parametrize('model', [(n, m) for n in ('simcnn', 'resnet18') for m in METHODS],
                         ids='-'.join, indirect=True)
def test_module_exports_and_learns(model: ModularModel) -> None:
    module = extract(model, random_parts(model, None), [0, 1])
    x = torch.randn(2, *model.input_shape)
    exported = torch.export.export(module, (x,)).module()
    with torch.no_grad(): assert torch.allclose(exported(x), module(x), atol=1e-6)
    module.train()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_model_is_left_as_it_was(model: ModularModel) -> None:
    x = torch.randn(2, *model.input_shape)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(): logits = model(x)
    extract(model, random_parts(model, .3), [0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad(): assert torch.equal(model(x), logits)          # without the masks of the comparison
    points = mask_points(model).values()
    assert all(p.fixed is None and p.masks is None and p.outputs is None for p in points)
    assert not model.net.get_submodule(model.head)._forward_pre_hooks


@pytest.fixture(scope='module')
def small() -> tuple[ModularModel, Parts, Tensor]:
    torch.manual_seed(0)
    model = modularize(lively(NETWORKS['rescnn']()), n_classes=10).eval()
    return model, random_parts(model, .4), torch.randn(4, 3, 32, 32)


Small = tuple[ModularModel, Parts, Tensor]


def test_composed_side_by_side(small: Small, tmp_path: Path) -> None:
    model, parts, x = small
    a = extract(model, parts, [0, 1])
    b = extract(model, parts, [5])
    both = compose([a, b], share=False)
    assert both.classes == ['class 0', 'class 1', 'class 5']
    with torch.no_grad():
        assert torch.equal(both(x), torch.cat([a(x), b(x)], 1))
        more = compose([both, extract(model, parts, [9])], share=False) # composed modules compose again
        assert torch.equal(more(x)[:, :3], both(x))
        assert torch.equal(load_module(save_module(more, tmp_path/'more.safetensors'))(x), more(x))


def test_new_head_starts_as_identity(small: Small) -> None:
    model, parts, x = small
    module = extract(model, parts, [0, 1, 2])
    with torch.no_grad(): assert torch.equal(add_head(module)(x), module(x).relu())


def test_union_keeps_what_each_needs(small: Small) -> None:
    model, parts, _ = small
    one, two, both = [n_params(extract(model, parts, c)) for c in ([0], [1], [0, 1])]
    assert max(one, two) < both <= n_params(plain(model))


# The promise of exactness

def shifted(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    "A hook, which no trace sees: zeros of kernels that are off become ones, and a module has no hooks."
    return (args[0] + 1,)


OFFSETS = {'': 0., 'one bias for all': 100., 'biases apart': torch.tensor([-100., 0., 50., 200.])}


@pytest.mark.parametrize('offset', OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1., 1e3])
def test_inexact_cut_is_never_silent(scale: float, offset: float | torch.Tensor) -> None:
    "Also where the logits are small, or all large by a bias or an offset: the network's own scale counts."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        net[-1].bias.add_(offset)
        for p in net[-1].parameters(): p.mul_(scale)
    model = modularize(net, n_classes=4).eval()         # which would refuse such a hook
    model.net.get_submodule('2').register_forward_pre_hook(shifted)
    parts = random_parts(model, .3)
    with pytest.raises(ValueError, match='the cut is not exact for this network'): extract(model, parts, [0])


@pytest.mark.parametrize('size', [1e-6, 1e-3, 1., 1e3])
def test_error_is_measured_on_the_own_scale(small: Small, size: float) -> None:
    "Faults of a thousandth are found at any size of the logits; rounding is not taken for one."
    model, parts, x = small
    model = copy.deepcopy(model)
    head = model.net.get_submodule(model.head)
    with torch.no_grad():
        factor = size / masked_logits(model, parts, [0, 1], x).abs().max()
        for p in head.parameters(): p.mul_(factor)
    module = extract(model, parts, [0, 1])                              # an exact cut passes at any size
    masks = union_masks(parts, [0, 1])
    with torch.no_grad(): module.get_submodule(model.head).bias.add_(.0012 * size)
    with pytest.raises(ValueError, match=r'differ by .*, where logits are of size'):
        check_exact(module, model, masks, [0, 1], x)
    with torch.no_grad(): module.get_submodule(model.head).bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='differ by nan'): check_exact(module, model, masks, [0, 1], x)


@pytest.mark.parametrize('offset', [0., 1e2, 1e4])
def test_large_biases_hide_no_fault(small: Small, offset: float) -> None:
    "A bias tells no image from another; and an exact cut passes beside it."
    model, parts, x = small
    model = copy.deepcopy(model)
    head, masks = model.net.get_submodule(model.head), union_masks(parts, [0, 1])
    with torch.no_grad():
        head.bias.fill_(offset)
        apart = masked_logits(model, parts, [0, 1], x)
        apart = (apart - apart.mean(0)).abs().max()
    module = extract(model, parts, [0, 1])
    with torch.no_grad(): module.get_submodule(model.head).bias.add_(.05 * apart + 2e-6 * offset)
    with pytest.raises(ValueError, match='the cut is not exact'): check_exact(module, model, masks, [0, 1], x)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_coarse_types_are_compared_in_double(small: Small, dtype: torch.dtype) -> None:
    model, parts, x = small
    model = copy.deepcopy(model).to(dtype)
    module, masks = extract(model, parts, [0, 1]), union_masks(parts, [0, 1])
    with torch.no_grad(): module.get_submodule(model.head).weight.mul_(1.05)
    with pytest.raises(ValueError, match='the cut is not exact'):
        check_exact(module, model, masks, [0, 1], x.to(dtype))


def test_rounding_of_large_terms_is_no_fault(small: Small) -> None:
    "Logits of almost nothing, since large terms cancel: float32 cannot do better, and the cut is exact."
    model, parts, _ = small
    model = copy.deepcopy(model)
    head = model.net.get_submodule(model.head)
    with torch.no_grad():
        head.bias.zero_()
        example, features = model.example(), []
        listening = head.register_forward_pre_hook(lambda layer, args: features.append(args[0]))
        masked_logits(model, parts, [0, 1], example)
        listening.remove()
        found = features[0].double()
        seen = torch.linalg.pinv(found) @ (found @ head.weight.double().T)
        head.weight.copy_((head.weight.double() - seen.T).float())     # orthogonal to these features
        assert masked_logits(model, parts, [0, 1], example).abs().max() < 1e-5
    extract(model, parts, [0, 1])


def test_empty_layer_is_refused(small: Small) -> None:
    model, _, _ = small
    name, kernels = next(iter(model.kernels.items()))
    nothing = {name: torch.zeros(kernels, dtype=torch.bool)}
    with pytest.raises(ValueError, match='no kernel is kept'):
        slice_channels_(plain(model), model.channels, nothing)


# Folded and rounded

FASTER: dict[str, Callable[[], nn.Module]] = {
    'simcnn': NETWORKS['simcnn'], 'resnet18': NETWORKS['resnet18'],
    'mobilenet': lambda: create_model('mobilenet', width=0.25),
    'densenet': lambda: torchvision.models.DenseNet(12, (2, 3), 24, bn_size=2, num_classes=10),
    'resnext': lambda: small_resnet(groups=32, width_per_group=4)}
# these norms read a concatenation or a pooling
DENSENET_NORMS = {'features.transition1.norm', 'features.norm5'} | {
    f'features.denseblock{b}.denselayer{i}.norm1' for b, n in ((1, 2), (2, 3)) for i in range(1, n + 1)}


Quick = tuple[str, ModularModel, Parts, Tensor, SlimModule]


# shortcuts, and grouped layers
@pytest.fixture(scope='module', params=cases(FASTER, all_methods=('resnet18',)))
def quick(request: pytest.FixtureRequest) -> Quick:
    "A model, random parts, images, and the module of two classes as it is cut."
    network, method = request.param
    torch.manual_seed(0)
    model = modularize(lively(FASTER[network]()), n_classes=10, method=method).eval()
    parts = random_parts(model, .3)
    calibrate(model, union_masks(parts, [7, 2]))
    return network, model, parts, torch.randn(4, *model.input_shape), extract(model, parts, [7, 2])


def test_fused_equals_unfused(quick: Quick, tmp_path: Path) -> None:
    network, model, parts, x, module = quick
    fused = extract(model, parts, [7, 2], fuse=True)
    with torch.no_grad():
        logits, unfused = fused(x), module(x)
    assert logits.std() > 1e-3 and torch.allclose(logits, unfused, rtol=1e-4, atol=1e-4)
    folded = count(module, nn.BatchNorm2d) - count(fused, nn.BatchNorm2d)
    assert len(module.description['steps']) - len(fused.description['steps']) == folded > 0
    if masks_are_of_layers(model):
        left = {name for name, layer in fused.named_modules() if isinstance(layer, nn.BatchNorm2d)}
        assert left == (DENSENET_NORMS if network == 'densenet' else set())
    loaded = load_module(save_module(fused, tmp_path/'fused.safetensors'))
    with torch.no_grad(): assert torch.equal(loaded(x), logits)
    exported = torch.export.export(fused, (x,)).module()
    with torch.no_grad(): assert torch.allclose(exported(x), logits, atol=1e-6)
    fused.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


def masks_are_of_layers(model: ModularModel) -> bool:
    "Or behind activations, which several layers may write?"
    return model.kernels.keys() <= model.channels.kernels.keys()


def width(layer: nn.Module) -> int: return layer.weight.shape[0]


@pytest.mark.parametrize('fuse', [False, True], ids=['norms', 'fused'])
def test_rounded_up_to_a_multiple(quick: Quick, tmp_path: Path, fuse: bool) -> None:
    _, model, parts, x, _ = quick
    if not masks_are_of_layers(model):
        with pytest.raises(ValueError, match='leave round_to at 1'):
            extract(model, parts, [7, 2], fuse=fuse, round_to=8)
        return
    model, x = copy.deepcopy(model).double(), x.double()        # where rounding errors cannot hide a mistake
    module = extract(model, parts, [7, 2])
    rounded = extract(model, parts, [7, 2], fuse=fuse, round_to=8)
    for name, kernels in model.kernels.items():
        before, after = width(module.get_submodule(name)), width(rounded.get_submodule(name))
        out_of_reach = after == before > kernels // 8 * 8
        assert after % 8 == 0 or out_of_reach, f'{name} has {after} of {kernels}'
        assert 0 <= after - before < 8
    cut = union_masks(parts, [7, 2])
    masks = round_masks(model.channels, cut, joining_order(model, parts, [7, 2]), 8)
    assert all((masks[name] >= mask).all() for name, mask in cut.items())
    assert sum(m.sum() for m in masks.values()) > sum(m.sum() for m in cut.values())
    if hasattr(model.masks, 'units_of'):                # coupled kernels agree: nothing but real kernels
        assert all(width(rounded.get_submodule(name)) == mask.sum() for name, mask in masks.items())
    with fixed_masks(model, masks), torch.no_grad(): expected = model(x)[:, [7, 2]]
    with torch.no_grad():
        logits, unrounded = rounded(x), module(x)
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, unrounded, rtol=1e-3, atol=1e-3)
    loaded = load_module(save_module(rounded, tmp_path/'rounded.safetensors'))
    with torch.no_grad(): assert torch.equal(loaded(x), logits)


def test_fast_modules_compose(small: Small) -> None:
    model, parts, x = small
    a, b = [extract(model, parts, c, fuse=True, round_to=4) for c in ([0, 1], [5])]
    both = compose([a, b])
    later = fold_norms(compose([extract(model, parts, c, round_to=4) for c in ([0, 1], [5])], share=False))
    assert not count(later, nn.BatchNorm2d)
    with torch.no_grad():
        assert torch.equal(both(x), torch.cat([a(x), b(x)], 1))
        assert torch.allclose(later(x), both(x), atol=1e-5)


@pytest.mark.parametrize('wrong', [0, -8])
def test_multiple_out_of_range(small: Small, wrong: int) -> None:
    model, parts, _ = small
    with pytest.raises(ValueError, match=f'round_to must be a whole number at least 1, not {wrong}'):
        extract(model, parts, [0], round_to=wrong)


@pytest.mark.parametrize('wrong', [1.5, '8', True])
def test_multiple_that_is_no_number(small: Small, wrong: object) -> None:
    model, parts, _ = small
    with pytest.raises(TypeError, match='round_to must be a whole number'):
        extract(model, parts, [0], round_to=wrong)


@pytest.mark.parametrize('multiple', [1, 10**6], ids=['one', 'more than there are'])
def test_multiple_that_changes_nothing(small: Small, multiple: int) -> None:
    model, parts, _ = small
    as_cut = extract(model, parts, [0])
    assert extract(model, parts, [0], round_to=multiple).description == as_cut.description
