"A file that is spoiled, forged or not ours is refused by name; nothing in it is run, and nothing is changed."
from __future__ import annotations
import copy, pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import pytest
import torch
from bad_input import fresh, same_state, scene, state
from safetensors.torch import save_file
from torch import nn
from mwt.core.files import save_tensors
from mwt.methods.modular import modularize
from mwt.modules.module import load_module, save_module
from mwt.modules.parts import load_parts, save_parts
from mwt.train.checkpoint import load_checkpoint, save_checkpoint


PLACES = {
    'module': (lambda s, path: save_module(s.module, path), lambda s, path: load_module(path)),
    'parts': (lambda s, path: save_parts(s.parts, path), lambda s, path: load_parts(path)),
    'checkpoint': (lambda s, path: save_checkpoint(s.model, path, dict(epoch=1)),
                   lambda s, path: load_checkpoint(copy.deepcopy(s.model), path))}
by_kind = pytest.mark.parametrize('kind', PLACES)


def spoiled(content: bytes) -> Iterator[tuple[str, bytes]]:
    "Versions of a file that a full disk, a bad cable or a stranger could leave."
    header = 8 + int.from_bytes(content[:8], 'little')
    end = len(content)
    for cut in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, end // 2, end - 1):
        yield f'cut at {cut}', content[:cut]
    in_header = range(8, header, max(1, header // 40))
    in_tensors = range(header, end, max(1, (end - header) // 15))
    for at in {*range(8), *in_header, *in_tensors, end - 1}:
        flipped = content[at] ^ (1 if at % 2 else 0xff)
        yield f'byte {at}', content[:at] + bytes([flipped]) + content[at + 1:]
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
    says = f'theirs.safetensors is not a {kind} written by mwt'
    with pytest.raises(ValueError, match=says): load(scene, path)
    for other in PLACES.keys() - {kind}:
        PLACES[other][0](scene, path)
        with pytest.raises(ValueError, match=f"{says} .its format is 'mwt-{other}'"): load(scene, path)


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
@pytest.mark.parametrize('dump', [lambda b, p: p.write_bytes(pickle.dumps(b)), lambda b, p: torch.save(b, p)],
                         ids=['pickle', 'torch.save'])
def test_pickle_is_never_run(kind: str, dump: Callable, scene: Any, tmp_path: Path) -> None:
    path, crater = tmp_path/'bomb.safetensors', tmp_path/'crater'
    dump(Bomb(crater), path)
    with pytest.raises(ValueError, match='bomb.safetensors is truncated, damaged or no safetensors file'):
        PLACES[kind][1](scene, path)
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
KEYS = ('classes', 'input_shape', 'layers', 'tensors', 'steps')
TYPES = ('os.system', 'Module', '__class__', 'LSTM', 'conv2d', None, ['Conv2d'], {})
LAYERS = ('__class__', 'forward', 'features', 'features.0', 'load_state_dict', None, ['head'])
KINDS = ('call_function', 'import', '__class__', '', None, ['layer'])
TARGETS = {
    'function': ('os.system', 'torch.load', 'builtins.eval', 'eval', 'operator.attrgetter',
                 'operator.methodcaller', '__class__', 'torch.hub.load', ''),
    'method': ('__class__', '__reduce__', '__getattribute__', 'numpy', 'apply_', 'register_hook', 'backward',
               'share_memory_', ''),
    'attribute': ('__class__', '__dict__', 'grad_fn', 'data', 'shape.__class__', ''),
    'tensor': ('__class__', 'head.weight', 'description')}
FORGED: dict[str, Callable[[dict], None]] = {
    **{f'layer type {t!r}': change('layers', FIRST, 'type', to=t) for t in TYPES},
    **{f'{kind} {t}': change_step('layer', kind=kind, target=t) for kind, ts in TARGETS.items() for t in ts},
    **{f'kind {t!r}': change_step('layer', kind=t) for t in KINDS},
    **{f'layer {t!r}': change_step('layer', target=t) for t in LAYERS},
    **{f'without {key}': drop(key) for key in KEYS},
    **{f'step without {key}': drop('steps', 1, key) for key in ('name', 'kind', 'target', 'args', 'kwargs')},
    **{f'{key} is {value!r}': change(key, to=value) for key in KEYS for value in (None, 3, 'x')},
    **{f'layer without {key}': drop('layers', FIRST, key) for key in ('type', 'in_channels', 'kernel_size')},
    'layer of another size': change('layers', FIRST, 'out_channels', to=77),
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
def test_forged_module(forge: Callable[[dict], None], scene: Any, tmp_path: Path) -> None:
    module = scene.module
    about = copy.deepcopy(module.description)
    forge(about)
    path = save_tensors(tmp_path/'forged.safetensors', 'module', module.state_dict(), about)
    with pytest.raises(ValueError) as e: load_module(path)
    assert str(path) in str(e.value)


def parts_tensors(scene: Any) -> dict[str, torch.Tensor]:
    "The tensors of a file of parts."
    return {k: getattr(scene.parts, k) for k in ('frequency', 'kept', 'thresholds', 'cohesion')}


@by_kind
@pytest.mark.parametrize('about', [None, [], 3, 'x', {}], ids=repr)
def test_description_of_another_type(kind: str, about: Any, scene: Any, tmp_path: Path) -> None:
    tensors = dict(module=scene.module.state_dict(), parts=parts_tensors(scene),
                   checkpoint=scene.model.state_dict())
    path = save_tensors(tmp_path/'odd.safetensors', kind, tensors[kind], about)
    with pytest.raises(ValueError) as e: PLACES[kind][1](scene, path)
    assert str(path) in str(e.value)


PARTS_FAULTS: dict[str, Callable[[dict, dict], Any]] = {
    **{f'without {key}': lambda tensors, about, key=key: about.pop(key)
       for key in ('classes', 'sizes', 'samples')},
    **{f'without {key}': lambda tensors, about, key=key: tensors.pop(key)
       for key in ('frequency', 'kept', 'thresholds', 'cohesion')},
    'with something more': lambda tensors, about: tensors.update(more=torch.zeros(1)),
    'a class too many': lambda tensors, about: about['classes'].append('ten'),
    'a kernel too many': lambda tensors, about: about['sizes'].update(more=1),
    'a kernel too few': lambda tensors, about: tensors.update(kept=tensors['kept'][:, 1:]),
    'kernels kept as numbers': lambda tensors, about: tensors.update(kept=tensors['kept'].float())}


@pytest.mark.parametrize('fault', PARTS_FAULTS.values(), ids=PARTS_FAULTS)
def test_forged_parts(fault: Callable[[dict, dict], Any], scene: Any, tmp_path: Path) -> None:
    parts, tensors = scene.parts, parts_tensors(scene)
    about = dict(classes=list(parts.classes), sizes=dict(parts.sizes), samples=parts.samples)
    fault(tensors, about)
    path = save_tensors(tmp_path/'forged.safetensors', 'parts', tensors, about)
    with pytest.raises(ValueError) as e: load_parts(path)
    assert str(path) in str(e.value)


OTHERS = {
    'wider': lambda: modularize(fresh(width=.12), 10),
    'another network': lambda: modularize(fresh('rescnn'), 10),
    'plain': fresh,
    'fewer classes': lambda: modularize(fresh(num_classes=7), 7)}


@pytest.mark.parametrize('other', OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_network(other: Callable[[], nn.Module], scene: Any, tmp_path: Path) -> None:
    target = copy.deepcopy(scene.model)
    path = save_checkpoint(other(), tmp_path/'other.safetensors')
    with pytest.raises(ValueError) as e: load_checkpoint(target, path)
    assert f'{path} holds the weights of another network' in str(e.value) and '\n' not in str(e.value)
    assert same_state(state(scene.model), state(target)), 'a file that does not fit has changed weights'
