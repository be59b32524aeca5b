"Every notebook runs from top to bottom, as nbdev tests it, and says what is stored in it."
from __future__ import annotations
import json, multiprocessing, tempfile
from pathlib import Path
import pytest
from run_notebook import differs, say_into

NBS = Path(__file__).resolve().parents[1]/'nbs'
# Notebooks that take more than four seconds, mostly to train networks: tutorials, and chapters whose
# functions have tests of their own in the files named here.
SLOW = {
    'index.ipynb', 'tutorials/01_real_images.ipynb', 'tutorials/02_two_methods.ipynb',
    'tutorials/05_many_machines.ipynb',
    'tutorials/08_compose.ipynb', 'tutorials/09_replace.ipynb', 'tutorials/10_ship.ipynb',
    'tutorials/11_choosing_a_size.ipynb',
    '02_data/06_sources.ipynb',                                     # test_data, test_streaming
    '07_train/03_trainer.ipynb', '07_train/04_fit.ipynb',           # test_training, test_own_loop
    '08_modules/03_decompose.ipynb', '08_modules/06_extract.ipynb', # test_modules, test_extract
    '08_modules/07_compose.ipynb',                                  # test_modules, test_extract, test_reuse
    '08_modules/08_export.ipynb', '08_modules/09_mend.ipynb', '08_modules/10_budget.ipynb', # test_ship
    '08_modules/12_narrow.ipynb',                                   # test_baselines
    '09_runs/02_steps.ipynb', '09_runs/03_report.ipynb',            # test_cli
    '09_runs/04_demo.ipynb', '09_runs/05_commands.ipynb',           # test_cli
    '10_layers/04_retrain.ipynb', '10_layers/05_shorten.ipynb',     # test_layers
    '12_baselines/01_controls.ipynb', '12_baselines/02_ocap.ipynb', # test_baselines
    '12_baselines/04_grad_splitter.ipynb', '12_baselines/05_recompose.ipynb'}   # test_baselines


def is_notebook(path: Path) -> bool: return not any(part[0] in '._' for part in path.relative_to(NBS).parts)


def parameter(path: Path) -> object:
    name = path.relative_to(NBS)
    slow = name.as_posix() in SLOW
    return pytest.param(path, id=name.as_posix(), marks=[pytest.mark.slow] * slow)


NOTEBOOKS = sorted(filter(is_notebook, NBS.rglob('*.ipynb')))


# A server that has imported what notebooks import (but not the package itself); every notebook runs in a fork
# of it, without waiting for the imports.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(
    ['torch', 'torchvision', 'matplotlib.pyplot', 'nbdev.test', 'execnb.shell', 'run_notebook'])


def run_notebook(path: Path, seconds: int = 540) -> tuple[int | None, str]:
    "nbdev's test of a notebook, and a look at its outputs: exit status (`None`: it hung), what it says."
    # One process each, since a notebook's `@patch` would leak into the next. nbdev honours `#| eval: false`
    # and the flags of `tst_flags` in settings.ini, and prints the cell that failed.
    with tempfile.NamedTemporaryFile('r') as said:
        process = FORKS.Process(target=say_into, args=(said.name, path))
        process.start()
        process.join(seconds)
        status = process.exitcode
        if status is None: process.kill()
        return status, Path(said.name).read_text(errors='replace')


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) > 1 and all((NBS/name).exists() for name in SLOW)


@pytest.mark.parametrize('path', [parameter(p) for p in NOTEBOOKS])
def test_notebook(path: Path) -> None:
    status, said = run_notebook(path)
    assert status == 0 and 'Success.' in said, f'exit status {status}\n{said[-6000:]}'


# The tests of the tests

def notebook(path: Path, source: str, output: str = '') -> Path:
    "A notebook of one cell with one stored output."
    stored = [dict(output_type='stream', name='stdout', text=[output])] if output else []
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=stored, source=[source])
    path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def test_a_failing_cell_fails_and_is_shown(tmp_path: Path) -> None:
    "nbdev must not swallow an error."
    status, said = run_notebook(notebook(tmp_path/'00_wrong.ipynb', 'assert 1 + 1 == 3'))
    assert status == 1 and 'assert 1 + 1 == 3' in said and 'AssertionError' in said


@pytest.mark.parametrize('source, output, fresh', [
    ('print("kernels", 3)', 'kernels 3\n', True),
    ('print("kernels", 3)', 'units 3\n', False),
    ('print("kernels", 3)', '', False),
    ('x = 3', 'kernels 3\n', False),
    ('#| varies\nprint("kernels", 3)', 'units 3\n', True),
])
def test_stale_outputs_are_found(source: str, output: str, fresh: bool, tmp_path: Path) -> None:
    status, said = run_notebook(notebook(tmp_path/'00_stale.ipynb', source, output))
    assert (status == 0) == fresh, said
    if not fresh: assert 'stale' in said


@pytest.mark.parametrize('stored, now, exact, stale', [
    ('took 3.2 s in /tmp/tmpabc/run', 'took 0.1 s in /tmp/tmpxyz/run', True, False),
    ('accuracy 95.0 %', 'accuracy 71.2 %', False, False),
    ('accuracy 95.0 %', 'accuracy 71.2 %', True, True),
    ('accuracy 95.0 %', 'accuracy 95.1 %', True, False),
    ('12 kernels', '14 kernels', True, True),
    ('| a | 1,066 |\n|---|-------|', '| a |    1,066 |\n|---|----------|', True, False),
    ('| a | 1,066 |', '| b | 1,066 |', False, True),
    ('one line', 'one line\ntwo lines', False, True),
])
def test_what_counts_as_stale(stored: str, now: str, exact: bool, stale: bool) -> None:
    assert differs(stored, now, exact) == stale
