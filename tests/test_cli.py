"The commands as people run them: processes of their own, on some 2,000 real images, from training to the report."
from __future__ import annotations
import json, re, subprocess, sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import torch
from helpers import unpack_sample
from PIL import Image
from safetensors.torch import load_file
from mwt.cli import main, parser
from mwt.data import image_data
from mwt.decompose import load_parts
from mwt.extract import load_module
from mwt.methods import describe_method, make_method
from mwt.metrics import evaluate

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
COMMANDS = {'train': {'--data', '--root', '--model', '--width', '--method', '--target-krr', '--alpha', '--beta', '--epochs', '--batch-size', '--lr', '--momentum', '--weight-decay',
                      '--warmup', '--valid', '--size', '--streaming', '--workers', '--compile', '--resume', '--seed', '--overwrite', '--out', '--device'},
            'decompose': {'--threshold', '--out', '--device'}, 'extract': {'--fuse', '--round-to', '--out', '--device'}, 'evaluate': {'--out', '--device'}, 'report': {'--out', '--device'},
            'demo': {'--epochs', '--seed', '--overwrite', '--out', '--device'}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Every test works from a folder of its own: a run can be opened from anywhere."
    monkeypatch.chdir(tmp_path)


def start(folder: Path, *words: Any) -> subprocess.Popen:
    cmd = [sys.executable, '-m', 'mwt', *map(str, words)]
    return subprocess.Popen(cmd, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
    "What a command said, when it went well."
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and 'Traceback' not in err, out + err
    return out


def mwt(folder: Path, *words: Any) -> str:
    "Run a command in a folder."
    return finish(start(folder, *words))


def here(*words: Any) -> int:
    "Run a command in this process."
    return main([str(w) for w in words])


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with real images in `images`."
    place = tmp_path_factory.mktemp('place')
    unpack_sample(place/'images')
    return place


@pytest.fixture(scope='module')
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen]]:
    "The demo, running beside the other commands."
    folder = tmp_path_factory.mktemp('demo')
    process = start(folder, 'demo', '--epochs', 2, '--device', 'cpu')
    yield folder, process
    process.kill(); process.communicate()


TRAIN = ['train', '--data', 'images', '--width', .1, '--epochs', 1, '--batch-size', 64, '--root', 'cache', '--seed', 2, '--device', 'cpu']


@pytest.fixture(scope='module')
def run(place: Path, demo: Any) -> tuple[Path, dict[str, str]]:
    "A whole run, a process for each step, and what each said."
    out, said = place/'run', {}
    said['train'] = mwt(place, *TRAIN, '--out', 'run')
    for name, words in dict(decompose=[], extract=['cat,dog', '0, 8', 'frog'], evaluate=[], report=[]).items():
        said[name] = mwt(place, name, *words, '--out', out, '--device', 'cpu')
    return out, said


def read(path: Path) -> Any: return json.loads(path.read_text(encoding='utf-8'))


def test_every_step_leaves_its_files(run: tuple) -> None:
    out, _ = run
    assert {p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file()} == {
        'run.json', 'history.json', 'model.safetensors', 'parts.safetensors', 'metrics.json', 'report.html',
        'modules/cat-dog.safetensors', 'modules/airplane-ship.safetensors', 'modules/frog.safetensors'}


def test_every_step_says_what_it_did(run: tuple) -> None:
    _, said = run
    assert 'kernels are masked' in said['train'] and 'best epoch 1, kept in' in said['train'] and re.search(r'^all\s+[\d,]+', said['train'], flags=re.M)
    assert '10 modules of a network' in said['decompose'] and all(re.search(rf'^{c}\s+\d', said['decompose'], flags=re.M) for c in [*CLASSES, 'mean'])
    assert said['extract'].count('parameters') == 3 and 'cat-dog.safetensors' in said['extract']
    assert all(re.search(rf'^{n}\s+\d', said['evaluate'], flags=re.M) for n in ('full model', 'cat-dog', 'airplane-ship', 'frog'))
    assert 'report.html' in said['report']


