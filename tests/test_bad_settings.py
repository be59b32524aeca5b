"A wrong name, number, network or class meets an error that names the value and the way out, before any work."
from __future__ import annotations
from collections.abc import Callable
from typing import Any
import pytest
import torch
from bad_input import NAMES, fresh, inf, nan, no_training, same_state, scene, state
from torch import nn
from mwt.core.signature import Signature
from mwt.data.batches import Batches, from_tensors
from mwt.data.sources import image_data
from mwt.measure import evaluate, profiles
from mwt.methods.base import METHODS, make_method
from mwt.methods.modular import modularize, plain
from mwt.modules.compose import compose, fine_tune
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import save_module
from mwt.modules.parts import plot_masks
from mwt.networks import NETWORKS, create_model
from mwt.train.fit import fit
from mwt.train.history import TrainConfig


# Names

UNKNOWN_NAMES = {
    'data set': (lambda s: image_data('digit'), 'digit', 'digits'),
    'data set in capitals': (lambda s: image_data('CIFAR10'), 'CIFAR10', 'cifar10'),
    'model': (lambda s: create_model('simcn'), 'simcn', 'simcnn'),
    'model of torchvision': (lambda s: create_model('torchvision/resnet81'),
                             'torchvision/resnet81', 'torchvision/resnet18'),
    'method': (lambda s: modularize(fresh(), 10, method='mtw'), 'mtw', 'mwt'),
    'setting of the method': (lambda s: modularize(fresh(), 10, 'mwt', betta=1.), 'betta', 'beta'),
    'option of fit': (lambda s: fit(fresh(), s.data, momentun=.9), 'momentun', 'momentum'),
    'class to extract': (lambda s: extract(s.model, s.parts, ['tow']), 'tow', 'two'),
    'class of the data': (lambda s: s.data.subset(['one', 'thre']), 'thre', 'three'),
    'class to judge': (lambda s: evaluate(s.model, s.data.test, ['sevn']), 'sevn', 'seven'),
    'layer': (lambda s: plot_masks(s.parts, 'features.1.1'), 'features.1.1', 'features.1.0')}


@pytest.mark.parametrize('call, given, meant', UNKNOWN_NAMES.values(), ids=UNKNOWN_NAMES)
def test_unknown_name_meets_the_nearest(call: Callable, given: str, meant: str, scene: Any,
                                        no_training: None) -> None:
    with pytest.raises(ValueError) as e: call(scene)
    said = str(e.value)
    assert repr(given) in said and f'did you mean {meant!r}?' in said and 'known:' in said


KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    'model': (create_model, ', '.join(map(repr, NETWORKS))),
    'method': (lambda v: modularize(fresh(), 10, method=v), ', '.join(map(repr, METHODS))),
    'data set': (image_data, 'digits, cifar10, cifar100, svhn')}


@pytest.mark.parametrize('value', [None, 3, True, ['simcnn']], ids=repr)
@pytest.mark.parametrize('kind', KINDS)
def test_name_of_another_type(kind: str, value: Any) -> None:
    "The error names the value and every name that would have been right."
    call, known = KINDS[kind]
    with pytest.raises((ValueError, TypeError)) as e: call(value)
    assert repr(value) in str(e.value) and known in str(e.value)


# Numbers

NO_NUMBERS = [None, 'many', True, [1]]
NO_FRACTIONS = [-.1, nan, inf, *NO_NUMBERS]         # wrong for every setting that is a number
NO_COUNTS = [-1, 1.5, nan, inf, *NO_NUMBERS]        # wrong for every setting that is a whole number
NO_SIZES = [v for v in NO_COUNTS if v is not None]

