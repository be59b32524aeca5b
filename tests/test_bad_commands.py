"A mistake on the command line: exit status 2, one line that says what to do, and every file as it was."
from __future__ import annotations
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import pytest
from bad_input import fresh, inf, nan, no_training, picture, tree
from mwt.methods.modular import modularize
from mwt.runs.cli import main
from mwt.train.checkpoint import save_checkpoint


def command(*words: Any) -> int:
    try: return main([str(w) for w in words])
    except SystemExit as e: return e.code           # argparse leaves so


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a whole run in it; not to be changed."
    out = tmp_path_factory.mktemp('runs')/'digits'
    words = ['train', '--data', 'digits', '--width', .1, '--epochs', 1, '--out', out, '--device', 'cpu']
    assert command(*words) == 0
    for rest in (['decompose'], ['extract', '1,2', '3'], ['evaluate']):
        assert command(*rest, '--out', out, '--device', 'cpu') == 0
    assert command('report', '--out', out) == 0
    assert len(tree(out)) == 9
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    "A copy of it."
    return Path(shutil.copytree(finished, tmp_path/'run'))


# Train

OUT_OF_RANGE = {
    'width': [0, -1, 9, nan], 'target-krr': [0, -1, 1.5, nan], 'epochs': [0, -1], 'batch-size': [0, -1],
    'lr': [0, -1, nan, inf], 'momentum': [-1, 1, nan], 'weight-decay': [-1, nan, inf], 'warmup': [-1, 2, nan],
    'valid': [0, 1, -1, nan], 'size': [0, -1], 'seed': [-1, 2**32]}
WRONG_TRAIN: dict[str, tuple[list[Any], str]] = {
    'data set': (['--data', 'digitz'], "'digitz'; did you mean 'digits'?"),
    'folder': (['--data', 'no/such/folder'], 'no folder no/such/folder'),
    'model': (['--model', 'simcn'], "'simcn'; did you mean 'simcnn'?"),
    'method': (['--method', 'mtw'], "'mtw'; did you mean 'mwt'?"),
    'almost plain': (['--method', 'plian'], "'plian'; did you mean 'plain'?"),
    'channels': (['--model', 'torchvision/resnet18'], 'takes 3 channels'),
    'width of torchvision': (['--model', 'torchvision/resnet18', '--width', .5], 'width 0.5'),
    **{f'{name} {value}': (['--method', 'mwt', f'--{name}', value], f'{name} must be a')
       for name in ('alpha', 'beta') for value in (-1, nan, inf)},
    'setting of another method': (['--alpha', 1], "'composable' has no setting 'alpha'"),
    'setting of the default method': (['--method', 'mwt', '--target-krr', .1],
                                      "'mwt' has no setting 'target_krr'"),
    **{f'{name} {value}': ([f'--{name}', value], f"{name.replace('-', '_')} must be a")
       for name, values in OUT_OF_RANGE.items() for value in values},
    'weight of nothing': (['--method', 'plain', '--alpha', nan], 'alpha'),
    'device': (['--device', 'cudda'], "'cudda' is not one that PyTorch knows")}


@pytest.mark.parametrize('wrong, says', WRONG_TRAIN.values(), ids=WRONG_TRAIN)
def test_wrong_setting_changes_no_run(wrong: list, says: str, run: Path, refused: Callable,
                                      no_training: None) -> None:
    before = tree(run.parent)
    width = [] if '--model' in wrong and '--width' not in wrong else ['--width', .1]
    words = ['train', '--data', 'digits', *width, '--epochs', 1, '--out', run, '--root', run.parent/'data']
    assert says in refused(*words, '--overwrite', *wrong)
    assert tree(run.parent) == before


@pytest.mark.parametrize('name', ['data set', 'model', 'epochs 0', 'lr nan', 'width 0'])
def test_wrong_setting_makes_no_folder(name: str, tmp_path: Path, refused: Callable,
                                       no_training: None) -> None:
    wrong, says = WRONG_TRAIN[name]
    words = ['train', '--data', 'digits', '--width', .1, '--out', tmp_path/'new', '--root', tmp_path/'data']
    assert says in refused(*words, *wrong)
    assert not tree(tmp_path)


@pytest.mark.parametrize('words', [['train', '--data', 'digits', '--width', .1], ['demo', '--epochs', 1]],
                         ids=['train', 'demo'])
def test_another_run_is_not_overwritten(words: list, run: Path, refused: Callable, no_training: None) -> None:
    before = tree(run)
    said = refused(*words, '--out', run)
    assert f'{run} already holds a run' in said and 'name another folder' in said and '--overwrite' in said
    assert tree(run) == before


def test_file_in_the_place_of_a_folder(run: Path, refused: Callable, no_training: None) -> None:
    before = tree(run)
    words = ['train', '--data', 'digits', '--width', .1, '--out']
    assert 'run.json is a file; name a folder' in refused(*words, run/'run.json')
    assert 'run.json' in refused(*words, run/'run.json'/'deeper')
    assert tree(run) == before