def test_run_remembers_how_it_was_made(run: tuple, place: Path) -> None:
    settings, history = read(run[0]/'run.json'), read(run[0]/'history.json')
    assert (settings['model'], settings['width'], settings['epochs'], settings['seed']) == ('simcnn', .1, 1, 2)
    assert settings['method'] == describe_method(make_method('composable'))
    assert Path(settings['data']['source']) == (place/'images').resolve() and settings['data']['batch_size'] == 64
    assert Path(settings['data']['root']) == (place/'cache').resolve(), 'images would be decoded again, into the folder one happens to be in'
    assert {'mwt', 'torch', 'python', 'device'} <= settings['environment'].keys()
    assert len(history['rows']) == 1 and history['best_epoch'] == 1 and 0 < history['rows'][0]['valid_accuracy'] < 1


def test_metrics_make_sense(run: tuple) -> None:
    metrics = read(run[0]/'metrics.json')
    assert all(0 <= metrics['modularity'][k] <= 1 for k in ('krr', 'cohesion', 'coupling'))
    rows = {row['network']: row for row in metrics['networks']}
    assert list(rows) == ['full model', 'airplane-ship', 'cat-dog', 'frog']
    assert [rows[k]['classes'] for k in rows] == [CLASSES, ['airplane', 'ship'], ['cat', 'dog'], ['frog']]
    for name, row in rows.items():
        assert 0 <= row['accuracy'] <= 1 and 0 <= row['full_accuracy'] <= 1 and row['latency'] > 0
        if name != 'full model': assert 0 < row['params_ratio'] <= 1 and 0 < row['flops_ratio'] <= 1
    assert rows['full model']['params_ratio'] == 1, 'gates are no parameters'
    assert rows['full model']['accuracy'] == rows['full model']['full_accuracy'] and rows['frog']['accuracy'] == 1


class References(HTMLParser):
    "Everything that a page would fetch or lead to."
    def __init__(self) -> None: super().__init__(); self.found: list[str] = []; self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.found += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action', 'poster')]


def check_page(path: Path) -> References:
    page, text = References(), path.read_text(encoding='utf-8')
    page.feed(text)
    assert all(f.startswith(('data:', '#')) for f in page.found) and not page.tags & {'script', 'link', 'iframe', 'object', 'base'}
    rest = re.sub(r'data:image/png;base64,[A-Za-z0-9+/=]+', '', text)
    assert '//' not in rest and '@import' not in rest and 'url(' not in rest
    return page


def test_report_needs_no_other_file(run: tuple) -> None:
    page, text = check_page(run[0]/'report.html'), (run[0]/'report.html').read_text(encoding='utf-8')
    assert sum(f.startswith('data:image/png') for f in page.found) == 3 and all(len(f) > 2000 for f in page.found)
    assert 'simcnn on images' in text and all(word in text for word in ('Figures', 'Training', 'Modules', 'cat-dog', 'torch: ', 'seed: 2'))


def test_modules_say_the_same_in_another_process(run: tuple, place: Path) -> None:
    out, _ = run
    data = image_data(place/'images', root=place/'cache', seed=2, device='cpu')
    for row in read(out/'metrics.json')['networks'][1:]:
        module = load_module(out/'modules'/f"{row['network']}.safetensors")
        assert module.classes == row['classes'] and sum(p.numel() for p in module.parameters()) == row['params']
        assert evaluate(module, data.test) == row['accuracy']


