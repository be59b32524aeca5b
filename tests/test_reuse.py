"Modules put together, of one model and of several; a class of a weak model replaced."
from __future__ import annotations
import copy
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from networks import NETWORKS, lively, random_parts
from torch import Tensor, nn
from mwt.core.files import save_tensors
from mwt.core.signature import Signature
from mwt.data.batches import Batches, from_tensors
from mwt.measure import evaluate
from mwt.methods.modular import ModularModel, modularize
from mwt.modules.compose import add_class, compose, drop_class, pieces_of, union
from mwt.modules.extract import extract
from mwt.modules.module import SlimModule, as_module, load_module, save_module
from mwt.modules.parts import Parts
from mwt.modules.replace import replace_class

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def answer(module: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad(): return module(x)


@pytest.fixture(scope='module', params=[('rescnn', 'composable'), ('resnet18', 'mwt'), ('simcnn', 'moda'),
                                        ('torchvision/shufflenet_v2_x0_5', 'composable')], ids='-'.join)
def model(request: pytest.FixtureRequest) -> ModularModel:
    torch.manual_seed(0)
    network, method = request.param
    return modularize(lively(NETWORKS[network]()), n_classes=10, method=method).eval()


def test_union_from_the_model_is_what_extract_cuts(model: ModularModel, tmp_path: Path) -> None:
    parts = random_parts(model, .4)
    files = [load_module(save_module(extract(model, parts, c), tmp_path/f'{c[0]}.safetensors'))
             for c in ([7, 2], [0])]
    both, wanted = compose(files, model=model), extract(model, parts, [7, 2, 0])
    assert both.description == wanted.description
    assert torch.equal(answer(both), answer(wanted))
    whole = union([*files, wanted])                     # the last one has all weights
    if whole is None: assert model.method.name == 'moda'
    else: assert torch.equal(answer(whole), answer(wanted))


def test_union_from_files_keeps_what_each_module_has(model: ModularModel, tmp_path: Path) -> None:
    parts = random_parts(model, .4)
    a, b = (extract(model, parts, c) for c in ([7, 2], [0]))
    laid = union([a, b])
    if laid is None: return
    assert laid.classes == ['class 7', 'class 2', 'class 0']
    wanted = extract(model, parts, [7, 2, 0])
    for name, t in laid.named_parameters():
        other = wanted.get_parameter(name)
        assert t.shape == other.shape and ((t == other) | (t == 0)).all(), name
    assert torch.equal(answer(compose([a, extract(model, parts, [2])])), answer(a)), 'one holds the other'
    loaded = load_module(save_module(laid, tmp_path/'laid.safetensors'))
    assert torch.equal(answer(loaded), answer(laid))


Pair = tuple[ModularModel, Parts]


@pytest.fixture(scope='module')
def small() -> Pair:
    torch.manual_seed(0)
    model = modularize(lively(NETWORKS['simcnn']()), n_classes=10).eval()
    return model, random_parts(model, .4)


def test_trained_or_foreign_modules_are_no_union(small: Pair) -> None:
    model, parts = small
    a, b = (extract(model, parts, c) for c in ([0, 1], [5]))
    changed = copy.deepcopy(b)
    with torch.no_grad(): next(changed.parameters()).add_(1)
    with pytest.raises(ValueError, match='has been trained since it was cut; give share=False'):
        compose([a, changed])
    other = modularize(lively(NETWORKS['simcnn'](), seed=1), n_classes=10).eval()
    with pytest.raises(ValueError, match='none of the modules was cut from this model'):
        compose([a, b], model=other)
    beside = compose([a, extract(other, parts, [5])])
    assert torch.equal(answer(beside)[:, :2], answer(a))
    fused = extract(model, parts, [5], fuse=True)
    assert 'origin' not in fused.description
    assert torch.equal(answer(compose([a, fused])), torch.cat([answer(a), answer(fused)], 1))


def test_modules_that_share_nothing(small: Pair) -> None:
    "No kernel in common: the union computes what the two compute side by side."
    model, parts = small
    kept = torch.zeros_like(parts.kept)
    kept[0, ::2] = kept[5, 1::2] = True
    parts = replace(parts, kept=kept)
    a, b = (extract(model, parts, [c]) for c in (0, 5))
    together = union([a, b])
    assert together.classes == ['class 0', 'class 5']
    assert torch.allclose(answer(together), torch.cat([answer(a), answer(b)], 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='none of the modules was cut from this model'):
        compose([linear(['0'], channels=3), linear(['1'], channels=3)], model=model)


@pytest.mark.parametrize('change, says', [
    (lambda o: o['rows'].append(3), 'its origin has'), (lambda o: o['lists'][0].append(-1), 'has the places'),
    (lambda o: o['places'].update({'head.weight': [0, 0, 0]}), 'head.weight'),
    (lambda o: o.pop('model'), 'its origin is')],
    ids=['classes', 'places', 'shape', 'model'])
def test_forged_origin_is_refused(small: Pair, change: object, says: str, tmp_path: Path) -> None:
    module = extract(*small, [0, 1])
    about = copy.deepcopy(module.description)
    change(about['origin'])
    path = save_tensors(tmp_path/'forged.safetensors', 'module', module.state_dict(), about)
    with pytest.raises(ValueError, match=f'does not describe a module.*{says}'): load_module(path)


# Modules of several models

def linear(names: list[str], size: int = 4, scale: float = 1., channels: int = 1,
           mean: float = .5) -> SlimModule:
    "A module that answers with the mean of one column of the image for each class."
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(channels * size * size, len(names))
        def forward(self, x: Tensor) -> Tensor: return self.head(x.flatten(1))
    net = Columns()
    with torch.no_grad():
        weight = torch.zeros(len(names), channels, size, size)
        for i, name in enumerate(names): weight[i, :, :, int(name) % 4 * size // 4] = scale * 8 / size
        net.head.weight.copy_(weight.flatten(1))
        net.head.bias.fill_(5 * scale)              # a loud module drowns the others
    signature = Signature(names, [channels, size, size], [mean] * channels, [.5] * channels)
    return as_module(net, names, (channels, size, size), signature=signature)


def columns(samples: int = 80, size: int = 4, n: int = 4) -> Batches:
    "Noise with one bright column, which is the class."
    generator, labels = torch.Generator().manual_seed(0), torch.arange(samples) % n
    images = torch.randint(0, 120, (samples, 1, size, size), generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, label * size // 4:(label + 1) * size // 4] += 130
    split = images.byte(), labels
    return from_tensors(split, split, split, [str(c) for c in range(n)], device='cpu', augment=None).test


def test_calibration_brings_modules_to_one_scale(tmp_path: Path) -> None:
    quiet, loud, data = linear(['0', '1']), linear(['2', '3'], scale=30.), columns()
    both, fair = compose([quiet, loud]), compose([quiet, loud], calibrate=data)
    assert evaluate(both, data) < .8 < evaluate(fair, data)
    again = compose([quiet, loud], calibrate=data)
    x = data.images.float() / 255
    assert torch.equal(answer(again, x), answer(fair, x)), 'the same every time'
    loaded = load_module(save_module(fair, tmp_path/'fair.safetensors'))
    assert torch.equal(answer(loaded, x), answer(fair, x))
    for piece, m in zip(pieces_of(fair), (quiet, loud)):
        assert torch.equal(answer(piece.module, x), answer(m, x))
    assert torch.equal(answer(drop_class(fair, '2'), x), answer(fair, x)[:, [0, 1, 3]])


def test_modules_of_several_sizes(tmp_path: Path) -> None:
    small, large, data = linear(['0', '1']), linear(['2', '3'], size=8, mean=.3), columns(size=8)
    both = compose([small, large])
    assert both.input_shape == (1, 8, 8)
    x = data.images.float() / 255
    half = torch.nn.functional.interpolate(x, size=[4, 4], mode='bilinear', antialias=True)
    assert torch.allclose(answer(both, x), torch.cat([answer(small, half), answer(large, x)], 1), atol=1e-5)
    loaded = load_module(save_module(both, tmp_path/'both.safetensors'))
    assert torch.equal(answer(loaded, x), answer(both, x))
    assert torch.allclose(answer(loaded, data.images), answer(both, x), atol=1e-4), 'bytes as well'
    assert torch.equal(answer(pieces_of(both)[0].module, half), answer(small, half))


def test_a_class_in_two_modules_is_the_mean_of_their_scores() -> None:
    a, b, data = linear(['0', '1']), linear(['1', '2'], scale=5.), columns(n=3)
    with pytest.raises(ValueError, match="class '1' is in more than one module; give calibrate=data"):
        compose([a, b])
    both, x = compose([a, b], calibrate=data), data.images.float() / 255
    one, two = ([answer(p.module, x) * p.scale + p.offset for p in pieces_of(both)])
    wanted = torch.stack([one[:, 0], (one[:, 1] + two[:, 0]) / 2, two[:, 1]], 1)
    assert both.classes == ['0', '1', '2'] and torch.allclose(answer(both, x), wanted, atol=1e-4)


def test_modules_that_reject_are_compared_by_what_is_certain(tmp_path: Path) -> None:
    a, b = linear(['0', '1']), linear(['2', '3'], scale=3.)
    for m in (a, b): m.description['reject'] = True
    both, x = compose([a, b]), columns().images.float() / 255
    p = [answer(m, x).softmax(1) for m in (a, b)]
    wanted = torch.cat([q - q.amin(1, keepdim=True) for q in p], 1)
    assert torch.allclose(answer(both, x).exp(), wanted + 1e-3, atol=1e-5)
    again = add_class(drop_class(both, '2'), linear(['2']), calibrate=columns())
    assert again.classes == ['0', '1', '3', '2']
    loaded = load_module(save_module(a, tmp_path/'a.safetensors'))
    assert [q.description.get('reject') for q in (loaded, both)] == [True, None]


def test_what_cannot_be_composed() -> None:
    a, data = linear(['0', '1']), columns()
    with pytest.raises(ValueError, match='images of 1 and 3 channels'):
        compose([a, linear(['2'], channels=3)])
    with pytest.raises(ValueError, match="the data has no class '5'"):
        compose([a, linear(['5'])], calibrate=data)
    without = data._replace(images=data.images[data.labels != 2], labels=data.labels[data.labels != 2])
    with pytest.raises(ValueError, match="no image of class '2'"):
        compose([a, linear(['2'])], calibrate=without)
    with pytest.raises(TypeError, match='not an extracted module'): add_class(a, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'3' is the only class"): drop_class(linear(['3']), '3')
    with pytest.raises(ValueError, match='are classes of the module already'): add_class(a, linear(['1']))


def test_a_class_of_a_weak_model_is_replaced(tmp_path: Path) -> None:
    data, strong = columns(samples=160), linear(['3'], scale=5.)
    weak = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        columns_of = linear(['0', '1', '2', '3']).head
        weak[1].weight.copy_(columns_of.weight)
        weak[1].weight[3] = 0                   # blind for one class
        weak[1].bias.copy_(torch.tensor([0., 0., 0., -20.]))
    with pytest.raises(ValueError, match='Sequential does not say its classes'):
        replace_class(weak, strong, '3', data)
    made = replace_class(weak, strong, '3', data, classes=data.classes)
    assert made.classes == data.classes
    unhelped = as_module(weak, data.classes, data.shape, signature=data.signature)
    before, after = (evaluate(m, data) for m in (unhelped, made))
    assert before <= .76 and after > .9
    x = data.images.float() / 255
    loaded = load_module(save_module(made, tmp_path/'made.safetensors'))
    assert torch.equal(answer(loaded, x), answer(made, x))
    with pytest.raises(ValueError, match='take a module with this class'):
        replace_class(made, strong, '2', data)
    with pytest.raises(ValueError, match='use compose'):
        replace_class(weak, linear(['0']), '0', data, classes=['1', '2', '3', '4'])
    with pytest.raises(ValueError, match='answers for 4 classes, and 3 are named'):
        replace_class(weak, strong, '3', data, classes=['1', '2', '3'])
    weak[1].register_forward_hook(lambda layer, args, found: 2 * found)
    with pytest.raises(ValueError, match='a forward hook changes'):
        replace_class(weak, strong, '3', data, classes=data.classes)