@pytest.mark.parametrize('wrong', [['--epochs', 0], ['--seed', -1], ['--device', 'cudda']],
                         ids=lambda words: words[0])
@pytest.mark.parametrize('overwrite', [[], ['--overwrite']], ids=['', 'overwrite'])
def test_wrong_demo_changes_nothing(wrong: list, overwrite: list, run: Path, refused: Callable,
                                    no_training: None) -> None:
    before = tree(run.parent)
    refused('demo', '--out', run if overwrite else run.parent/'new', *overwrite, *wrong)
    assert tree(run.parent) == before


# The steps after it

WRONG_LATER: dict[str, tuple[list[Any], str]] = {
    **{f'threshold {t}': (['decompose', '--threshold', t],
                          f'threshold must be a number above 0 and at most 1, not {float(t)}')
       for t in (0, -1, 1.5, nan)},
    'device': (['decompose', '--device', 'cudda'], "'cudda'"),
    'unknown class': (['extract', 'one'], "unknown class 'one' (known: '0', '1'"),
    'no class': (['extract', ','], 'no target class given; name at least one of 0, 1'),
    'empty word': (['extract', ''], 'no target class given'),
    'twice': (['extract', '1,1'], "'1' is given twice"),
    'number': (['extract', '10'], 'names are numbers here, so only names count'),
    'negative': (['extract', '-1'], "unknown class '-1'"),
    'second group': (['extract', '4,5', 'one'], "unknown class 'one'"),
    'no kernels': (['extract', '1', '--round-to', 0], 'round_to must be a whole number at least 1, not 0'),
    'no module file': (['evaluate', 'none.safetensors'], 'no module at none.safetensors; check the path'),
    'folder as a module': (['evaluate', '.'], 'no module at .'),
    'images elsewhere': (['evaluate', '--data', 'no/such/folder'], 'no folder no/such/folder')}


@pytest.mark.parametrize('words, says', WRONG_LATER.values(), ids=WRONG_LATER)
def test_wrong_step_changes_no_run(words: list, says: str, run: Path, refused: Callable) -> None:
    before = tree(run)
    assert says in refused(*words, '--out', run)
    assert tree(run) == before


COMMANDS = ('decompose', 'extract', 'evaluate', 'report')


@pytest.mark.parametrize('name', COMMANDS)
def test_folder_without_a_run(name: str, tmp_path: Path, refused: Callable) -> None:
    for out in (tmp_path, tmp_path/'none'):
        assert f'{out} holds no run (no run.json); make one with: mwt train' in refused(name, '--out', out)
    assert not tree(tmp_path)


SPOILED = {
    'run.json': COMMANDS,
    'model.safetensors': ('extract', 'decompose', 'evaluate'),
    'parts.safetensors': ('extract', 'evaluate', 'report'),
    'modules/3.safetensors': ('evaluate',),
    'history.json': ('report',),
    'metrics.json': ('report',)}


def spoiled() -> Iterator[Any]:
    "Every content meets the first command that reads a file, half of the file meets all; the rest is slow."
    for name, words in SPOILED.items():
        for content in ('', '{', '{}', '[]', 'half'):
            for word in words:
                marks = [pytest.mark.slow] * (word != words[0] and content != 'half')
                yield pytest.param(name, content, word, id=f'{name}-{content}-{word}', marks=marks)