SETTINGS: dict[str, tuple[Callable[[Any, Any], Any], list[Any]]] = {
    'alpha': (lambda s, v: modularize(fresh(), 10, 'mwt', alpha=v), NO_FRACTIONS),
    'beta': (lambda s, v: modularize(fresh(), 10, 'mwt', beta=v), NO_FRACTIONS),
    'reduction': (lambda s, v: modularize(fresh(), 10, 'mwt', reduction=v), [0, *NO_COUNTS]),
    'target_krr': (lambda s, v: modularize(fresh(), 10, target_krr=v),
                   [0, 1.1, 15, *(v for v in NO_FRACTIONS if v is not None)]),
    'separation': (lambda s, v: modularize(fresh(), 10, separation=v), NO_FRACTIONS),
    'full_fraction': (lambda s, v: modularize(fresh(), 10, full_fraction=v), [1.1, *NO_FRACTIONS]),
    'close_from': (lambda s, v: modularize(fresh(), 10, close_from=v), [1.1, *NO_FRACTIONS]),
    'closed_by': (lambda s, v: modularize(fresh(), 10, close_from=.3, closed_by=v), [.2, 1.1, *NO_FRACTIONS]),
    'decay': (lambda s, v: modularize(fresh(), 10, decay=v), [1, 1.1, *NO_FRACTIONS]),
    'n_classes': (lambda s, v: modularize(fresh(), v), [0, 1, *NO_COUNTS]),
    'num_classes': (lambda s, v: create_model('simcnn', v), [0, 1, *NO_COUNTS]),
    'width': (lambda s, v: create_model('simcnn', width=v), [0, 8.1, *NO_FRACTIONS]),
    'in_channels': (lambda s, v: create_model('simcnn', in_channels=v), [0, *NO_COUNTS]),
    'batch_size': (lambda s, v: image_data('digits', batch_size=v), [0, *NO_COUNTS]),
    'valid': (lambda s, v: image_data('digits', valid=v), [0, 1, 1.5, *NO_FRACTIONS]),
    'size': (lambda s, v: image_data('digits', size=v), [0, *NO_SIZES]),
    'epochs': (lambda s, v: fit(fresh(), s.data, v), [0, *NO_COUNTS]),
    'seed': (lambda s, v: fit(fresh(), s.data, 1, seed=v), [2**32, *NO_COUNTS]),
    'lr': (lambda s, v: fit(fresh(), s.data, 1, lr=v), [0, *NO_FRACTIONS]),
    'momentum': (lambda s, v: fit(fresh(), s.data, 1, momentum=v), [1, 1.1, *NO_FRACTIONS]),
    'weight_decay': (lambda s, v: fit(fresh(), s.data, 1, weight_decay=v), NO_FRACTIONS),
    'warmup': (lambda s, v: fit(fresh(), s.data, 1, warmup=v), [1.1, *NO_FRACTIONS]),
    'threshold': (lambda s, v: decompose(s.model, s.data.train, v), [0, 1.01, 90, *NO_FRACTIONS]),
    'samples': (lambda s, v: decompose(s.model, s.data.train, samples=v), [0, 1, *NO_COUNTS]),
    'repeats': (lambda s, v: profiles([s.module], repeats=v), [0, *NO_COUNTS])}
WRONG_NUMBERS = [(name, value) for name, (_, values) in SETTINGS.items() for value in values]


@pytest.mark.parametrize('name, value', WRONG_NUMBERS, ids=lambda v: v if isinstance(v, str) else repr(v))
def test_number_out_of_range(name: str, value: Any, scene: Any, no_training: None) -> None:
    with pytest.raises((ValueError, TypeError)) as e: SETTINGS[name][0](scene, value)
    assert str(e.value).startswith(f'{name} must be a') and repr(value) in str(e.value)


def test_recipe_in_a_config_is_checked_too() -> None:
    with pytest.raises(ValueError, match='lr must be a number above 0, not -1'): TrainConfig(lr=-1)
    with pytest.raises(ValueError, match='beta must be a number at least 0, not -1'):
        make_method('mwt', beta=-1)
    with pytest.raises(ValueError, match=r"settings \['beta'\] given beside a ready-made method"):
        make_method(make_method('mwt'), beta=1)


# Networks that do not fit

DENSE = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
ONE_CONV = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def answer_for_targets(s: Any) -> Any:
    "Ask masks that are made of images for those of classes."
    return modularize(fresh(), 10, 'mwt')(torch.zeros(1, 1, 8, 8), torch.ones(1, 10).bool())


MISFITS = {
    'no convolution': (lambda s: modularize(DENSE, 10),
                       'Sequential has no nn.Conv2d layer; only convolutional networks'),
    'no convolution, trained': (lambda s: fit(DENSE, s.data, 1),
                                'Sequential has no nn.Conv2d layer; only convolutional networks'),
    'only the first': (lambda s: modularize(ONE_CONV, 10, 'mwt'), 'no layer is left to mask (0: the first'),
    'a filter that leaves nothing': (lambda s: modularize(fresh(), 10, filter_fn=lambda layer, name: False),
                                     'no layer is left to mask (features.0.0: left out by filter_fn'),
    'targets for masks of images': (answer_for_targets, 'of each image, not of classes'),
    'modularized twice': (lambda s: modularize(s.model, 10),
                          'ModularModel is already modularized; take the masks off with plain'),
    'masked inside': (lambda s: modularize(s.model.net, 10),
                      'already modularized; take the masks off with plain'),
    'other number of classes': (lambda s: modularize(fresh(), 7),
                                'answers for 10 classes, but n_classes is 7; give the number'),
    'channels, trained': (lambda s: fit(fresh(), s.colour, 1),
                          'takes images of 1 channels, the data has 3; make the network with in_channels=3'),
    'channels, decomposed': (lambda s: decompose(s.model, s.colour.train, show_progress=False),
                             'images of 1 channels, the data has 3'),
    'channels, evaluated': (lambda s: evaluate(s.model, s.colour.test),
                            'images of 1 channels, the data has 3'),
    'channels of torchvision': (lambda s: create_model('torchvision/resnet18', in_channels=1),
                                'takes 3 channels, not width 1.0 and 1 channels; use one of simcnn'),
    'outputs': (lambda s: fit(fresh(num_classes=7), s.data, 1),
                'answers for 7 classes, the data has 10; make the network with num_classes=10'),
    'fewer classes, decomposed': (lambda s: decompose(s.model, s.data.train.subset(['one', 'two'])),
                                  "the data has ['one', 'two']; pass data of all its classes"),
    'a module for fewer classes': (lambda s: fine_tune(s.module, s.data.subset(['one', 'three']), 1),
                                   "unknown class 'two'"),
    'twice the same class': (lambda s: compose([s.module, s.module], share=False),
                             "class 'one' is in more than one module"),
    'no module': (lambda s: compose([]), 'no module given; compose at least one')}


