"Every notebook runs from top to bottom, as nbdev tests it, in a process of its own."
from __future__ import annotations
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))

# One process each, since a notebook's `@patch` would leak into the next. nbdev honours `#| eval: false` and the flags
# of `tst_flags` in settings.ini, and prints the cell that failed.
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test.__wrapped__(path=sys.argv[1], n_workers=0)'


def run_notebook(path: Path, seconds: int = 900) -> subprocess.CompletedProcess:
    "nbdev's test of one notebook; its output is in `stdout`."
    return subprocess.run([sys.executable, '-c', RUN, str(path)], cwd=ROOT, text=True, timeout=seconds,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) > 1


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook(path: Path) -> None:
    done = run_notebook(path)
    assert done.returncode == 0 and 'Success.' in done.stdout, f'\n{done.stdout[-6000:]}'


def test_a_failing_cell_fails_and_is_shown(tmp_path: Path) -> None:
    "The test of the tests: nbdev must not swallow an error."
    import json
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source=['assert 1 + 1 == 3'])
    path = tmp_path/'00_wrong.ipynb'
    path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    done = run_notebook(path)
    assert done.returncode != 0 and 'assert 1 + 1 == 3' in done.stdout and 'AssertionError' in done.stdout
