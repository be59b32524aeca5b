"""Seven kinds of files, each 100 times cut, with flipped bits, exchanged for another, of another version.

Every one is refused by an error of ours that names the file. Nothing on the disk changes, and nothing in the
network that was to be loaded.
"""
from __future__ import annotations
import copy, functools, io, json, pickle, random, zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import torch
from helpers import hashes
from PIL import Image
from safetensors import safe_open
from torch import nn
from mwt.core.errors import MwtError
from mwt.core.files import VERSION, load_tensors, save_tensors, write_json
from mwt.data.batches import from_tensors
from mwt.methods.modular import modularize
from mwt.modules.module import as_module, load_module, save_module
from mwt.modules.parts import Parts, load_parts, save_parts
from mwt.networks import create_model
from mwt.runs.report import Run
from mwt.runs.run import environment, run_settings
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import Fit
from mwt.train.history import History, TrainConfig
from mwt.train.trainer import Trainer

OLD = Path(__file__).parent/'fixtures'/'0.1.0'
KINDS = {'module': 'modules/3.safetensors', 'parts': 'parts.safetensors', 'checkpoint': 'model.safetensors',
         'run': 'resume.safetensors', 'settings': 'run.json', 'history': 'history.json',
         'metrics': 'metrics.json'}
TIMES = 100
by_kind = pytest.mark.parametrize('kind', KINDS)


@functools.cache
def network(seed: int) -> nn.Module:
    "A small modular network, to be copied before it is changed."
    net = create_model('simcnn', num_classes=3, width=.05, in_channels=1, seed=seed)
    return modularize(net, 3, seed=seed)


def fit_of(model: nn.Module, resume: Path) -> Fit:
    "A run under way that has done nothing yet."
    data = from_tensors(*[(torch.zeros(6, 1, 8, 8).byte(), torch.arange(6) % 3)] * 2,
                        classes=['a', 'b', 'c'], batch_size=6)
    return Fit(Trainer(model, TrainConfig(), 2), data, epochs=2, seed=0, resume=resume)


@pytest.fixture(scope='module')
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a sound file of each kind."
    folder = tmp_path_factory.mktemp('sound')
    classes = ['a', 'b', 'c']
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    save_module(as_module(net, classes, (1, 8, 8)), folder/KINDS['module'])
    kept = torch.eye(3).bool()
    save_parts(Parts(classes, dict(conv=3), kept.double(), kept, torch.ones(3, 1), torch.ones(3), 5),
               folder/KINDS['parts'])
    save_checkpoint(network(0), folder/KINDS['checkpoint'], dict(epoch=1))
    row = dict(epoch=1, loss=1.25, train_accuracy=.5, valid_accuracy=.75)
    fit = fit_of(network(0), folder/KINDS['run'])
    fit.history = History([row], 1)
    fit.best, fit.run.done = dict(fit.model.state_dict()), 1
    fit.best.pop('_extra_state', None)
    fit.save_run()
    write_json(folder/KINDS['settings'], run_settings('digits') | dict(
        environment=environment(), classes=classes, channels=1, fingerprint='f' * 64))
    write_json(folder/KINDS['history'], asdict(fit.history))
    figures = dict.fromkeys(('params', 'flops', 'latency', 'batch_size', 'params_ratio', 'flops_ratio',
                             'latency_ratio', 'accuracy', 'full_accuracy'), 1.5)
    networks = [figures | dict(network='full model', classes=classes)]
    modularity = dict(krr=.5, cohesion=.25, coupling=float('nan'))
    write_json(folder/KINDS['metrics'], dict(modularity=modularity, networks=networks))
    return folder