@pytest.mark.parametrize('name, content, word', [*spoiled()])
def test_spoiled_file_of_a_run(name: str, content: str, word: str, run: Path, refused: Callable) -> None:
    whole = (run/name).read_bytes()
    (run/name).write_bytes(whole[:len(whole) // 2] if content == 'half' else content.encode())
    before = tree(run)
    assert str(run/name) in refused(word, '--out', run)
    assert tree(run) == before


NEEDED = {'model.safetensors': ('decompose', 'extract', 'evaluate'), 'parts.safetensors': ('extract',),
          'history.json': ('report',)}


@pytest.mark.parametrize('name', NEEDED)
def test_missing_file_of_a_run(name: str, run: Path, refused: Callable) -> None:
    way_out = 'train the run again' if name.endswith('json') else 'make one first'
    (run/name).unlink()
    for word in NEEDED[name]:
        said = refused(word, '--out', run)
        assert str(run/name) in said and way_out in said


def test_checkpoint_of_another_run(run: Path, refused: Callable) -> None:
    save_checkpoint(modularize(fresh(width=.2), 10), run/'model.safetensors')
    before = tree(run)
    assert 'holds the weights of another network' in refused('decompose', '--out', run)
    assert tree(run) == before


# Images

FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'empty': (lambda f: f.mkdir(), 'pictures holds no class folders; put each class'),
    'one class': (lambda f: picture(f/'cat'/'0.png'), "holds one class folder only, 'cat'; put each class"),
    'no folders': (lambda f: picture(f/'0.png'), 'holds images but no class folders; put each class'),
    'a file': (lambda f: f.write_text('cats'), 'pictures is a file, not a folder of images'),
    'empty class': (lambda f: [picture(f/'cat'/'0.png'), (f/'dog').mkdir()],
                    'dog holds no image; add some, or remove the folder')}


def pictures(folder: Path, channels: int = 3) -> Path:
    "A folder of images of two classes."
    for name in ('cat', 'dog'):
        for i in range(20): picture(folder/name/f'{i}.png', i, channels)
    return folder


@pytest.mark.parametrize('make, says', FOLDERS.values(), ids=FOLDERS)
def test_folder_that_is_no_data_set(make: Callable, says: str, tmp_path: Path, refused: Callable,
                                    no_training: None) -> None:
    make(tmp_path/'pictures')
    before = tree(tmp_path)
    words = ['train', '--data', tmp_path/'pictures', '--width', .1, '--out', tmp_path/'run']
    assert says in refused(*words, '--root', tmp_path/'data')
    assert tree(tmp_path) == before


@pytest.mark.parametrize('overwrite', [[], ['--overwrite']], ids=['', 'overwrite'])
def test_unreadable_image(overwrite: list, run: Path, tmp_path: Path, refused: Callable,
                          no_training: None) -> None:
    broken = pictures(tmp_path/'pictures')/'dog'/'7.png'
    broken.write_bytes(broken.read_bytes()[:60])
    before = tree(tmp_path)
    out = run if overwrite else tmp_path/'new'
    words = ['train', '--data', tmp_path/'pictures', '--width', .1, '--out', out, '--root', tmp_path/'data']
    said = refused(*words, *overwrite)
    assert f'{broken} is not a readable image' in said and 'repair or remove it' in said
    assert tree(tmp_path) == before


def test_channels_that_do_not_fit(tmp_path: Path, refused: Callable, no_training: None) -> None:
    images = pictures(tmp_path/'pictures', channels=1)
    words = ['train', '--data', images, '--model', 'torchvision/shufflenet_v2_x0_5', '--out', tmp_path/'run']
    said = refused(*words, '--root', tmp_path/'data')
    assert 'takes 3 channels, not width 1.0 and 1 channels; use one of simcnn' in said
    assert not (tmp_path/'run').exists()


def test_images_that_have_moved(tmp_path: Path, refused: Callable) -> None:
    "Cutting out needs no images; what needs them says how to name the new place, and finds them there."
    images, out, root = pictures(tmp_path/'pictures'), tmp_path/'run', tmp_path/'data'
    words = ['--width', .1, '--epochs', 1, '--batch-size', 8, '--root', root, '--device', 'cpu']
    assert command('train', '--data', images, '--out', out, *words) == 0
    assert command('decompose', '--out', out) == 0
    images.rename(tmp_path/'elsewhere')
    assert command('extract', 'cat', '--out', out) == 0
    assert 'say where they are: --data' in refused('evaluate', '--out', out)
    assert command('evaluate', '--out', out, '--data', tmp_path/'elsewhere') == 0


def test_download_that_fails(run: Path, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch,
                             no_training: None) -> None:
    def offline(*args: Any, **kwargs: Any) -> None: raise OSError('no route to host')
    monkeypatch.setattr('torchvision.datasets.CIFAR10', offline)
    before = tree(run)
    words = ['train', '--data', 'cifar10', '--width', .1, '--out', run, '--root', tmp_path/'data']
    said = refused(*words, '--overwrite')
    assert "could not get 'cifar10'" in said and 'no route to host' in said and 'check the network' in said
    assert tree(run) == before


# Words

WRONG_WORDS = [
    [], ['trian'], ['train'], ['train', '--data', 'digits'],
    ['train', '--epochs', 'many', '--data', 'digits', '--out', 'x'],
    ['train', '--data', 'digits', '--out', 'x', '--dataset', 'y'],
    ['train', '--data', 'digits', '--out', 'x', '--compile', 'maybe'],
    ['decompose'], ['extract', 'cat'], ['demo', '--epochs']]


@pytest.mark.parametrize('words', WRONG_WORDS, ids=lambda w: ' '.join(w) or 'nothing')
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture, tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith('usage: mwt') and 'Traceback' not in err
    assert 'error:' in err.splitlines()[-1]
    assert not tree(tmp_path)


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='holds no run'):
        command('report', '--out', tmp_path, '--debug')


def test_error_that_nobody_expected(run: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    "Still one line, with its type."
    def broken(*args: Any) -> None: raise KeyError('oops')
    monkeypatch.setattr('mwt.runs.run.load_parts', broken)
    assert "KeyError: 'oops' (--debug shows where)" in refused('report', '--out', run)
