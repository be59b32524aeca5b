"The commands as people run them: in processes of their own, on real images, from training to the report."
from __future__ import annotations
import contextlib, io, json, re, shutil, subprocess, sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from typing import Any
import pytest
import torch
from bad_input import picture
from helpers import unpack_sample
from safetensors.torch import load_file
from mwt.data.sources import image_data
from mwt.measure import evaluate
from mwt.methods.base import METHODS, describe_method, make_method
from mwt.modules.module import load_module
from mwt.modules.parts import load_parts
from mwt.runs.cli import COMMANDS, main
from mwt.runs.report import Run
from mwt.runs.run import run_settings
from mwt.train.history import TrainConfig

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


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


def said_here(*words: Any) -> str:
    "What a command said in this process, when it went well."
    said = io.StringIO()
    with contextlib.redirect_stdout(said): assert here(*words) == 0
    return said.getvalue()


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
    process = start(folder, 'demo', '--epochs', 1, '--device', 'cpu')
    yield folder, process
    process.kill()
    process.communicate()


TRAIN = ['train', '--data', 'images', '--width', .1, '--epochs', 1, '--batch-size', 64, '--root', 'cache',
         '--seed', 2, '--device', 'cpu']
STEPS = dict(decompose=[], extract=['cat,dog', '0, 8', 'frog'], evaluate=[])


@pytest.fixture(scope='module')
def run(place: Path, demo: Any) -> tuple[Path, dict[str, str]]:
    "A whole run, and what each step said; the first of them is a process, to start one takes seconds."
    out, said = place/'run', {}
    said['train'] = mwt(place, *TRAIN, '--out', 'run')
    for name, words in STEPS.items():
        said[name] = said_here(name, *words, '--out', out, '--device', 'cpu')
    said['report'] = said_here('report', '--out', out)
    return out, said


def read(path: Path) -> Any: return json.loads(path.read_text(encoding='utf-8'))


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}


def rows(said: str) -> dict[str, str]:
    "The lines of a table by their first column."
    return {re.split(r'\s{2,}', line)[0]: line for line in said.splitlines()}


# A run

def test_every_step_leaves_its_files(run: tuple) -> None:
    assert files(run[0]) == {
        'run.json', 'history.json', 'model.safetensors', 'parts.safetensors', 'metrics.json', 'report.html',
        'modules/cat-dog.safetensors', 'modules/airplane-ship.safetensors', 'modules/frog.safetensors'}


def test_train_says_what_it_did(run: tuple) -> None:
    said = run[1]['train']
    assert 'kernels are masked' in said and 'best epoch 1, kept in' in said
    assert re.search(r'^all\s+[\d,]+', said, flags=re.M), 'no table of the images'


def test_other_steps_say_what_they_did(run: tuple) -> None:
    said = run[1]
    assert '10 modules of a network' in said['decompose']
    assert rows(said['decompose']).keys() > {*CLASSES, 'mean'}
    assert said['extract'].count('parameters') == 3 and 'cat-dog.safetensors' in said['extract']
    assert rows(said['evaluate']).keys() > {'full model', 'cat-dog', 'airplane-ship', 'frog'}
    assert 'report.html' in said['report']


def test_run_remembers_how_it_was_made(run: tuple, place: Path) -> None:
    settings = read(run[0]/'run.json')
    chosen = {k: settings[k] for k in ('model', 'width', 'epochs', 'seed')}
    assert chosen == dict(model='simcnn', width=.1, epochs=1, seed=2)
    assert settings['method'] == describe_method(make_method())
    assert settings['classes'] == CLASSES and settings['channels'] == 3
    data = settings['data']
    assert data['source'] == str((place/'images').resolve()) and data['batch_size'] == 64
    assert data['root'] == str((place/'cache').resolve()), 'images would be decoded again'
    assert {'mwt', 'torch', 'python', 'device'} <= settings['environment'].keys()


def test_history_is_kept(run: tuple) -> None:
    history = read(run[0]/'history.json')
    assert len(history['rows']) == 1 and history['best_epoch'] == 1
    assert 0 < history['rows'][0]['valid_accuracy'] < 1


def test_metrics_make_sense(run: tuple) -> None:
    metrics = read(run[0]/'metrics.json')
    assert all(0 <= metrics['modularity'][k] <= 1 for k in ('krr', 'cohesion', 'coupling'))
    found = {row['network']: row for row in metrics['networks']}
    assert {name: row['classes'] for name, row in found.items()} == {
        'full model': CLASSES,
        'airplane-ship': ['airplane', 'ship'], 'cat-dog': ['cat', 'dog'], 'frog': ['frog']}
    full = found.pop('full model')
    assert full['params_ratio'] == 1, 'gates are no parameters'
    assert full['accuracy'] == full['full_accuracy'] and found['frog']['accuracy'] == 1
    for row in found.values():
        assert 0 <= row['accuracy'] <= 1 and 0 <= row['full_accuracy'] <= 1 and row['latency'] > 0
        assert 0 < row['params_ratio'] <= 1 and 0 < row['flops_ratio'] <= 1


