"A run's folder has one owner, is complete or stopped, and survives signals, full disks and lost losses."

from __future__ import annotations
import errno, os, resource, shutil, signal, subprocess, sys, time, warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import pytest
import torch
from helpers import hashes, pictures, same_state
from torch import Tensor, nn
from mwt.core.files import load_tensors
from mwt.core.locks import LOCK
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.methods.base import METHODS
from mwt.methods.modular import modularize
from mwt.networks import create_model
from mwt.runs.cli import main
from mwt.runs.report import Run
from mwt.runs.run import is_scrap, module_name
from mwt.train.fit import fit
from mwt.train.history import TrainConfig
from mwt.train.trainer import Trainer, train_epoch

WORDS = ['train', '--data', 'digits', '--width', '.1', '--batch-size', '256', '--device', 'cpu']
PATIENCE = 300  # seconds


def here(*words: Any) -> int:
    return main([str(w) for w in words])


def small(folder: Path, epochs: int = 1) -> list[Any]:
    "The words of a short run on few pictures."
    quick = ['--width', 0.1, '--epochs', epochs, '--batch-size', 8, '--device', 'cpu']
    return ['--root', folder / 'data', *quick]


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a whole run in it; not to be changed."
    out = tmp_path_factory.mktemp('runs') / 'digits'
    assert here(*WORDS, '--epochs', 1, '--out', out) == 0
    for words in (['decompose'], ['extract', '1,2'], ['evaluate'], ['report']):
        assert here(*words, '--out', out) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    "A copy of it."
    return Path(shutil.copytree(finished, tmp_path / 'run'))


# Processes


def start(*words: Any, **options: Any) -> subprocess.Popen:
    cmd = [sys.executable, '-m', 'mwt', *map(str, words)]
    return subprocess.Popen(
        cmd, text=True, stderr=subprocess.PIPE, **dict(stdout=subprocess.PIPE) | options
    )


def begun(out: Path) -> subprocess.Popen:
    "A run that does not end by itself, after its first write."
    process, limit = start(*WORDS, '--epochs', 100_000, '--out', out), time.monotonic() + PATIENCE
    while not (out / 'resume.safetensors').exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    return process


def last_words(process: subprocess.Popen) -> str:
    "The one line of a process that failed."
    err = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2 and err.count('\n') == 1 and err.startswith('mwt: '), err
    return err


@pytest.fixture(scope='module')
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen]]:
    out = tmp_path_factory.mktemp('training') / 'run'
    process = begun(out)
    yield out, process
    process.kill()
    process.communicate()


LATER = (['decompose'], ['extract'], ['evaluate'], ['report'])


@pytest.mark.parametrize(
    'words',
    [[*WORDS], [*WORDS, '--overwrite'], [*WORDS, '--resume'], *LATER],
    ids=['train', 'overwrite', 'resume', *(words[0] for words in LATER)],
)
def test_folder_in_use_is_refused(words: list, training: tuple, refused: Callable) -> None:
    out, process = training
    said = refused(*words, '--out', out)
    assert f'in use by process {process.pid} on' in said and '(training)' in said
    assert process.poll() is None