class Reader:
    "Loads a kind of file, and knows what must not change."
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.path = kind, folder/KINDS[kind]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if kind in ('checkpoint', 'run'):
            self.model = copy.deepcopy(network(1))
            self.fit = fit_of(self.model, self.path)
        self.before = self.state()

    def state(self) -> list[Any]:
        if self.kind not in ('checkpoint', 'run'): return [{}]          # no network is given
        fit = self.fit
        weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        return [weights, dict(fit.run.optimizer.state), fit.run.done, copy.deepcopy(fit.history),
                dict(fit.best), self.model.signature]

    def load(self) -> Any:
        path, kind = self.path, self.kind
        if kind == 'module': return load_module(path)
        if kind == 'parts': return load_parts(path)
        if kind == 'checkpoint': return load_checkpoint(self.model, path)
        if kind == 'run': return self.fit.resume_run_()
        if kind == 'settings': return Run.open(path.parent)
        return getattr(Run(path.parent, {}), kind)()

    def refuses(self, content: bytes, what: str) -> str:
        "Checks that these bytes are refused; what the error says."
        self.path.write_bytes(content)
        random_numbers = torch.get_rng_state()
        try: self.load()
        except MwtError as e: said = str(e)
        else: raise AssertionError(f'{what} was accepted')
        assert str(self.path) in said, f'{what}: {said}'
        assert self.path.read_bytes() == content and torch.equal(torch.get_rng_state(), random_numbers), what
        (weights, *rest), (before, *others) = self.state(), self.before
        assert rest == others and all(torch.equal(weights[k], before[k]) for k in before), what
        return said


@pytest.fixture
def reader(kind: str, tmp_path: Path) -> Iterator[Reader]:
    found = Reader(kind, tmp_path)
    yield found
    assert [p for p in hashes(tmp_path) if (tmp_path/p).is_file()] == [KINDS[kind]], 'files were left'


def chance(kind: str, what: str) -> random.Random: return random.Random(f'{kind} {what}')


@by_kind
def test_sound(kind: str, sound: Path, reader: Reader) -> None:
    "Otherwise the others would show nothing; the name of a file does not matter, its content does."
    reader.path.write_bytes((sound/KINDS[kind]).read_bytes())
    reader.load()


@by_kind
def test_cut(kind: str, sound: Path, reader: Reader) -> None:
    whole, draw = (sound/KINDS[kind]).read_bytes(), chance(kind, 'cut')
    for _ in range(TIMES):
        at = draw.randrange(len(whole))
        reader.refuses(whole[:at], f'cut at {at}')


