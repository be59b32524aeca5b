"Bad input meets an error that names the value and the way out, before any work; nothing on disk changes, nothing is run."
from __future__ import annotations
import copy, hashlib, math, pickle, shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
import mwt.training
from mwt.cli import main
from mwt.convert import ModularModel, modularize, plain
from mwt.core import save_tensors
from mwt.data import Batches, ImageData, from_tensors, image_data
from mwt.decompose import Parts, decompose, load_parts, save_parts
from mwt.extract import SlimModule, extract, load_module, save_module
from mwt.metrics import evaluate, profiles
from mwt.methods import make_method
from mwt.models import create_model
from mwt.reuse import compose, fine_tune
from mwt.training import TrainConfig, fit, load_checkpoint, save_checkpoint

NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
nan, inf = math.nan, math.inf


def named(images: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> ImageData:
    "The digits with names that can be mistyped, and with changed images."
    digits = image_data('digits', batch_size=64, device='cpu')
    parts = {name: (images(b.images), b.labels) for name, b in digits.parts().items()}
    return from_tensors(**parts, classes=NAMES, batch_size=64, device='cpu')


@pytest.fixture(scope='module')
def data() -> ImageData: return named()


@pytest.fixture(scope='module')
def colour() -> ImageData:
    "The same digits in three channels."
    return named(lambda x: x.expand(-1, 3, -1, -1).contiguous())


def fresh(name: str = 'simcnn', width: float = .1, **changes: Any) -> nn.Module:
    return create_model(name, **(dict(num_classes=10, width=width, in_channels=1, seed=0) | changes))


@pytest.fixture(scope='module')
def model(data: ImageData) -> ModularModel:
    "A modular model, trained a little; not to be changed."
    torch.manual_seed(0)
    model = modularize(fresh(), 10)
    fit(model, data, 2, show=False)
    return model


@pytest.fixture(scope='module')
def parts(model: ModularModel, data: ImageData) -> Parts: return decompose(model, data.train, show=False)


@pytest.fixture(scope='module')
def module(model: ModularModel, parts: Parts) -> SlimModule: return extract(model, parts, ['one', 'two'])


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    "An error that comes after the first step comes too late."
    def late(*args: Any, **kwargs: Any) -> None: raise AssertionError('training began')
    monkeypatch.setattr(mwt.training, 'train_epoch', late)


# Names

UNKNOWN_NAMES = {
    'data set': (lambda s: image_data('digit'), 'digit', 'digits'),
    'data set in capitals': (lambda s: image_data('CIFAR10'), 'CIFAR10', 'cifar10'),
    'model': (lambda s: create_model('simcn'), 'simcn', 'simcnn'),
    'model of torchvision': (lambda s: create_model('torchvision/resnet81'), 'torchvision/resnet81', 'torchvision/resnet18'),
    'method': (lambda s: modularize(fresh(), 10, method='mtw'), 'mtw', 'mwt'),
    'setting of the method': (lambda s: modularize(fresh(), 10, 'mwt', betta=1.), 'betta', 'beta'),
    'option of fit': (lambda s: fit(fresh(), s.data, momentun=.9), 'momentun', 'momentum'),
    'class to extract': (lambda s: extract(s.model, s.parts, ['tow']), 'tow', 'two'),
    'class of the data': (lambda s: s.data.subset(['one', 'thre']), 'thre', 'three'),
    'class to judge': (lambda s: evaluate(s.model, s.data.test, ['sevn']), 'sevn', 'seven'),
    'layer': (lambda s: mwt.decompose.plot_masks(s.parts, 'features.1.1'), 'features.1.1', 'features.1.0')}


@pytest.fixture(scope='module')
def scene(data: ImageData, model: ModularModel, parts: Parts, module: SlimModule, colour: ImageData) -> Any:
    "All of the above under one name."
    class Scene: pass
    s = Scene(); s.data, s.model, s.parts, s.module, s.colour = data, model, parts, module, colour
    return s


@pytest.mark.parametrize('call, given, meant', UNKNOWN_NAMES.values(), ids=UNKNOWN_NAMES)
def test_unknown_name_meets_the_nearest(call: Callable, given: str, meant: str, scene: Any, no_training: None) -> None:
    with pytest.raises(ValueError) as e: call(scene)
    assert repr(given) in str(e.value) and f'did you mean {meant!r}?' in str(e.value) and 'known:' in str(e.value)


@pytest.mark.parametrize('value', [None, 3, True, ['simcnn']], ids=repr)
@pytest.mark.parametrize('call', [lambda v: create_model(v), lambda v: modularize(fresh(), 10, method=v), lambda v: image_data(v)],
                         ids=['model', 'method', 'data set'])
def test_name_of_another_type(call: Callable, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as e: call(value)
    assert repr(value) in str(e.value) and ('mwt' in str(e.value) or 'simcnn' in str(e.value) or 'digits' in str(e.value))


# Numbers

NO_NUMBERS = [None, 'many', True, [1]]
NO_SHARES = [-.1, nan, inf, *NO_NUMBERS]            # wrong for every setting that is a number
NO_COUNTS = [-1, 1.5, nan, inf, *NO_NUMBERS]        # wrong for every setting that is a whole number

SETTINGS: dict[str, tuple[Callable[[Any, Any], Any], list[Any]]] = {
    'alpha': (lambda s, v: modularize(fresh(), 10, 'mwt', alpha=v), NO_SHARES),
    'beta': (lambda s, v: modularize(fresh(), 10, 'mwt', beta=v), NO_SHARES),
    'reduction': (lambda s, v: modularize(fresh(), 10, 'mwt', reduction=v), [0, *NO_COUNTS]),
    'target_krr': (lambda s, v: modularize(fresh(), 10, target_krr=v), [0, 1.1, 15, *NO_SHARES]),
    'separation': (lambda s, v: modularize(fresh(), 10, separation=v), NO_SHARES),
    'full': (lambda s, v: modularize(fresh(), 10, full=v), [1.1, *NO_SHARES]),
    'start': (lambda s, v: modularize(fresh(), 10, start=v), [1.1, *NO_SHARES]),
    'end': (lambda s, v: modularize(fresh(), 10, start=.3, end=v), [.2, 1.1, *NO_SHARES]),
    'memory': (lambda s, v: modularize(fresh(), 10, memory=v), [1, 1.1, *NO_SHARES]),
    'n_classes': (lambda s, v: modularize(fresh(), v), [0, 1, *NO_COUNTS]),
    'num_classes': (lambda s, v: create_model('simcnn', v), [0, 1, *NO_COUNTS]),
    'width': (lambda s, v: create_model('simcnn', width=v), [0, 8.1, *NO_SHARES]),
    'in_channels': (lambda s, v: create_model('simcnn', in_channels=v), [0, *NO_COUNTS]),
    'batch_size': (lambda s, v: image_data('digits', batch_size=v), [0, *NO_COUNTS]),
    'valid': (lambda s, v: image_data('digits', valid=v), [0, 1, 1.5, *NO_SHARES]),
    'size': (lambda s, v: image_data('digits', size=v), [0, *(v for v in NO_COUNTS if v is not None)]),
    'epochs': (lambda s, v: fit(fresh(), s.data, v), [0, *NO_COUNTS]),
    'seed': (lambda s, v: fit(fresh(), s.data, 1, seed=v), [2**32, *NO_COUNTS]),
    'lr': (lambda s, v: fit(fresh(), s.data, 1, lr=v), [0, *NO_SHARES]),
    'momentum': (lambda s, v: fit(fresh(), s.data, 1, momentum=v), [1, 1.1, *NO_SHARES]),
    'weight_decay': (lambda s, v: fit(fresh(), s.data, 1, weight_decay=v), NO_SHARES),
    'warmup': (lambda s, v: fit(fresh(), s.data, 1, warmup=v), [1.1, *NO_SHARES]),
    'threshold': (lambda s, v: decompose(s.model, s.data.train, v), [0, 1.01, 90, *NO_SHARES]),
    'samples': (lambda s, v: decompose(s.model, s.data.train, samples=v), [0, 1, *NO_COUNTS]),
    'repeats': (lambda s, v: profiles([s.module], repeats=v), [0, *NO_COUNTS])}


@pytest.mark.parametrize('name, value', [(n, v) for n, (_, values) in SETTINGS.items() for v in values], ids=lambda v: v if isinstance(v, str) else repr(v))
def test_number_out_of_range(name: str, value: Any, scene: Any, no_training: None) -> None:
    with pytest.raises((ValueError, TypeError)) as e: SETTINGS[name][0](scene, value)
    assert str(e.value).startswith(f'{name} must be a') and repr(value) in str(e.value)


def test_recipe_in_a_config_is_checked_too() -> None:
    with pytest.raises(ValueError, match='lr must be a number above 0, not -1'): TrainConfig(lr=-1)
    with pytest.raises(ValueError, match='beta must be a number at least 0, not -1'): make_method('mwt', beta=-1)
    with pytest.raises(ValueError, match=r"settings \['beta'\] given beside a ready-made method"): make_method(make_method('mwt'), beta=1)


# Networks that do not fit

def state(model: nn.Module) -> dict[str, torch.Tensor]: return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


DENSE = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
ONE_CONV = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

MISFITS = {
    'no convolution': (lambda s: modularize(DENSE, 10), 'Sequential has no nn.Conv2d layer; only convolutional networks'),
    'no convolution, trained': (lambda s: fit(DENSE, s.data, 1), 'Sequential has no nn.Conv2d layer; only convolutional networks'),
    'only the first': (lambda s: modularize(ONE_CONV, 10, 'mwt'), 'no layer is left to mask: 0: the first'),
    'a filter that leaves nothing': (lambda s: modularize(fresh(), 10, filter_fn=lambda layer, name: False), 'no layer is left to mask: features.0.0: left out by filter_fn'),
    'targets for masks of images': (lambda s: modularize(fresh(), 10, 'mwt')(torch.zeros(1, 1, 8, 8), torch.ones(1, 10).bool()), 'are made of each image, not of classes; use extract'),
    'modularized twice': (lambda s: modularize(s.model, 10), 'ModularModel is already modularized; take the masks off with plain'),
    'masked inside': (lambda s: modularize(s.model.net, 10), 'already modularized; take the masks off with plain'),
    'other number of classes': (lambda s: modularize(fresh(), 7), 'answers for 10 classes, but n_classes is 7; give the number'),
    'channels, trained': (lambda s: fit(fresh(), s.colour, 1), 'takes images of 1 channels, the data has 3; make the network with in_channels=3'),
    'channels, decomposed': (lambda s: decompose(s.model, s.colour.train, show=False), 'images of 1 channels, the data has 3'),
    'channels, evaluated': (lambda s: evaluate(s.model, s.colour.test), 'images of 1 channels, the data has 3'),
    'channels of torchvision': (lambda s: create_model('torchvision/resnet18', in_channels=1),
                                'takes 3 channels, not width 1.0 and 1 channels; use one of simcnn'),
    'outputs': (lambda s: fit(fresh(num_classes=7), s.data, 1), 'answers for 7 classes, the data has 10; make the network with num_classes=10'),
    'fewer classes, decomposed': (lambda s: decompose(s.model, s.data.train.subset(['one', 'two'])), "the data has ['one', 'two']; pass all classes"),
    'classes in another order': (lambda s: decompose(s.model, s.data.train.subset(NAMES[::-1]), show=False), 'pass all classes in that order'),
    'a module for fewer classes': (lambda s: fine_tune(s.module, s.data.subset(['one', 'three']), 1), "unknown class 'two'"),
    'twice the same class': (lambda s: compose([s.module, s.module]), "class 'one' is in more than one module"),
    'no module': (lambda s: compose([]), 'no module given; compose at least one')}


@pytest.mark.parametrize('call, says', MISFITS.values(), ids=MISFITS)
def test_network_that_does_not_fit(call: Callable, says: str, scene: Any, no_training: None) -> None:
    before, was = state(scene.model), scene.model.training
    with pytest.raises(ValueError) as e: call(scene)
    assert says in str(e.value)
    assert same_state(before, state(scene.model)) and scene.model.training == was


def test_never_modularized(scene: Any) -> None:
    with pytest.raises(TypeError, match=r'SimCNN was never modularized.*use modularize\(model, ...\) and train it'): decompose(fresh(), scene.data.train)
    with pytest.raises(TypeError, match='SimCNN was never modularized'): decompose(plain(scene.model), scene.data.train)
    with pytest.raises(TypeError, match='SimCNN is not a modular model; extract from the one that was decomposed'): extract(fresh(), scene.parts, ['one'])
    with pytest.raises(TypeError, match='SimCNN is not an extracted module; use extract'): save_module(fresh(), 'nowhere.safetensors')
    with pytest.raises(TypeError, match='SimCNN is not an extracted module; extract one first'): compose([scene.module, fresh()])


def test_labels_out_of_range(data: ImageData) -> None:
    for wrong in (-1, 10):
        labels = data.train.labels.clone(); labels[7] = wrong
        with pytest.raises(ValueError, match=f'labels must lie between 0 and 9 .*found {wrong}; number the classes from 0'):
            Batches(data.train.images, labels, NAMES)
        with pytest.raises(ValueError, match=f'train labels must lie between 0 and 9 .*found {wrong}'):
            from_tensors((data.train.images, labels), (data.test.images, data.test.labels), classes=NAMES)


def test_class_without_samples(model: ModularModel, data: ImageData) -> None:
    there = data.train.labels != 3
    batches = Batches(data.train.images[there], data.train.labels[there], NAMES)
    with pytest.raises(ValueError, match="class 'three' has no samples; its kernels cannot be counted"): decompose(model, batches)


# Target classes

TARGETS: list[tuple[Any, str]] = [
    ([], 'no target class given; name at least one of zero, one'), (['one', 'one'], "'one' is given twice; name each once"),
    ([1, 'one'], "'one' is given twice"), ([10], 'class number 10 out of range: there are 10 classes, 0 to 9'), ([-1], 'class number -1 out of range'),
    ('', "unknown class ''"), ('ten', "unknown class 'ten'"), ([True], 'unknown class True'), ([1.0], 'unknown class 1.0'), ([None], 'unknown class None'),
    ([['one']], "unknown class ['one']"), (None, 'no target class given')]


@pytest.mark.parametrize('classes, says', TARGETS, ids=lambda v: repr(v)[:20])
def test_target_classes(classes: Any, says: str, model: ModularModel, parts: Parts) -> None:
    with pytest.raises((ValueError, TypeError)) as e: extract(model, parts, classes)
    assert says in str(e.value) and ('zero' in str(e.value) or 'name' in str(e.value) or '0 to 9' in str(e.value))


def test_parts_of_another_model(parts: Parts, module: SlimModule, data: ImageData) -> None:
    for other in (fresh(width=.2), fresh('rescnn')):
        with pytest.raises(ValueError, match='these parts are of another model.*decompose this model first'): extract(modularize(other, 10), parts, ['one'])
    renamed = modularize(fresh(), 10)
    renamed.classes = [name.upper() for name in NAMES]          # the same layers, trained on other classes
    with pytest.raises(ValueError, match='these parts are of another model'): extract(renamed, parts, ['one'])


# Files

PLACES = {
    'module': (lambda s, path: save_module(s.module, path), lambda s, path: load_module(path)),
    'parts': (lambda s, path: save_parts(s.parts, path), lambda s, path: load_parts(path)),
    'checkpoint': (lambda s, path: save_checkpoint(s.model, path, dict(epoch=1)), lambda s, path: load_checkpoint(copy.deepcopy(s.model), path))}
by_kind = pytest.mark.parametrize('kind', PLACES)


def spoiled(content: bytes) -> Iterator[tuple[str, bytes]]:
    "Versions of a file that a full disk, a bad cable or a stranger could leave."
    header = 8 + int.from_bytes(content[:8], 'little')
    for end in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(content) // 2, len(content) - 1): yield f'cut at {end}', content[:end]
    for at in {*range(8), *range(8, header, max(1, header // 40)), *range(header, len(content), max(1, (len(content) - header) // 15)), len(content) - 1}:
        yield f'byte {at}', content[:at] + bytes([content[at] ^ (1 if at % 2 else 0xff)]) + content[at + 1:]
    yield 'longer', content + b'\0'
    yield 'zeros', bytes(len(content))
    yield 'text', b'weights: to follow\n' * 40
    yield 'page', b'<!doctype html><title>404</title>'


@by_kind
def test_spoiled_file(kind: str, scene: Any, tmp_path: Path) -> None:
    save, load = PLACES[kind]
    path = save(scene, tmp_path/'whole.safetensors')
    load(scene, path)
    for what, content in spoiled(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError) as e: load(scene, path)
        assert str(path) in str(e.value), what


@by_kind
def test_file_that_is_not_ours(kind: str, scene: Any, tmp_path: Path) -> None:
    load, path = PLACES[kind][1], tmp_path/'theirs.safetensors'
    save_file(scene.model.state_dict(), path)
    with pytest.raises(ValueError, match=f'theirs.safetensors is not a {kind} written by mwt'): load(scene, path)
    for other in PLACES.keys() - {kind}:
        PLACES[other][0](scene, path)
        with pytest.raises(ValueError, match=f"theirs.safetensors is not a {kind} written by mwt .its format is 'mwt-{other}'"): load(scene, path)


@by_kind
def test_no_file(kind: str, scene: Any, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path/'none.safetensors'):
        with pytest.raises(FileNotFoundError) as e: PLACES[kind][1](scene, path)
        assert f'no {kind} at {path}' in str(e.value) and 'check the path' in str(e.value)


class Bomb:
    "Unpickling it creates a file."
    def __init__(self, path: Path) -> None: self.path = path
    def __reduce__(self) -> tuple: return Path.touch, (self.path,)


@by_kind
@pytest.mark.parametrize('dump', [lambda b, p: p.write_bytes(pickle.dumps(b)), lambda b, p: torch.save(b, p)], ids=['pickle', 'torch.save'])
def test_pickle_is_never_run(kind: str, dump: Callable, scene: Any, tmp_path: Path) -> None:
    path, crater = tmp_path/'bomb.safetensors', tmp_path/'crater'
    dump(Bomb(crater), path)
    with pytest.raises(ValueError, match='bomb.safetensors is truncated, damaged or no safetensors file'): PLACES[kind][1](scene, path)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists(), 'the bomb was no bomb'


# Descriptions that a stranger wrote, with a right checksum

def change(*path: Any, to: Any) -> Callable[[dict], None]:
    "Set the item at a path."
    def apply(about: dict) -> None:
        for key in path[:-1]: about = about[key]
        about[path[-1]] = to
    return apply


def drop(*path: Any) -> Callable[[dict], None]:
    "Remove the item at a path."
    def apply(about: dict) -> None:
        for key in path[:-1]: about = about[key]
        del about[path[-1]]
    return apply


def change_step(kind: str, /, **to: Any) -> Callable[[dict], None]:
    "Change the last step of a kind."
    return lambda about: [s for s in about['steps'] if s['kind'] == kind][-1].update(to)


FIRST = 'features.0.0'      # a convolution
FORGED: dict[str, Callable[[dict], None]] = {
    **{f'layer type {t!r}': change('layers', FIRST, 'type', to=t) for t in ('os.system', 'Module', '__class__', 'LSTM', 'conv2d', None, ['Conv2d'], {})},
    **{f'function {t}': change_step('layer', kind='function', target=t)
       for t in ('os.system', 'torch.load', 'builtins.eval', 'eval', 'operator.attrgetter', 'operator.methodcaller', '__class__', 'torch.hub.load', '')},
    **{f'method {t}': change_step('layer', kind='method', target=t)
       for t in ('__class__', '__reduce__', '__getattribute__', 'numpy', 'apply_', 'register_hook', 'backward', 'share_memory_', '')},
    **{f'attribute {t}': change_step('layer', kind='attribute', target=t) for t in ('__class__', '__dict__', 'grad_fn', 'data', 'shape.__class__', '')},
    **{f'kind {t!r}': change_step('layer', kind=t) for t in ('call_function', 'import', '__class__', '', None, ['layer'])},
    **{f'layer {t!r}': change_step('layer', target=t) for t in ('__class__', 'forward', 'features', 'features.0', 'load_state_dict', None, ['head'])},
    **{f'tensor {t!r}': change_step('layer', kind='tensor', target=t) for t in ('__class__', 'head.weight', 'description')},
    **{f'without {key}': drop(key) for key in ('classes', 'input_shape', 'layers', 'tensors', 'steps')},
    **{f'step without {key}': drop('steps', 1, key) for key in ('name', 'kind', 'target', 'args', 'kwargs')},
    **{f'{key} is {value!r}': change(key, to=value) for key in ('classes', 'input_shape', 'layers', 'tensors', 'steps') for value in (None, 3, 'x')},
    **{f'layer without {key}': drop('layers', FIRST, key) for key in ('type', 'in_channels', 'kernel_size')},
    'layer of another size': change('layers', FIRST, 'out_channels', to=5),
    'layer of a wrong argument': change('layers', FIRST, 'in_channels', to='__import__("os")'),
    'layer of an unknown argument': change('layers', FIRST, 'hook', to='os.system'),
    'layer of a huge size': change('layers', FIRST, 'in_channels', to=2**62),
    'layer in the place of a method': change('layers', 'forward', to=dict(type='ReLU')),
    'layer of no name': change('layers', '', to=dict(type='ReLU')),
    'layer nobody saved': change('layers', 'more', to=dict(type='Linear', in_features=2, out_features=2)),
    'tensor nobody saved': change('tensors', 'more', to=dict(shape=[2], parameter=True)),
    'no output': drop('steps', -1),
    'no input': drop('steps', 0),
    'no steps': change('steps', to=[]),
    'result nobody made': change_step('layer', args=[{'step': 'nothing'}]),
    'result of itself': change_step('layer', args=[{'step': 'head'}]),
    'argument of an unknown kind': change_step('layer', args=[{'eval': '1'}]),
    'too many arguments': change_step('layer', args=[{'step': 'x'}, 1, 2]),
    'too few classes': change('classes', to=['one']),
    'the same class twice': change('classes', to=['one', 'one']),
    'classes without words': change('classes', to=[1, None]),
    'images of another shape': change('input_shape', to=[3, 8, 8]),
    'images without a shape': change('input_shape', to=['a', 'b', 'c'])}


@pytest.mark.parametrize('forge', FORGED.values(), ids=FORGED)
def test_forged_module(forge: Callable[[dict], None], module: SlimModule, tmp_path: Path) -> None:
    about = copy.deepcopy(module.description)
    forge(about)
    path = save_tensors(tmp_path/'forged.safetensors', 'module', module.state_dict(), about)
    with pytest.raises(ValueError) as e: load_module(path)
    assert str(path) in str(e.value)


@by_kind
@pytest.mark.parametrize('about', [None, [], 3, 'x', {}], ids=repr)
def test_description_of_another_type(kind: str, about: Any, scene: Any, tmp_path: Path) -> None:
    tensors = dict(module=scene.module.state_dict(), parts={k: getattr(scene.parts, k) for k in ('frequency', 'modules', 'thresholds', 'cohesion')},
                   checkpoint=scene.model.state_dict())[kind]
    path = save_tensors(tmp_path/'odd.safetensors', kind, tensors, about)
    with pytest.raises(ValueError) as e: PLACES[kind][1](scene, path)
    assert str(path) in str(e.value)


PARTS_FAULTS: dict[str, Callable[[dict, dict], Any]] = {
    **{f'without {key}': lambda tensors, about, key=key: about.pop(key) for key in ('classes', 'sizes', 'samples')},
    **{f'without {key}': lambda tensors, about, key=key: tensors.pop(key) for key in ('frequency', 'modules', 'thresholds', 'cohesion')},
    'with something more': lambda tensors, about: tensors.update(more=torch.zeros(1)),
    'a class too many': lambda tensors, about: about['classes'].append('ten'),
    'a kernel too many': lambda tensors, about: about['sizes'].update(more=1),
    'a kernel too few': lambda tensors, about: tensors.update(modules=tensors['modules'][:, 1:]),
    'modules that are numbers': lambda tensors, about: tensors.update(modules=tensors['modules'].float())}


@pytest.mark.parametrize('fault', PARTS_FAULTS.values(), ids=PARTS_FAULTS)
def test_forged_parts(fault: Callable[[dict, dict], Any], parts: Parts, tmp_path: Path) -> None:
    tensors = {k: getattr(parts, k) for k in ('frequency', 'modules', 'thresholds', 'cohesion')}
    about = dict(classes=list(parts.classes), sizes=dict(parts.sizes), samples=parts.samples)
    fault(tensors, about)
    path = save_tensors(tmp_path/'forged.safetensors', 'parts', tensors, about)
    with pytest.raises(ValueError) as e: load_parts(path)
    assert str(path) in str(e.value)


OTHERS = {'wider': lambda: modularize(fresh(width=.12), 10), 'another network': lambda: modularize(fresh('rescnn'), 10), 'plain': fresh,
          'fewer classes': lambda: modularize(fresh(num_classes=7), 7)}


@pytest.mark.parametrize('other', OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_network(other: Callable[[], nn.Module], model: ModularModel, tmp_path: Path) -> None:
    target = copy.deepcopy(model)
    path = save_checkpoint(other(), tmp_path/'other.safetensors')
    with pytest.raises(ValueError) as e: load_checkpoint(target, path)
    assert f'{path} holds the weights of another network' in str(e.value) and '\n' not in str(e.value)
    assert same_state(state(model), state(target)), 'a file that does not fit has changed weights'


# Training that fails

def test_loss_that_is_no_number(data: ImageData, tmp_path: Path) -> None:
    model, path = modularize(fresh(), 10), tmp_path/'model.safetensors'
    fit(model, data, 1, checkpoint=path, show=False)
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match='loss became nan in epoch 1; try a lower lr than 1e[+]30'):
        fit(model, data, 2, lr=1e30, checkpoint=path, show=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_loss_that_turns_nan_keeps_the_best_epoch(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps, factor = tmp_path/'model.safetensors', len(data.train), mwt.training.lr_factor
    good = modularize(fresh(), 10, 'mwt')
    bad = copy.deepcopy(good)
    fit(good, data, 1, warmup=1., checkpoint=path, show=False)
    path.rename(tmp_path/'expected.safetensors')
    monkeypatch.setattr(mwt.training, 'lr_factor', lambda step, total, warmup: factor(step, steps, warmup) if step < steps else 1e30)
    with pytest.raises(FloatingPointError, match='in epoch 2; try a lower lr'): fit(bad, data, 3, warmup=1., checkpoint=path, show=False)
    load_checkpoint(bad, path)
    load_checkpoint(good, tmp_path/'expected.safetensors')
    assert same_state(state(bad), state(good)) and len(tree(tmp_path)) == 2


def test_weights_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    "The loss of an epoch's last step says nothing about the weights after it."
    data, model, path = image_data('digits', batch_size=1000, device='cpu'), modularize(fresh(), 10), tmp_path/'model.safetensors'
    assert len(data.train) == 1
    with pytest.raises(FloatingPointError, match='try a lower lr'): fit(model, data, 1, lr=1e39, warmup=0., checkpoint=path, show=False)
    assert not path.exists()


# The command line: exit status 2, one line, and every file as it was

def tree(folder: Path) -> dict[str, str]:
    "Every file of a folder with a hash of its content; folders too."
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else 'folder' for p in sorted(folder.rglob('*'))}


def command(*words: Any) -> int:
    try: return main([str(w) for w in words])
    except SystemExit as e: return e.code           # argparse leaves so


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a whole run in it; not to be changed."
    out = tmp_path_factory.mktemp('runs')/'digits'
    assert command('train', '--data', 'digits', '--width', .1, '--epochs', 1, '--out', out, '--device', 'cpu') == 0
    for rest in (['decompose'], ['extract', '1,2', '3'], ['evaluate'], ['report']): assert command(*rest, '--out', out, '--device', 'cpu') == 0
    assert len(tree(out)) == 9
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    "A copy of it."
    return Path(shutil.copytree(finished, tmp_path/'run'))


def refused(capsys: pytest.CaptureFixture, *words: Any) -> str:
    "The one line that a command says on its way out."
    capsys.readouterr()
    assert command(*words) == 2
    out, err = capsys.readouterr()
    assert err.startswith('mwt: ') and err.count('\n') == 1 and len(err) < 2500 and 'Traceback' not in err
    return err


def picture(path: Path, seed: int = 0, channels: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path)


WRONG_TRAIN: dict[str, tuple[list[Any], str]] = {
    'data set': (['--data', 'digitz'], "'digitz'; did you mean 'digits'?"), 'folder': (['--data', 'no/such/folder'], 'no folder no/such/folder'),
    'model': (['--model', 'simcn'], "'simcn'; did you mean 'simcnn'?"), 'method': (['--method', 'mtw'], "'mtw'; did you mean 'mwt'?"),
    'almost plain': (['--method', 'plian'], "'plian'; did you mean 'plain'?"),
    'channels': (['--model', 'torchvision/resnet18'], 'takes 3 channels'),
    'width of torchvision': (['--model', 'torchvision/resnet18', '--width', .5], 'width 0.5'),
    **{f'{name} {value}': (['--method', 'mwt', f'--{name}', value], f'{name} must be a') for name in ('alpha', 'beta') for value in (-1, nan, inf)},
    'setting of another method': (['--alpha', 1], "'composable' has no setting 'alpha'"),
    **{f'{name} {value}': ([f'--{name}', value], f"{name.replace('-', '_')} must be a") for name, values in {
        'width': [0, -1, 9, nan], 'target-krr': [0, -1, 1.5, nan], 'epochs': [0, -1], 'batch-size': [0, -1], 'lr': [0, -1, nan, inf],
        'momentum': [-1, 1, nan], 'weight-decay': [-1, nan, inf], 'warmup': [-1, 2, nan], 'valid': [0, 1, -1, nan], 'size': [0, -1],
        'seed': [-1, 2**32]}.items()
       for value in values},
    'weight of nothing': (['--method', 'plain', '--alpha', nan], 'alpha'), 'device': (['--device', 'cudda'], "'cudda' is not one that PyTorch knows")}


@pytest.mark.parametrize('wrong, says', WRONG_TRAIN.values(), ids=WRONG_TRAIN)
def test_wrong_setting_changes_no_run(wrong: list, says: str, run: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    before = tree(run.parent)
    words = ['train', '--data', 'digits', '--width', .1, '--epochs', 1, '--out', run, '--root', run.parent/'data', '--overwrite', *wrong]
    if '--model' in wrong and '--width' not in wrong: words[3:5] = []
    assert says in refused(capsys, *words)
    assert tree(run.parent) == before


@pytest.mark.parametrize('wrong, says', [WRONG_TRAIN[k] for k in ('data set', 'model', 'epochs 0', 'lr nan', 'width 0')])
def test_wrong_setting_makes_no_folder(wrong: list, says: str, tmp_path: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    assert says in refused(capsys, 'train', '--data', 'digits', '--width', .1, '--out', tmp_path/'new', '--root', tmp_path/'data', *wrong)
    assert not tree(tmp_path)


def test_another_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    before = tree(run)
    for words in (['train', '--data', 'digits', '--width', .1], ['demo', '--epochs', 1]):
        said = refused(capsys, *words, '--out', run)
        assert f'{run} already holds a run' in said and 'name another folder' in said and '--overwrite' in said
    said = refused(capsys, 'train', '--data', 'digits', '--out', run/'run.json')
    assert 'run.json is a file; name a folder' in said
    assert tree(run) == before


def test_folder_below_a_file(run: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    before = tree(run)
    assert 'run.json' in refused(capsys, 'train', '--data', 'digits', '--width', .1, '--out', run/'run.json'/'deeper')
    assert tree(run) == before


@pytest.mark.parametrize('wrong', [['--epochs', 0], ['--seed', -1], ['--device', 'cudda']], ids=' '.join(['{}']).format)
@pytest.mark.parametrize('overwrite', [[], ['--overwrite']], ids=['', 'overwrite'])
def test_wrong_demo_changes_nothing(wrong: list, overwrite: list, run: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    before = tree(run.parent)
    refused(capsys, 'demo', '--out', run if overwrite else run.parent/'new', *overwrite, *wrong)
    assert tree(run.parent) == before


WRONG_LATER: dict[str, tuple[list[Any], str]] = {
    **{f'threshold {t}': (['decompose', '--threshold', t], f'threshold must be a number above 0 and at most 1, not {float(t)}') for t in (0, -1, 1.5, nan)},
    'device': (['decompose', '--device', 'cudda'], "'cudda'"),
    'unknown class': (['extract', 'one'], "unknown class 'one' (known: '0', '1'"), 'no class': (['extract', ','], 'no target class given; name at least one of 0, 1'),
    'empty word': (['extract', ''], 'no target class given'), 'twice': (['extract', '1,1'], "'1' is given twice"),
    'number': (['extract', '10'], 'class number 10 out of range'),
    'negative': (['extract', '-1'], "unknown class '-1'"), 'second group': (['extract', '4,5', 'one'], "unknown class 'one'"),
    'no module file': (['evaluate', 'none.safetensors'], 'no module at none.safetensors; check the path'),
    'folder as a module': (['evaluate', '.'], 'no module at .')}


@pytest.mark.parametrize('words, says', WRONG_LATER.values(), ids=WRONG_LATER)
def test_wrong_step_changes_no_run(words: list, says: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    before = tree(run)
    assert says in refused(capsys, *words, '--out', run)
    assert tree(run) == before


COMMANDS = ('decompose', 'extract', 'evaluate', 'report')


@pytest.mark.parametrize('name', COMMANDS)
def test_folder_without_a_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for out in (tmp_path, tmp_path/'none'):
        said = refused(capsys, name, '--out', out)
        assert str(out) in said and ('mwt train' in said or 'make one first' in said)
    assert not tree(tmp_path)


SPOILED = [('run.json', COMMANDS), ('model.safetensors', ('decompose', 'extract', 'evaluate')), ('parts.safetensors', ('extract', 'evaluate', 'report')),
           ('modules/3.safetensors', ('evaluate',)), ('history.json', ('report',)), ('metrics.json', ('report',))]


@pytest.mark.parametrize('content', ['', '{', '{}', '[]', 'half'])
@pytest.mark.parametrize('name, used', SPOILED, ids=[name for name, _ in SPOILED])
def test_spoiled_file_of_a_run(name: str, used: tuple, content: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    whole = (run/name).read_bytes()
    (run/name).write_bytes(whole[:len(whole) // 2] if content == 'half' else content.encode())
    before = tree(run)
    for word in used: assert str(run/name) in refused(capsys, word, '--out', run)
    assert tree(run) == before


@pytest.mark.parametrize('name, used', [('model.safetensors', ('decompose', 'extract', 'evaluate')), ('parts.safetensors', ('extract',)),
                                        ('history.json', ('report',))])
def test_missing_file_of_a_run(name: str, used: tuple, run: Path, capsys: pytest.CaptureFixture) -> None:
    (run/name).unlink()
    for word in used:
        said = refused(capsys, word, '--out', run)
        assert str(run/name) in said and ('make one first' in said or 'train' in said)


def test_checkpoint_of_another_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    save_checkpoint(modularize(fresh(width=.2), 10), run/'model.safetensors')
    before = tree(run)
    assert 'holds the weights of another network' in refused(capsys, 'decompose', '--out', run)
    assert tree(run) == before


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'empty': (lambda f: f.mkdir(), 'pictures holds no class folders; put each class'),
    'one class': (lambda f: picture(f/'cat'/'0.png'), "holds one class folder only, 'cat'; put each class"),
    'no folders': (lambda f: picture(f/'0.png'), 'holds images but no class folders; put each class'),
    'a file': (lambda f: f.write_text('cats'), 'pictures is a file, not a folder of images'),
    'empty class': (lambda f: [picture(f/'cat'/'0.png'), (f/'dog').mkdir()], 'dog holds no image; add some, or remove the folder')}


@pytest.mark.parametrize('make, says', FOLDERS.values(), ids=FOLDERS)
def test_folder_that_is_no_data_set(make: Callable, says: str, tmp_path: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    make(tmp_path/'pictures')
    before = tree(tmp_path)
    assert says in refused(capsys, 'train', '--data', tmp_path/'pictures', '--width', .1, '--out', tmp_path/'run', '--root', tmp_path/'data')
    assert tree(tmp_path) == before


@pytest.mark.parametrize('overwrite', [[], ['--overwrite']], ids=['', 'overwrite'])
def test_unreadable_image(overwrite: list, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    for name in ('cat', 'dog'):
        for i in range(20): picture(tmp_path/'pictures'/name/f'{i}.png', i)
    broken = tmp_path/'pictures'/'dog'/'7.png'
    broken.write_bytes(broken.read_bytes()[:60])
    before = tree(tmp_path)
    out = run if overwrite else tmp_path/'new'
    said = refused(capsys, 'train', '--data', tmp_path/'pictures', '--width', .1, '--out', out, '--root', tmp_path/'data', *overwrite)
    assert f'{broken} is not a readable image' in said and 'repair or remove it' in said
    assert tree(tmp_path) == before


def test_channels_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    for name in ('cat', 'dog'):
        for i in range(20): picture(tmp_path/'pictures'/name/f'{i}.png', i, channels=1)
    said = refused(capsys, 'train', '--data', tmp_path/'pictures', '--model', 'torchvision/vgg11_bn', '--out', tmp_path/'run', '--root', tmp_path/'data')
    assert 'takes 3 channels, not width 1.0 and 1 channels; use one of simcnn' in said
    assert not (tmp_path/'run').exists()


def test_download_that_fails(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, no_training: None) -> None:
    def offline(*args: Any, **kwargs: Any) -> None: raise OSError('no route to host')
    monkeypatch.setattr('torchvision.datasets.CIFAR10', offline)
    before = tree(run)
    said = refused(capsys, 'train', '--data', 'cifar10', '--width', .1, '--out', run, '--root', tmp_path/'data', '--overwrite')
    assert "could not get 'cifar10'" in said and 'no route to host' in said and 'check the network' in said
    assert tree(run) == before


@pytest.mark.parametrize('words', [[], ['trian'], ['train'], ['train', '--data', 'digits'], ['train', '--epochs', 'many', '--data', 'digits', '--out', 'x'],
                                   ['train', '--data', 'digits', '--out', 'x', '--dataset', 'y'], ['decompose'], ['extract', 'cat'], ['demo', '--epochs']],
                         ids=lambda w: ' '.join(w) or 'nothing')
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith('usage: mwt') and 'error:' in err.splitlines()[-1] and 'Traceback' not in err
    assert not tree(tmp_path)