def test_steps_can_be_repeated(run: tuple, place: Path, capsys: pytest.CaptureFixture) -> None:
    "Again, in this process and from another folder: the same parts, modules and figures."
    out, said = run
    figures = lambda: [{k: v for k, v in row.items() if 'latency' not in k} for row in read(out/'metrics.json')['networks']]
    modules = lambda: {p.stem: load_module(p) for p in sorted(out.glob('modules/*'))}
    files, parts, old, metrics = sorted(out.rglob('*')), load_parts(out/'parts.safetensors'), modules(), figures()
    for words in (['decompose'], ['extract', 'cat,dog', '0,8', 'frog'], ['evaluate'], ['report']):
        assert here(*words, '--out', out, '--device', 'cpu') == 0
        if words == ['decompose']: assert capsys.readouterr().out.splitlines()[:-1] == said['decompose'].splitlines()[:-1]
    again = load_parts(out/'parts.safetensors')
    assert torch.equal(again.modules, parts.modules) and torch.equal(again.frequency, parts.frequency)
    assert sorted(out.rglob('*')) == files and figures() == metrics
    for name, module in modules().items():
        assert all(torch.equal(v, old[name].state_dict()[k]) for k, v in module.state_dict().items()) and module.description == old[name].description


def test_training_repeats_across_processes(run: tuple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert here(*TRAIN, '--out', place/'again') == 0
    a, b = (load_file(folder/'model.safetensors') for folder in (run[0], place/'again'))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert read(place/'again'/'history.json') == read(run[0]/'history.json')


def test_one_module_can_be_evaluated(run: tuple, capsys: pytest.CaptureFixture) -> None:
    out, whole = run[0], (run[0]/'metrics.json').read_bytes()
    before = {row['network']: row['accuracy'] for row in json.loads(whole)['networks']}
    assert here('evaluate', out/'modules'/'cat-dog.safetensors', '--out', out) == 0
    assert 'frog' not in capsys.readouterr().out
    rows = {row['network']: row['accuracy'] for row in read(out/'metrics.json')['networks']}
    assert rows == {k: before[k] for k in ('full model', 'cat-dog')}
    (out/'metrics.json').write_bytes(whole)


def test_thresholds_keep_more_or_less(run: tuple, place: Path, capsys: pytest.CaptureFixture) -> None:
    out, kept = run[0], {}
    for threshold in (1.0, .5, .9):     # the default comes last: other tests read it
        assert here('decompose', '--threshold', threshold, '--out', out) == 0
        kept[threshold] = load_parts(out/'parts.safetensors').frequency, load_parts(out/'parts.safetensors').modules.sum().item()
    assert kept[.5][1] >= kept[.9][1] and torch.equal(kept[.5][0], kept[1.0][0])


@pytest.fixture(scope='module')
def plain(place: Path) -> tuple[Path, str]:
    "A run without masks."
    return place/'plain', mwt(place, *TRAIN, '--method', 'plain', '--model', 'rescnn', '--out', 'plain')


def test_plain_run(plain: tuple, capsys: pytest.CaptureFixture) -> None:
    out, said = plain
    assert 'masked' not in said and 'cohesion' not in said and read(out/'run.json')['method'] is None
    assert here('evaluate', '--out', out) == 0 and re.search(r'^full model\s+\d+\.\d %', capsys.readouterr().out, flags=re.M)
    assert here('report', '--out', out) == 0
    check_page(out/'report.html')
    capsys.readouterr()
    assert here('decompose', '--out', out) == 2
    err = capsys.readouterr().err
    assert 'ResCNN was never modularized' in err and err.count('\n') == 1


def test_overwriting_starts_afresh(tmp_path: Path) -> None:
    "What an earlier run left does not pass for the new one's; other people's files stay."
    words = ['train', '--data', 'digits', '--width', .1, '--epochs', 1, '--out', tmp_path, '--device', 'cpu']
    assert here(*words) == 0
    for rest in (['decompose'], ['extract', '1']): assert here(*rest, '--out', tmp_path) == 0
    for name in ('metrics.json', 'report.html', 'notes.txt'): (tmp_path/name).write_text('mine')
    assert here(*words, '--model', 'rescnn', '--overwrite') == 0
    assert sorted(p.name for p in tmp_path.rglob('*') if p.is_file()) == ['history.json', 'model.safetensors', 'notes.txt', 'run.json']
    assert (tmp_path/'notes.txt').read_text() == 'mine'


def test_demo_starts_afresh(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    "Its model is not that of an earlier run's settings."
    def stop(*args: Any) -> None: raise ValueError('far enough')
    monkeypatch.setattr('mwt.demo.train_pair', stop)
    (tmp_path/'modules').mkdir()
    for name in ('run.json', 'history.json', 'model.safetensors', 'parts.safetensors', 'modules/cat.safetensors', 'notes.txt'):
        (tmp_path/name).write_text('old')
    assert here('demo', '--out', tmp_path, '--overwrite') == 2 and 'far enough' in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob('*') if p.is_file()] == ['notes.txt']


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(path)


LONG = [f'{letter}{"-very" * 12} long name' for letter in 'abcde']


@pytest.mark.parametrize('names', [['cat, domestic', 'dog', ' fox', '7'], LONG], ids=['odd', 'long'])
def test_class_names_of_any_kind(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "Folders may be called anything: a module for each class, and one for all."
    for label, name in enumerate(names):
        for i in range(10): picture(tmp_path/'images'/name/f'{i}.png', 10 * label + i)
    out = tmp_path/'run'
    words = ['--root', tmp_path/'cache', '--width', .1, '--epochs', 1, '--batch-size', 8, '--device', 'cpu']
    assert here('train', '--data', tmp_path/'images', '--out', out, *words) == 0
    assert here('decompose', '--out', out) == 0
    assert here('extract', '--out', out) == 0, capsys.readouterr().err
    assert sorted(load_module(p).classes[0] for p in out.glob('modules/*')) == sorted(names)
    assert here('extract', ','.join(str(i) for i in range(len(names)) if names[i] != '7'), '--out', out) == 0, capsys.readouterr().err
    assert len(list(out.glob('modules/*'))) == len(names) + 1
    assert here('evaluate', '--out', out) == 0 and len(read(out/'metrics.json')['networks']) == len(names) + 2


# Help and mistakes

def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e: here('--help')
    said = capsys.readouterr().out
    assert e.value.code == 0 and all(re.search(rf'^ +{name}\s+\w+', said, flags=re.M) for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_option(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e: here(name, '--help')
    said = capsys.readouterr().out
    assert e.value.code == 0 and set(re.findall(r'^  (?:-h, )?(--[\w-]+)', said, flags=re.M)) == COMMANDS[name] | {'--help'}
    sub = parser()._subparsers._group_actions[0].choices[name]
    assert all(action.help for action in sub._actions), 'an option without a word'


def test_mistakes_end_with_status_2(place: Path) -> None:
    process = start(place, 'train', '--data', 'imagez', '--out', 'wrong')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and not (place/'wrong').exists()
    assert not out and err.startswith("mwt: unknown data set 'imagez'") and err.count('\n') == 1


# The demo

def test_demo(demo: tuple) -> None:
    folder, process = demo
    said, out = finish(process), folder/'runs'/'demo'
    assert re.search(r'^Kernel retention rate \d+\.\d %, cohesion \d\.\d+, coupling \d\.\d+$', said, flags=re.M) and 'open runs/demo/report.html' in said
    rows = {re.split(r'\s{2,}', line)[0]: line for line in said.splitlines()}
    for name in ('plain, all ten', 'modular, all ten', 'one class (mean of ten)', '3 + 8', '0 to 4'): assert rows[name].count('%') >= 3
    assert rows['3 + 8'].count('%') == 5, 'three ratios, the accuracy, and that of the full model'
    assert {p.name for p in out.iterdir()} == {'model.safetensors', 'parts.safetensors', 'modules', 'metrics.json', 'report.html'}
    assert len(list(out.glob('modules/*.safetensors'))) == 16
    metrics = read(out/'metrics.json')
    assert len(metrics['singles']) == 10 and metrics['about']['epochs'] == 2 and len(metrics['history']['rows']) == 2
    assert load_module(out/'modules'/'3-8.safetensors').classes == ['3', '8']
    check_page(out/'report.html')
    assert [p.name for p in folder.iterdir()] == ['runs']
