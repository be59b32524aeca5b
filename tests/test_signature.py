"What a network takes and answers travels with it: normalisation, names and their order."
from __future__ import annotations
import copy
from collections.abc import Callable
from pathlib import Path
import pytest
import torch
from helpers import state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from mwt.core.signature import Signature, normalise, signature_of
from mwt.data.batches import ImageData, from_tensors
from mwt.measure import confusion, evaluate
from mwt.methods.base import METHODS
from mwt.methods.modular import ModularModel, modularize, plain
from mwt.modules.compose import compose, fine_tune
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import load_module, save_module
from mwt.modules.parts import Parts, load_parts, save_parts
from mwt.modules.speed import fold_norms
from mwt.networks import create_model
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import fit

NAMES = ['ant', 'bee', 'cow', '0']      # one that looks like a number


def splits(shift: int = 0, names: list[str] = NAMES, extra: int = 0) -> ImageData:
    "Red, green, blue and grey images, told apart at a glance; `extra` white ones change the statistics."
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(160) % len(names)
    images = torch.randint(60, (160, 3, 16, 16), generator=generator)
    for i, label in enumerate(labels.tolist()): images[i, label:label + 1] += 120       # not for the last
    images = (images + shift).clamp(0, 255).byte()
    white = torch.full((extra, 3, 16, 16), 255, dtype=torch.uint8)
    train = torch.cat([images, white]), torch.cat([labels, torch.zeros(extra, dtype=torch.long)])
    return from_tensors(train, (images, labels), (images, labels), names, 32, augment=None, device='cpu')


@pytest.fixture(scope='module')
def data() -> ImageData: return splits()


def network(kind: str, seed: int = 0) -> nn.Module:
    net = create_model('simcnn', 4, .2, seed=seed)
    return net if kind == 'plain' else modularize(net, 4, kind, torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope='module')
def trained(data: ImageData) -> Callable[[str], nn.Module]:
    models = {}
    def make(kind: str) -> nn.Module:
        if kind not in models:
            models[kind] = network(kind)
            fit(models[kind], data, 16 if kind == 'composable' else 4, show_progress=False)
        return copy.deepcopy(models[kind])
    return make


@pytest.fixture(scope='module')
def model(trained: Callable) -> ModularModel:
    found = trained('composable')
    assert evaluate(found, splits().test) > .95, 'the comparisons would be empty'
    return found


@pytest.fixture(scope='module')
def parts(model: ModularModel, data: ImageData) -> Parts:
    return decompose(model, data.train, show_progress=False)


KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ('plain', 'composable')))
         for kind in ('plain', *METHODS)]
every_kind = pytest.mark.parametrize('kind', KINDS)

# Normalisation

@every_kind
def test_data_with_other_statistics_is_judged_alike(kind: str, trained: Callable, data: ImageData) -> None:
    "White images among the training images, read anew: the test images are what they were."
    model, other = trained(kind), splits(extra=400)
    assert not torch.allclose(other.train.mean, data.train.mean, atol=.1)
    assert torch.equal(confusion(model, other.test), confusion(model, data.test))


def test_normalisation_is_the_training_images(trained: Callable, data: ImageData) -> None:
    known = signature_of(trained('plain'))
    assert known.mean == data.train.mean.tolist() and known.std == data.train.std.tolist()
    assert known.classes == NAMES and known.shape == [3, 16, 16]


@every_kind
def test_checkpoint_carries_it(kind: str, trained: Callable, tmp_path: Path) -> None:
    model, again = trained(kind), network(kind, seed=1)
    save_checkpoint(model, tmp_path/'model.safetensors')
    load_checkpoint(again, tmp_path/'model.safetensors')
    assert again.signature == model.signature and again.signature.classes == NAMES


def test_state_dict_carries_it(model: ModularModel, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path/'model.pt')
    again = network('composable', seed=1)
    again.load_state_dict(torch.load(tmp_path/'model.pt'))
    assert again.signature == model.signature and again.classes == NAMES


def test_state_dict_of_an_older_version_loads(model: ModularModel) -> None:
    old = {k: v for k, v in model.state_dict().items() if k != '_extra_state'}
    again = network('composable', seed=1)
    again.load_state_dict(old)
    assert again.signature is None


def test_plain_network_keeps_it(model: ModularModel) -> None:
    net = plain(model)
    assert net.signature == model.signature
    assert modularize(net, 4, example_input=torch.zeros(1, 3, 16, 16)).signature == model.signature