class References(HTMLParser):
    "Everything that a page would fetch or lead to."
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.found += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action', 'poster')]


def check_page(path: Path) -> References:
    page, text = References(), path.read_text(encoding='utf-8')
    page.feed(text)
    assert all(f.startswith(('data:', '#')) for f in page.found)
    assert not page.tags & {'script', 'link', 'iframe', 'object', 'base'}
    rest = re.sub(r'data:image/png;base64,[A-Za-z0-9+/=]+', '', text)
    assert '//' not in rest and '@import' not in rest and 'url(' not in rest
    return page


def test_report_needs_no_other_file(run: tuple) -> None:
    page = check_page(run[0]/'report.html')
    text = (run[0]/'report.html').read_text(encoding='utf-8')
    assert sum(f.startswith('data:image/png') for f in page.found) == 3
    assert all(len(f) > 2000 for f in page.found)
    for words in ('simcnn on images', 'Figures', 'Training', 'Modules', 'cat-dog', 'torch: ', 'seed: 2'):
        assert words in text


def test_modules_say_the_same_in_another_process(run: tuple, place: Path) -> None:
    out, _ = run
    data = image_data(place/'images', root=place/'cache', seed=2, device='cpu')
    for row in read(out/'metrics.json')['networks'][1:]:
        module = load_module(out/'modules'/f"{row['network']}.safetensors")
        assert module.classes == row['classes']
        assert sum(p.numel() for p in module.parameters()) == row['params']
        assert evaluate(module, data.test) == row['accuracy']


def figures(out: Path) -> list[dict[str, Any]]:
    "What is measured and does not depend on the clock."
    found = read(out/'metrics.json')['networks']
    return [{k: v for k, v in row.items() if 'latency' not in k} for row in found]


@pytest.mark.slow
def test_steps_can_be_repeated(run: tuple, capsys: pytest.CaptureFixture) -> None:
    "Again, in this process and from another folder: the same parts, modules and figures."
    out, said = run
    before, metrics = files(out), figures(out)
    parts, old = Run.open(out).parts(), Run.open(out).modules()
    assert here('decompose', '--out', out, '--device', 'cpu') == 0
    assert capsys.readouterr().out.splitlines()[:-1] == said['decompose'].splitlines()[:-1]
    for words in (['extract', 'cat,dog', '0,8', 'frog'], ['evaluate']):
        assert here(*words, '--out', out, '--device', 'cpu') == 0
    assert here('report', '--out', out) == 0
    again = load_parts(out/'parts.safetensors')
    assert torch.equal(again.kept, parts.kept) and torch.equal(again.frequency, parts.frequency)
    assert files(out) == before and figures(out) == metrics
    for name, module in Run.open(out).modules().items():
        assert module.description == old[name].description
        assert all(torch.equal(v, old[name].state_dict()[k]) for k, v in module.state_dict().items())


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
    after = {row['network']: row['accuracy'] for row in read(out/'metrics.json')['networks']}
    assert after == {k: before[k] for k in ('full model', 'cat-dog')}
    (out/'metrics.json').write_bytes(whole)


def test_thresholds_keep_more_or_less(run: tuple) -> None:
    out, kept = run[0], {}
    for threshold in (1.0, .5, .9):     # the default comes last: other tests read it
        assert here('decompose', '--threshold', threshold, '--out', out) == 0
        parts = load_parts(out/'parts.safetensors')
        kept[threshold] = parts.frequency, parts.kept.sum().item()
    assert kept[.5][1] >= kept[.9][1] and torch.equal(kept[.5][0], kept[1.0][0])


# A run without masks

@pytest.fixture(scope='module')
def plain(place: Path) -> tuple[Path, str]:
    "A run without masks."
    with contextlib.chdir(place):
        said = said_here(*TRAIN, '--method', 'plain', '--model', 'rescnn', '--out', 'plain')
    return place/'plain', said


def test_plain_run(plain: tuple, capsys: pytest.CaptureFixture) -> None:
    out, said = plain
    assert 'masked' not in said and 'cohesion' not in said and read(out/'run.json')['method'] is None
    assert here('evaluate', '--out', out) == 0
    assert re.search(r'^full model\s+\d+\.\d %', capsys.readouterr().out, flags=re.M)
    assert here('report', '--out', out) == 0
    check_page(out/'report.html')


