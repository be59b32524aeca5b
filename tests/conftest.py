"What all tests share: this checkout's package in every process, one thread each, files spread over processes, a minimum of coverage for full runs."
from __future__ import annotations
import os, subprocess
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports torch; the processes that tests start inherit it. Tests run side by side, one process a core,
# and networks this small only get slower when many threads share them.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('GOMP_SPINCOUNT', '20000')       # threads that wait for each other must not keep a busy core for long
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
os.environ['MPLBACKEND'] = 'agg'


def pytest_configure(config: pytest.Config) -> None:
    "A part of the tests need not cover the whole package."
    chosen = config.args_source is not config.ArgsSource.TESTPATHS
    option, cov = config.option, config.pluginmanager.get_plugin('_cov')
    if cov and (chosen or option.keyword or option.markexpr or option.lf or option.collectonly): cov.options.cov_fail_under = 0


# Files whose tests share nothing expensive; of all others the tests stay in one process, so that their fixtures are made once.
SPREAD = {'test_notebooks.py', 'test_channels.py', 'test_losses.py'}

def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name not in SPREAD: item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope='session')
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture(scope='session')
def files() -> list[Path]:
    "The project's files, committed or about to be: relative to the checkout, without what git ignores."
    cmd = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    listed = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('needs git and a checkout')
    return [Path(p) for p in sorted(set(listed.stdout.split('\0'))) if p and (ROOT/p).is_file()]