def test_training_goes_on_with_its_own_normalisation(model: ModularModel) -> None:
    again, seen = copy.deepcopy(model), []
    again.net.register_forward_pre_hook(lambda net, args: seen.append(args[0].amax((0, 2, 3))))
    fit(again, splits(extra=400), 1, show_progress=False)
    known = again.signature
    white = (1 - torch.tensor(known.mean)) / torch.tensor(known.std)
    assert known == model.signature and any(torch.allclose(x, white, atol=1e-5) for x in seen)


# A module takes pixels

@pytest.fixture(scope='module')
def module(model: ModularModel, parts: Parts) -> nn.Module: return extract(model, parts, ['cow', 'ant'])


def masked(model: ModularModel, parts: Parts, x: Tensor, classes: list[str]) -> Tensor:
    from mwt.methods.modular import fixed_masks
    from mwt.modules.parts import target_rows, union_masks
    with fixed_masks(model.eval(), union_masks(parts, classes)), torch.no_grad():
        return model(x)[:, target_rows(parts, classes)]


def test_module_normalises_bytes_and_fractions(module: nn.Module, model: ModularModel, parts: Parts,
                                               data: ImageData, tmp_path: Path) -> None:
    pixels = data.test.images[:8]
    expected = masked(model, parts, data.test.normalise(pixels), ['cow', 'ant'])
    loaded = load_module(save_module(module, tmp_path/'module.safetensors'))
    exported = torch.export.export(module, (pixels / 255,)).module()
    for taken in (module, loaded, fold_norms(module), exported):
        assert torch.allclose(taken(pixels / 255), expected, atol=1e-4)
    for taken in (module, loaded): assert torch.allclose(taken(pixels), expected, atol=1e-4)
    assert loaded.signature == module.signature
    assert loaded.signature.mean == pytest.approx(model.signature.mean)


@pytest.mark.parametrize('wrong', [lambda x: (x - .5) / .2, lambda x: 255 * x, lambda x: 2 * x - 1],
                         ids=['normalised', 'to 255', 'from -1'])
def test_what_is_no_pixel_is_refused(wrong: Callable, module: nn.Module, data: ImageData) -> None:
    images = wrong(data.test.images[:8] / 255)
    with pytest.raises(ValueError, match='a module takes pixels, bytes or numbers'): module(images)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_module_of_another_precision(dtype: torch.dtype, module: nn.Module, data: ImageData) -> None:
    other, pixels = copy.deepcopy(module).to(dtype), data.test.images[:8]
    assert other(pixels).dtype == dtype
    assert torch.allclose(other(pixels).float(), module(pixels), atol=.2, rtol=.1)


def test_parts_of_other_origin_normalise_in_their_own_way(module: nn.Module, data: ImageData,
                                                           tmp_path: Path) -> None:
    dark = splits(shift=40, names=['w', 'x', 'y', 'z'])
    other = network('composable', seed=3)
    fit(other, dark, 2, show_progress=False)
    second = extract(other, decompose(other, dark.train, show_progress=False), ['x'])
    assert second.signature.mean != module.signature.mean
    both, pixels = compose([module, second]), data.test.images[:8]
    assert both.takes_pixels and both.classes == ['cow', 'ant', 'x']
    expected = torch.cat([module(pixels), second(pixels)], 1)
    loaded = load_module(save_module(both, tmp_path/'both.safetensors'))
    for taken in (both, loaded): assert torch.equal(taken(pixels), expected)


def test_module_of_an_unknown_normalisation_is_not_composed_with_others(module: nn.Module) -> None:
    model = network('composable')
    parts = Parts(['w', 'x', 'y', 'z'], model.kernels, *everything(model), samples=2)
    with pytest.raises(ValueError, match='takes normalised images, others take pixels'):
        compose([module, extract(model, parts, ['w'])])


def everything(model: ModularModel) -> tuple[Tensor, ...]:
    kept = torch.ones(4, sum(model.kernels.values()), dtype=torch.bool)
    return kept.double(), kept, torch.ones(4, len(model.kernels)), torch.ones(4)


def test_own_loop_is_known_by_its_parts(data: ImageData, tmp_path: Path) -> None:
    "A model that `fit` never saw: the images of `decompose` speak for it, also from a file."
    model = network('composable')
    found = decompose(model, data.train, show_progress=False)
    parts = load_parts(save_parts(found, tmp_path/'parts.safetensors'))
    module = extract(model, parts, ['bee'])
    assert module.takes_pixels and module.signature.mean == pytest.approx(data.train.mean.tolist())


# Names decide