@pytest.mark.parametrize('call, says', MISFITS.values(), ids=MISFITS)
def test_network_that_does_not_fit(call: Callable, says: str, scene: Any, no_training: None) -> None:
    before, was = state(scene.model), scene.model.training
    with pytest.raises(ValueError) as e: call(scene)
    assert says in str(e.value)
    assert same_state(before, state(scene.model)) and scene.model.training == was


NEVER_MODULARIZED = {
    'decomposed': (lambda s: decompose(fresh(), s.data.train),
                   r'SimCNN was never modularized.*use modularize\(model, ...\) and train it'),
    'plain, decomposed': (lambda s: decompose(plain(s.model), s.data.train), 'SimCNN was never modularized'),
    'extracted from': (lambda s: extract(fresh(), s.parts, ['one']),
                       'SimCNN was never modularized.*extract from the one that was decomposed'),
    'saved': (lambda s: save_module(fresh(), 'nowhere.safetensors'),
              'SimCNN is not an extracted module; use extract'),
    'composed': (lambda s: compose([s.module, fresh()]),
                 'SimCNN is not an extracted module; extract one first')}


@pytest.mark.parametrize('call, says', NEVER_MODULARIZED.values(), ids=NEVER_MODULARIZED)
def test_never_modularized(call: Callable, says: str, scene: Any) -> None:
    with pytest.raises(TypeError, match=says): call(scene)


@pytest.mark.parametrize('wrong', [-1, 10])
def test_labels_out_of_range(wrong: int, scene: Any) -> None:
    data = scene.data
    labels = data.train.labels.clone()
    labels[7] = wrong
    says = f'labels must lie between 0 and 9 .*found {wrong}'
    with pytest.raises(ValueError, match=f'{says}; number the classes from 0'):
        Batches(data.train.images, labels, NAMES)
    with pytest.raises(ValueError, match=f'train {says}'):
        from_tensors((data.train.images, labels), (data.test.images, data.test.labels), classes=NAMES)


def test_class_without_samples(scene: Any) -> None:
    train = scene.data.train
    there = train.labels != 3
    batches = Batches(train.images[there], train.labels[there], NAMES)
    with pytest.raises(ValueError, match="class 'three' has no samples; its kernels cannot be counted"):
        decompose(scene.model, batches)


# Target classes

TARGETS: list[tuple[Any, str]] = [
    ([], 'no target class given; name at least one of zero, one'),
    (None, 'no target class given; name at least one of zero, one'),
    (['one', 'one'], "'one' is given twice; name each once"),
    ([1, 'one'], "'one' is given twice; name each once"),
    ([10], 'class number 10 out of range: there are 10 classes, 0 to 9'),
    ([-1], 'class number -1 out of range: there are 10 classes, 0 to 9'),
    *((given, f'unknown class {value!r}') for given, value in [
        ('', ''), ('ten', 'ten'), ([True], True), ([1.0], 1.0), ([None], None), ([['one']], ['one'])])]


@pytest.mark.parametrize('classes, says', TARGETS, ids=lambda v: repr(v)[:20])
def test_target_classes(classes: Any, says: str, scene: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as e: extract(scene.model, scene.parts, classes)
    known = "known: 'zero', 'one', 'two'" if says.startswith('unknown') else ''
    assert says in str(e.value) and known in str(e.value)


@pytest.mark.parametrize('other', [dict(width=.2), dict(name='rescnn')], ids=['wider', 'another network'])
def test_parts_of_another_model(other: dict, scene: Any) -> None:
    with pytest.raises(ValueError, match='these parts are of another model.*decompose this model first'):
        extract(modularize(fresh(**other), 10), scene.parts, ['one'])


def test_parts_of_other_classes(scene: Any) -> None:
    "The same layers, trained on other classes."
    renamed = modularize(fresh(), 10)
    renamed.signature = Signature([name.upper() for name in NAMES])
    with pytest.raises(ValueError, match='these parts are of another model'):
        extract(renamed, scene.parts, ['one'])