def test_plain_run_cannot_be_decomposed(plain: tuple, capsys: pytest.CaptureFixture) -> None:
    assert here('decompose', '--out', plain[0]) == 2
    err = capsys.readouterr().err
    assert 'ResCNN was never modularized' in err and err.count('\n') == 1


# Folders that are taken again

DIGITS = ['train', '--data', 'digits', '--width', .1, '--epochs', 1, '--batch-size', 256, '--device', 'cpu']


def test_overwriting_starts_afresh(tmp_path: Path) -> None:
    "What an earlier run left does not pass for the new one's; other people's files stay."
    assert here(*DIGITS, '--out', tmp_path) == 0
    for rest in (['decompose'], ['extract', '1']): assert here(*rest, '--out', tmp_path) == 0
    for name in ('metrics.json', 'report.html', 'notes.txt'): (tmp_path/name).write_text('mine')
    assert here(*DIGITS, '--out', tmp_path, '--model', 'rescnn', '--overwrite') == 0
    assert files(tmp_path) == {'history.json', 'model.safetensors', 'notes.txt', 'run.json'}
    assert (tmp_path/'notes.txt').read_text() == 'mine'


def test_demo_starts_afresh(tmp_path: Path, capsys: pytest.CaptureFixture,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    "Its model is not that of an earlier run's settings."
    def stop(*args: Any, **kwargs: Any) -> None: raise ValueError('far enough')
    monkeypatch.setattr('mwt.runs.steps.Fit.train', stop)
    (tmp_path/'modules').mkdir()
    old = 'run.json history.json model.safetensors parts.safetensors modules/cat.safetensors'
    for name in old.split(): (tmp_path/name).write_text('old')
    (tmp_path/'notes.txt').write_text('mine')
    assert here('demo', '--out', tmp_path, '--overwrite') == 2 and 'far enough' in capsys.readouterr().err
    assert files(tmp_path) == {'notes.txt'}


# Class names

ODD = ['cat, domestic', ' fox', 'x_^2$%$', '<b>&|']
LONG = [f'{letter}{"-very" * 12} long name' for letter in 'abcde']


@pytest.mark.slow           # two whole runs
@pytest.mark.parametrize('names', [ODD, LONG], ids=['odd', 'long'])
def test_class_names_of_any_kind(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "Folders may be called anything: a module for each class, one for all, and a report."
    for label, name in enumerate(names):
        for i in range(10): picture(tmp_path/'images'/name/f'{i}.png', 10 * label + i)
    out = tmp_path/'run'
    words = ['--root', tmp_path/'cache', '--width', .1, '--epochs', 1, '--batch-size', 8, '--device', 'cpu']
    assert here('train', '--data', tmp_path/'images', '--out', out, *words) == 0
    assert here('decompose', '--out', out) == 0
    assert here('extract', '--out', out) == 0, capsys.readouterr().err
    assert sorted(m.classes[0] for m in Run.open(out).modules().values()) == sorted(names)
    numbers = ','.join(map(str, range(len(names))))
    assert here('extract', numbers, names[0], '--out', out) == 0, capsys.readouterr().err
    assert len(Run.open(out).modules()) == len(names) + 1
    assert here('evaluate', '--out', out) == 0 and len(read(out/'metrics.json')['networks']) == len(names) + 2
    assert here('report', '--out', out) == 0, capsys.readouterr().err
    check_page(out/'report.html')


# Help

def options(said: str) -> set[str]:
    "The options that a help text lists, as Python spells them."
    return {name.replace('-', '_') for name in re.findall(r'^  (?:-h, )?--([\w-]+)', said, flags=re.M)}


def help_of(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as e: here(*words, '--help')
    assert e.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    said = help_of(capsys)
    assert all(re.search(rf'^ +{name}\s+\w+', said, flags=re.M) for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_has_a_word(name: str, capsys: pytest.CaptureFixture) -> None:
    said = re.split(r'^  (?=\S)', help_of(capsys, name), flags=re.M)
    assert all(re.search(r'(\s{2,}|\n\s+)\S', entry) for entry in said if entry.startswith('-'))


@pytest.mark.parametrize('method', [*METHODS])
def test_help_of_train_shows_what_can_be_set(method: str, capsys: pytest.CaptureFixture) -> None:
    "The run, the images, the recipe, and the settings of the method that is named; of no other."
    said = help_of(capsys, 'train', '--method', method)
    shown, settings = options(said), METHODS[method]()
    own = {f.name for f in fields(METHODS[method])}
    others = {f.name for kind in METHODS.values() for f in fields(kind)} - own
    recipe = {f.name for f in fields(TrainConfig)}
    assert shown >= own | recipe | {'data', 'out', 'epochs', 'batch_size', 'resume'}
    assert not shown & others
    values = [getattr(settings, name) for name in own]
    numbers = [n for n in values if n is not None and not isinstance(n, bool)]
    assert numbers and all(f'(default: {n})' in ' '.join(said.split()) for n in numbers)


def test_help_of_train_has_all_arguments_of_a_run(capsys: pytest.CaptureFixture) -> None:
    shown = options(help_of(capsys, 'train'))
    assert shown >= {name for name in signature(run_settings).parameters if name != 'options'}
    assert shown >= {name for name in run_settings('digits')['data'] if name != 'source'}


QUICK = """
import sys
from mwt.runs.cli import main
try: main(sys.argv[1:])
finally: print('torch' in sys.modules)
"""


@pytest.mark.parametrize('words, status', [
    ('--help', 0), ('--version', 0), ('train --help', 0), ('train --method mwt --help', 0), ('trian', 2),
    ('train --data digits', 2), ('extract --out runs --roundto 2', 2)])
def test_answers_that_need_no_torch(words: str, status: int) -> None:
    "What it says comes at once: importing PyTorch takes seconds."
    cmd = [sys.executable, '-c', QUICK, *words.split()]
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stdout.endswith('False\n'), done.stdout + done.stderr


def test_a_mistyped_command_meets_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit): main(['trian'])
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_only_who_draws_waits_for_matplotlib() -> None:
    script = "import sys; from mwt.all import *; print({'matplotlib', 'triton', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'torch'}\n", done.stdout + done.stderr


def test_version() -> None:
    import mwt
    done = subprocess.run([sys.executable, '-m', 'mwt', '--version'], capture_output=True, text=True)
    assert done.stdout == f'mwt {mwt.__version__}\n'


# Mistakes

@pytest.mark.slow           # of other mistakes in test_runs
def test_mistakes_end_with_status_2(place: Path) -> None:
    process = start(place, 'train', '--data', 'imagez', '--out', 'wrong')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and not (place/'wrong').exists()
    assert not out and err.startswith("mwt: unknown data set 'imagez'") and err.count('\n') == 1


# The demo

def test_demo_says_what_it_measured(demo: tuple) -> None:
    said = finish(demo[1])
    title = r'^Kernel retention rate \d+\.\d %, cohesion \d\.\d+, coupling \d\.\d+$'
    assert re.search(title, said, flags=re.M) and 'open runs/demo/report.html' in said
    found = rows(said)
    for name in ('plain, all ten', 'modular, all ten', 'one class (mean of ten)', '3 + 8', '0 to 4'):
        assert found[name].count('%') >= 3
    assert found['3 + 8'].count('%') == 5, 'three ratios, the accuracy, and that of the full model'


def test_demo_is_a_run(demo: tuple, capsys: pytest.CaptureFixture) -> None:
    "Every command works on its folder."
    folder, process = demo
    out = folder/'runs'/'demo'
    process.wait(timeout=300)
    names = {'run.json', 'history.json', 'model.safetensors', 'parts.safetensors', 'metrics.json',
             'report.html'}
    assert {p.name for p in out.iterdir()} == names | {'modules'}
    assert [p.name for p in folder.iterdir()] == ['runs']
    run = Run.open(out)
    assert len(run.modules()) == 16 and run.modules()['3-8'].classes == ['3', '8']
    assert len(run.metrics()['singles']) == 10 and len(run.history().rows) == 1
    check_page(out/'report.html')
    assert here('extract', '3,8', '--out', out) == 0
    assert here('evaluate', out/'modules'/'3-8.safetensors', '--out', out) == 0
    assert here('report', '--out', out) == 0
    assert len(run.metrics()['networks']) == 2


# Runs of version 0.1.0

FILES = Path(__file__).parent/'fixtures'/'0.1.0'
OLD = [FILES/'composable', pytest.param(FILES/'mwt', marks=pytest.mark.slow)]  # of both in test_training


@pytest.mark.parametrize('old', OLD, ids=lambda p: p.name)
def test_run_of_an_older_version_opens(old: Path, tmp_path: Path) -> None:
    "Its data root is relative, and it tells no classes."
    out = shutil.copytree(old, tmp_path/'run')
    run = Run.open(out)
    assert 'classes' not in run.settings and run.settings['method']['method'] == old.name
    assert run.model('cpu').classes == run.parts().classes == [str(i) for i in range(10)]
    assert set(run.modules()) == {'1', '3-7'} and len(run.history().rows) == 3
    for words in (['extract', '3,7'], ['evaluate']): assert here(*words, '--out', out, '--device', 'cpu') == 0
    assert here('report', '--out', out) == 0