def test_folder_that_is_removed_ends_the_run(
    tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'run'
    judge_first(lambda epoch: shutil.rmtree(out), monkeypatch)
    said = refused(*WORDS, '--epochs', 2, '--out', out)
    assert 'was removed or replaced while it was in use' in said and not out.exists()


def test_sigterm_ends_a_run_that_can_go_on(training: tuple) -> None:
    check_ends(*training, signal.SIGTERM)


@pytest.mark.slow
def test_sigint_ends_a_run_that_can_go_on(tmp_path: Path) -> None:
    check_ends(tmp_path / 'run', begun(tmp_path / 'run'), signal.SIGINT)


def check_ends(out: Path, process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)
    said = last_words(process)
    assert 'training stopped: ' in said and 'the same command with --resume goes on from there' in said
    assert Run(out, {}).state == 'stopped' and not (out / LOCK).exists()
    assert not [p for p in out.iterdir() if is_scrap(p.name)]
    load_tensors(out / 'resume.safetensors', 'run')


def test_real_limits_of_the_disk(tmp_path: Path, refused: Callable) -> None:
    "Files may not exceed 100 kB: the state of a run does."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        said = refused(*WORDS, '--width', 0.3, '--out', tmp_path / 'run')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'could not write' in said and 'resume.safetensors: files may not become that large' in said
    assert 'ulimit -f' in said and not [p for p in (tmp_path / 'run').glob('*') if p.is_file()]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/dev/full').is_char_device(), reason='needs /dev/full')
def test_output_that_does_not_arrive(run: Path) -> None:
    with open('/dev/full', 'w') as full:
        process = start('report', '--out', run, stdout=full)
    assert 'does not arrive' in last_words(process)


# Complete or stopped


def judge_first(do: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    "Something is done at the end of each epoch, before that is kept."
    from mwt.measure import evaluate

    epochs = iter(range(1, 100))

    def judge(*args: Any) -> float:
        do(next(epochs))
        return evaluate(*args)

    monkeypatch.setattr('mwt.train.fit.evaluate', judge)


def stop_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    "Training is asked to stop at the end of an epoch, before that is kept."

    def stop(now: int) -> None:
        if now == epoch:
            raise InterruptedError('asked to stop')

    judge_first(stop, monkeypatch)


def test_run_that_is_complete_says_so(
    run: Path, capsys: pytest.CaptureFixture, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(run)
    words = [*WORDS, '--out', run, '--resume']
    with monkeypatch.context() as m:
        m.setattr('mwt.runs.steps.begin_fit', None)
        assert here(*words, '--epochs', 1) == 0
        said = capsys.readouterr().out
        assert 'is complete, nothing is left to do' in said and 'best epoch 1' in said
    assert "holds a complete run with epochs 1, not 2" in refused(*words, '--epochs', 2)
    assert "with lr 0.05, not 0.1" in refused(*words, '--epochs', 1, '--lr', 0.1)
    assert "with target_krr None, not 0.2" in refused(*words, '--epochs', 1, '--target-krr', 0.2)
    assert hashes(run) == before


@pytest.mark.parametrize('epoch', [1, 2])
def test_same_command_starts_goes_on_and_is_complete(
    epoch: int, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    "As a scheduler does: one command, given again and again; also before the first epoch is over."
    out = tmp_path / 'run'
    words = [*WORDS, '--epochs', 2, '--out', out, '--resume']
    with monkeypatch.context() as m:
        stop_in(epoch, m)
        assert 'training stopped: asked to stop' in refused(*words)
    assert 'holds no run that is complete: it was stopped' in refused('report', '--out', out)
    assert 'go on with it by --resume' in refused(*words[:-1])
    for _ in range(2):
        assert here(*words) == 0
    assert sorted(p.name for p in out.iterdir()) == ['history.json', 'model.safetensors', 'run.json']


def test_scraps_of_a_killed_run_are_no_run(tmp_path: Path) -> None:
    out = tmp_path / 'run'
    out.mkdir()
    long = f'.{"cat" * 26}ca.safetensors.k3x_90ab'           # names are shortened, endings stay
    scraps = [LOCK, '.resume.safetensors.k3x_90ab', '.tmpqT4x1z', long]
    for name in scraps:
        (out / name).write_text('{"process": 1')
    assert here(*WORDS, '--epochs', 1, '--out', out) == 0
    assert not [name for name in scraps if (out / name).exists()]


def test_images_that_have_changed_are_refused(
    tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(12)]
    images, out = pictures(tmp_path / 'images', names), tmp_path / 'run'
    words = ['train', '--data', images, '--out', out, *small(tmp_path, epochs=3)]
    with monkeypatch.context() as m:
        stop_in(2, m)
        refused(*words)
    before, kept = hashes(out), (images / 'cat').rename(tmp_path / 'kept')
    pictures(tmp_path, [f'images/cat/{100 + i}.png' for i in range(12)])
    for p in (images / 'cat').iterdir():
        p.write_bytes((images / 'dog' / '3.png').read_bytes())
    said = refused(*words, '--resume')
    assert 'holds a run that began with other images' in said and '--overwrite' in said
    assert hashes(out) == before
    shutil.rmtree(images / 'cat')
    kept.rename(images / 'cat')
    assert 'holds a run with shape [3, 8, 8], not [3, 16, 16]' in refused(*words, '--resume', '--size', 16)
    assert 'holds a run with valid 0.1, not 0.2' in refused(*words, '--resume', '--valid', 0.2)
    assert hashes(out) == before
    assert here(*words, '--resume', '--accumulate', 2) == 0


def test_complete_run_is_one_of_the_same_images(tmp_path: Path, refused: Callable) -> None:
    names = [f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(12)]
    images, out = pictures(tmp_path / 'images', names), tmp_path / 'run'
    others = pictures(tmp_path / 'others', [name.replace('cat', 'cow') for name in names])
    words = ['--out', out, *small(tmp_path)]
    assert here('train', '--data', images, *words) == 0
    moved = images.rename(tmp_path / 'moved')
    assert here('train', '--data', moved, *words, '--resume') == 0
    said = refused('train', '--data', others, *words, '--resume')
    assert f'holds a complete run of {images}, whose images are not those of {others}' in said
    assert 'holds a complete run of' in refused('train', '--data', 'digits', *words, '--resume')


def test_images_that_have_changed_since_training(tmp_path: Path) -> None:
    "They may be judged, and it is said."
    images = pictures(tmp_path / 'images', [f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(12)])
    options = dict(width=0.1, epochs=1, batch_size=8, root=tmp_path / 'data')
    Run.create(tmp_path / 'run', images, **options).train('cpu', show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Run.open(tmp_path / 'run').data('cpu')
    pictures(tmp_path, ['images/cat/100.png'])
    with pytest.warns(UserWarning, match='have changed since training'):
        Run.open(tmp_path / 'run').data('cpu')


# Full disks

WRITES = {
    'resume.safetensors': [*WORDS, '--epochs', 1, '--overwrite'],
    'model.safetensors': [*WORDS, '--epochs', 1, '--overwrite'],
    'history.json': [*WORDS, '--epochs', 1, '--overwrite'],
    'run.json': [*WORDS, '--epochs', 1, '--overwrite'],
    'parts.safetensors': ['decompose'],
    '1-2.safetensors': ['extract', '1,2'],
    'metrics.json': ['evaluate'],
    'report.html': ['report'],
}
ERRORS = {errno.ENOSPC: 'is full', errno.EDQUOT: 'the quota on the disk', errno.EACCES: 'is not permitted'}


# Training writes all its files in one way: of the four, the first and the last.
MORE = {'model.safetensors', 'history.json'}


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in WRITES]
)
def test_write_that_fails(name: str, run: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    "One line that says what to free; the last good file is intact, and a run goes on once there is room."
    number = list(ERRORS)[len(name) % 3]

    def full(path: Path) -> None:
        if path.name.startswith(f'.{name}.'):
            raise OSError(number, os.strerror(number))

    before = hashes(run)
    with monkeypatch.context() as m:
        m.setattr('mwt.core.files._sync', full)
        said = refused(*WRITES[name], '--out', run)
    assert f'{name}: ' in said and ERRORS[number] in said
    after = hashes(run)
    assert not [p for p in after if is_scrap(Path(p).name)]
    if WRITES[name][0] != 'train':
        assert after == before and f'{name} is as it was before' in said
    elif name == 'resume.safetensors':
        assert here(*WRITES[name], '--out', run) == 0
    else:
        assert here(*WORDS, '--epochs', 1, '--out', run, '--resume') == 0


def test_folder_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mwt.train.fit.train_epoch', None)
    data = image_data('digits', batch_size=64, device='cpu')
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='could not write'):
        fit(network(), data, 1, checkpoint=tmp_path / 'file' / 'model.safetensors', show_progress=False)


# Lost runs, and too little memory


def network(**options: Any) -> nn.Module:
    return create_model('simcnn', 10, 0.1, 1, seed=0, **options)


@pytest.fixture(scope='module')
def data() -> ImageData:
    digits = image_data('digits', batch_size=64, device='cpu')
    return ImageData(digits.train.sample(256), digits.valid, digits.test)


def test_lost_run_tells_step_and_losses(tmp_path: Path, refused: Callable) -> None:
    words = [*WORDS, '--epochs', 2, '--out', tmp_path / 'run', '--lr', 1e12, '--warmup', 0]
    said = refused(*words)
    assert (
        'in step ' in said
        and 'after losses of ' in said
        and 'in epoch 1; try a lower lr than 1e+12' in said
    )
    assert 'start afresh by --overwrite' in said


def test_long_epoch_is_looked_at_on_the_way(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mwt.train.trainer.LOOK_EVERY', 2)
    trainer = Trainer(network(), TrainConfig(lr=1e30, warmup=0), 400)
    endless = ((images, labels) for _ in range(100) for images, labels in data.train)
    with pytest.raises(FloatingPointError, match='the loss became'):
        train_epoch(trainer, endless)
    assert trainer.done <= 6


class Greedy(nn.Module):
    "A network that has no room for more than some images."

    def __init__(self, room: int) -> None:
        super().__init__()
        self.net, self.room = network(), room

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > self.room:
            torch.empty(1 << 50)
        return self.net(x)


@pytest.mark.parametrize(
    'room, says', [(20, 'batch_size=16 fits, and so does accumulate=4'), (0, 'nor for smaller ones')]
)
def test_too_little_memory(room: int, says: str, data: ImageData) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=says):
        fit(Greedy(room), data, 1, show_progress=False)
    if room:
        fit(Greedy(room), data, 1, accumulate=4, show_progress=False)


@pytest.mark.parametrize('kind', ['plain', *METHODS])
def test_every_method_learns_in_pieces(kind: str, data: ImageData) -> None:
    models = [network() if kind == 'plain' else modularize(network(), 10, kind) for _ in range(2)]
    a, b = [fit(m, data, 2, accumulate=n, show_progress=False) for m, n in zip(models, (1, 3))]
    assert a.rows[0].keys() == b.rows[0].keys()
    assert b.rows[0]['cross_entropy'] == pytest.approx(a.rows[0]['cross_entropy'], rel=0.2)
    assert not same_state(*models), 'norms use the statistics of a piece'


@pytest.mark.parametrize('n, pieces', [(64, [16] * 4), (62, [16, 16, 15, 15]), (5, [3, 2]), (1, [1])])
def test_no_piece_is_a_single_image(n: int, pieces: list[int]) -> None:
    trainer, seen = Trainer(network(), TrainConfig(accumulate=4), 10), []
    trainer.backward_ = lambda images, labels, *_: seen.append(len(labels)) or {}
    trainer.accumulate_(torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.long))
    assert seen == pieces


def test_pieces_that_are_too_small(data: ImageData) -> None:
    with pytest.raises(ValueError, match='accumulate=33 .*take accumulate=32 or less'):
        fit(network(), data, 1, accumulate=33)


# Names

ANIMALS = ['lion', 'salt, pepper', 'sea', 'sea-lion', '-x']


def test_classes_on_the_command_line(tmp_path: Path, refused: Callable) -> None:
    images = pictures(tmp_path / 'images', [f'{c}/{i}.png' for c in ANIMALS for i in range(10)])
    out = tmp_path / 'run'
    words = small(tmp_path)
    assert (
        here('train', '--data', images, '--out', out, *words) == 0 and here('decompose', '--out', out) == 0
    )
    groups = ['sea,lion', 'sea-lion', 'salt, pepper', 'lion,salt, pepper', '"salt, pepper",sea', '1,4']
    assert here('extract', '--out', out, *groups) == 0 and here('extract', '--out', out, '--', '-x') == 0
    found = [sorted(module.classes) for module in Run.open(out).modules().values()]
    assert len(found) == 7 and ['lion', 'sea'] in found and ['sea-lion'] in found
    said = refused('extract', 'salt,peper', '--out', out)
    assert "unknown class 'salt'" in said and 'put into double quotes' in said


@pytest.mark.parametrize(
    'names, wrong',
    [
        (['01', '02', '03'], ['1', '0', '3']),
        (['1', '2', '3'], ['0', '4', '01']),
        (['1.5', 'cat'], ['0', '1']),
        (['-1', '-2'], ['0', '1']),
    ],
)
def test_numbers_are_names_where_names_are_numbers(names: list[str], wrong: list[str]) -> None:
    from mwt.runs.commands import _group

    for name in names:
        assert _group(name, names) == [name]
    for word in wrong:
        with pytest.raises(ValueError, match='only names count') as e:
            _group(word, names)
        assert all(repr(name) in str(e.value) for name in names)


def test_no_two_modules_have_one_file() -> None:
    names = [
        'a',
        'b',
        'a-b',
        'A',
        'a/b',
        'a_b',
        '.a',
        '_a',
        '',
        'a\nb',
        'x' * 300,
        'x' * 299 + 'y',
        'a-b-c',
        'c',
    ]
    groups = [[a] for a in names] + [[a, b] for a in names for b in names] + [['a', 'b', 'c'], ['a', 'b-c']]
    files = [module_name(group) for group in groups]
    assert len(set(files)) == len(files)
    assert all(len(f.encode()) < 240 and '/' not in f and f[:1] != '.' for f in files)