@by_kind
def test_flipped_bits(kind: str, sound: Path, reader: Reader) -> None:
    whole, draw = (sound/KINDS[kind]).read_bytes(), chance(kind, 'bits')
    header = 8 + int.from_bytes(whole[:8], 'little') if 'safetensors' in KINDS[kind] else len(whole)
    for i in range(TIMES):
        content = bytearray(whole)
        places = draw.sample(range(8 * (header if i % 2 else len(whole))), draw.randint(1, 3))
        for at in places: content[at // 8] ^= 1 << at % 8
        reader.refuses(bytes(content), f'bits {places}')


@pytest.mark.parametrize('kind', ['module', 'history'])
def test_every_bit_of_the_words(kind: str, sound: Path, reader: Reader) -> None:
    "Version, kind and checksum, their names and what stands between them: each bit, one after the other."
    whole = (sound/KINDS[kind]).read_bytes()
    for mark in (b'version', b'sha256', b'format', b'"about":'):
        start = max(0, whole.find(mark) - 2)
        if whole.find(mark) < 0: continue
        for at in range(8 * start, 8 * (start + len(mark) + 6)):
            content = bytearray(whole)
            content[at // 8] ^= 1 << at % 8
            reader.refuses(bytes(content), f'bit {at}')


@functools.cache
def no_files_of_ours() -> list[bytes]:
    "An image, a zip archive, pickles, and texts of all sorts."
    picture, archive, pickled, weights = (io.BytesIO() for _ in range(4))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture, 'png')
    with zipfile.ZipFile(archive, 'w') as z: z.writestr('model.safetensors', b'weights' * 99)
    pickle.dump(dict(a=[1, 2]), pickled)
    torch.save(dict(weight=torch.zeros(9)), weights)
    texts = [b'', b'\0' * 100, b'weights: to follow\n' * 9, b'<!doctype html><title>404</title>', b'{}',
             b'[]', b'null', b'"text"', b'3',
             b'{"rows": 1, "best_epoch": 2}', b'\xff\xfe{\0}\0', b'[' * 100_000,
             b'{"rows":' * 100_000, b'9' * 10_000, b'{"rows": [], "best_epoch": ' + b'9' * 10_000 + b'}']
    return texts + [b.getvalue() for b in (picture, archive, pickled, weights)]


def foreign(sound: Path, kind: str) -> list[bytes]:
    "Contents that another file could have: of other kinds, of this version and of 0.1.0, and others."
    found = [folder/name for folder in (sound, OLD/'mwt') for other, name in KINDS.items() if other != kind]
    return [p.read_bytes() for p in found if p.is_file()] + no_files_of_ours()


@by_kind
def test_another_file(kind: str, sound: Path, reader: Reader) -> None:
    "Under the name of this one: of another kind, or no file of ours at all; also two of them in one."
    found, draw = foreign(sound, kind), chance(kind, 'other')
    for i, content in enumerate(found): reader.refuses(content, f'file {i}')
    for _ in range(TIMES - len(found)):
        a, b = draw.sample(found, 2)
        reader.refuses(a[:draw.randrange(len(a) + 1)] + b, 'two files')


@pytest.mark.parametrize('kind', ['module', 'parts', 'checkpoint'])
def test_another_suffix(kind: str, sound: Path, tmp_path: Path) -> None:
    "A file is what it holds: under another name a sound one is read, another one is refused."
    reader, contents = Reader(kind, tmp_path), foreign(sound, kind)
    for suffix in ('.json', '.txt', '.pt', '.zip', ''):
        reader.path = reader.path.with_suffix(suffix)
        for content in contents[::3]: reader.refuses(content, suffix)
        reader.path.write_bytes((sound/KINDS[kind]).read_bytes())
        reader.load()
        reader.before = reader.state()


def versions(draw: random.Random) -> Iterator[tuple[Any, bool]]:
    "What could stand in the place of a version; is it a newer one?"
    odd = ['', '1', '02', ' 2', '2.0', '-2', '+2', 'two', 'nan', '٢', '2\0', '2' * 5000, '9' * 4000,
           1, 0, -1, 2.0, 2.5, True, None, [2], {}]
    for value in odd: yield value, False
    for _ in range(TIMES // 2 - len(odd) // 2):
        yield draw.randint(VERSION + 1, 10 ** draw.randint(1, 17) + VERSION), True
        yield -draw.randint(0, 10 ** draw.randint(1, 30)), False


def with_version(whole: bytes, version: Any) -> bytes:
    "The file with another version, and nothing else changed."
    if whole[:1] == b'{':
        content = json.loads(whole)
        content['format']['version'] = version
        return json.dumps(content, indent=1).encode()
    length = int.from_bytes(whole[:8], 'little')
    header = json.loads(whole[8:8 + length])
    header['__metadata__']['version'] = str(version)
    words = json.dumps(header).encode()
    return len(words).to_bytes(8, 'little') + words + whole[8 + length:]


@by_kind
def test_another_version(kind: str, sound: Path, reader: Reader) -> None:
    "A newer one is refused by its number, with the way out."
    whole = (sound/KINDS[kind]).read_bytes()
    for version, newer in versions(chance(kind, 'version')):
        said = reader.refuses(with_version(whole, version), f'version {version!r:.40}')
        upgrade = 'pip install --upgrade mwt' in said and f'is of version {version}' in said
        assert upgrade == newer, f'{version!r:.40}: {said}'


@pytest.mark.parametrize('name', ['module', 'parts', 'checkpoint', 'run'])
def test_version_1_is_read(name: str, tmp_path: Path) -> None:
    "Files of 0.1.0 have neither version nor kind in their checksum; a damaged one is refused."
    for path in sorted(OLD.rglob('*.safetensors')):
        with safe_open(path, 'pt') as f: metadata = f.metadata()
        if metadata['format'] != f'mwt-{name}': continue
        assert 'version' not in metadata
        tensors, about = load_tensors(path, name)
        again = save_tensors(tmp_path/'again.safetensors', name, tensors, about)
        content = again.read_bytes()
        assert b'"version":"2"' in content
        again.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        with pytest.raises(MwtError, match='checksum'): load_tensors(again, name)


def test_json_without_a_checksum_is_read(sound: Path, tmp_path: Path) -> None:
    "As 0.1.0 wrote it, or with its checksum taken out by hand; but not with a field that nobody wrote."
    for run in sorted(OLD.iterdir()): assert Run.open(run).history().rows
    content = json.loads((sound/'run.json').read_bytes())
    del content['format']
    path = tmp_path/'run.json'
    path.write_text(json.dumps(content | dict(seed=3)))
    assert Run.open(tmp_path).settings['seed'] == 3
    path.write_text(json.dumps(content | dict(formet={})))
    with pytest.raises(MwtError, match="no mwt writes 'formet' there"): Run.open(tmp_path)
    path.write_text((sound/'run.json').read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(MwtError, match="take out its field 'format' if you have changed it yourself"):
        Run.open(tmp_path)