def test_decompose_goes_by_names(model: ModularModel, parts: Parts, data: ImageData) -> None:
    other = decompose(model, data.subset(['0', 'cow', 'ant', 'bee']).train, show_progress=False)
    assert other.classes == NAMES and torch.equal(other.kept, parts.kept)


@every_kind
def test_evaluate_goes_by_names(kind: str, trained: Callable, data: ImageData) -> None:
    model, turned = trained(kind), data.subset(NAMES[::-1])
    assert torch.equal(confusion(model, turned.test), confusion(model, data.test))


def test_fit_goes_by_names(module: nn.Module, data: ImageData) -> None:
    again = copy.deepcopy(module)
    fit(again, data.subset(['ant', 'cow']), 2, lr=.01, show_progress=False)
    assert again.classes == ['cow', 'ant'] and evaluate(again, data.test) > .9


def test_loaders_go_by_names(model: ModularModel, data: ImageData) -> None:
    found = TensorDataset(*data.test.take(data.test.n))
    found.tensors = found.tensors[0], 3 - found.tensors[1]
    found.classes = NAMES[::-1]
    assert torch.equal(confusion(model, DataLoader(found, batch_size=32)), confusion(model, data.test))


@pytest.mark.parametrize('names', [['apple', 'bee', 'cow', '0'], ['0', '1', '2', '3'], ['w', 'x', 'y', 'z']])
def test_other_names_are_refused(names: list[str], model: ModularModel) -> None:
    other = splits(names=names)
    said = r"apart, the data has \['" + names[0]
    with pytest.raises(ValueError, match=said): decompose(model, other.train, show_progress=False)
    with pytest.raises(ValueError, match=said): fit(copy.deepcopy(model), other, 1, show_progress=False)
    with pytest.raises(ValueError, match=said): evaluate(model, other.test)


def test_classes_that_a_module_lacks_are_refused(module: nn.Module, data: ImageData) -> None:
    for wrong in (['ant', 'bee'], ['0', 'bee']):
        with pytest.raises(ValueError, match=r"\['cow', 'ant'\] apart, the data has"):
            fit(copy.deepcopy(module), data.subset(wrong), 1, show_progress=False)
    with pytest.raises(ValueError, match=r"without \['cow'\]; say classes="):
        evaluate(module, data.test.subset(['ant', 'bee']))
    assert evaluate(module, data.test.subset(['ant', 'bee']), ['ant']) == 1
    with pytest.raises(ValueError, match="unknown class 'bee'"): evaluate(module, data.test, ['bee'])


def test_images_of_another_size_are_refused(model: ModularModel, module: nn.Module) -> None:
    small = from_tensors(*[(torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.arange(16) % 4)] * 3, NAMES, 4,
                         augment=None, device='cpu')
    for call in (lambda: evaluate(model, small.test), lambda: evaluate(module, small.test),
                 lambda: fit(copy.deepcopy(model), small, 1, show_progress=False)):
        with pytest.raises(ValueError, match=r'3 channels and 16x16 pixels, .* read the images with size=16'):
            call()


def test_parts_of_another_order_are_refused(model: ModularModel, parts: Parts) -> None:
    from dataclasses import replace
    with pytest.raises(ValueError, match='these parts are of another model'):
        extract(model, replace(parts, classes=NAMES[::-1]), ['ant'])


def test_weights_of_another_module_are_refused(model: ModularModel, parts: Parts) -> None:
    a, b = (extract(model, parts, classes) for classes in (['cow', 'ant'], ['ant', 'cow']))
    with pytest.raises(ValueError, match=r"of a module of \['cow', 'ant'\], and this one is of"):
        b.load_state_dict(a.state_dict())


# Files of version 0.1.0

OLD = Path(__file__).parent/'fixtures'/'0.1.0'

@pytest.mark.parametrize('kind', ['composable', 'mwt'])
def test_old_files_say_what_they_lack(kind: str) -> None:
    with pytest.warns(UserWarning, match='of mwt 0.1.0 and does not say how images were normalised'):
        module = load_module(OLD/kind/'modules'/'3-7.safetensors')
    assert not module.takes_pixels and module.signature.mean is None and module.classes == ['3', '7']
    module(torch.randn(2, *module.input_shape))         # as its model took them


def test_signature_is_made_of_numbers() -> None:
    with pytest.raises(ValueError, match='takes pixels'):
        normalise(torch.full((1, 1, 2, 2), 9.), torch.zeros(1), torch.ones(1))
    assert Signature(['a']).shape is None
