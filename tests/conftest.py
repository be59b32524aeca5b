"What all tests share: this checkout's package, one thread and little memory a process."
from __future__ import annotations
import ctypes, gc, os, resource, subprocess, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports torch; the processes that tests start inherit it. Tests run side by side, one
# process a core, and networks this small only get slower when many threads share them. Threads that wait for
# each other must not keep a busy core for long.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('GOMP_SPINCOUNT', '20000')
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
os.environ['MPLBACKEND'] = 'agg'

# Bytes that a process of the tests may take, and bytes that it, or one that a test starts, may reserve. Past
# the second limit an allocation fails; without it the machine would kill some process, and the run would end
# without a word. CUDA takes and reserves much, so there is no limit where there is a GPU.
MEMORY, RESERVED = 2 << 30, 6 << 30
HAS_GPU = Path('/dev/nvidia0').exists()
TOO_LARGE = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    "Limit the memory."
    if not HAS_GPU: resource.setrlimit(resource.RLIMIT_DATA, (RESERVED, RESERVED))


def check_memory(config: pytest.Config) -> None:
    "Fails once for a process that has taken too much."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    if HAS_GPU or peak < MEMORY or TOO_LARGE in config.stash: return
    config.stash[TOO_LARGE] = True
    raise MemoryError(f'this process has taken {peak:,} bytes by now, more than {MEMORY:,}')


# Files whose tests share nothing expensive; of all others the tests stay in one process, so that their
# fixtures are made once.
SPREAD = {'test_notebooks.py', 'test_channels.py', 'test_losses.py'}

@pytest.hookimpl(tryfirst=True)         # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name not in SPREAD: item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    "A process stays within its memory; after a file's last test, memory goes back to the machine."
    check_memory(item.config)
    if nextitem and nextitem.path == item.path: return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) # glibc only
    if trim: trim(0)


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


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    "Runs a command that is to be refused, in this process; the one line that it says on its way out."
    from mwt.runs.cli import main

    def call(*words: Any) -> str:
        capsys.readouterr()
        try: status = main([str(w) for w in words])
        except SystemExit as e: status = e.code         # argparse leaves so
        out, err = capsys.readouterr()
        assert status == 2, out + err
        assert err.startswith('mwt: ') and err.count('\n') == 1 and len(err) < 2500, err
        assert 'Traceback' not in err
        return err
    return call
