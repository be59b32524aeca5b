"What holds for the project as a whole: everything made from the notebooks is in step, and the house rules are kept."
from __future__ import annotations
import ast, importlib, inspect, json, os, re, runpy, shutil, subprocess, sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
FOLDERS = ['', 'baselines', 'tutorials'] # in the order in which imports may point back
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
MODULES = sorted(p.stem for p in (ROOT/'mwt').glob('*.py') if p.name[0] != '_')
by_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
by_module = pytest.mark.parametrize('name', MODULES)


def cells(path: Path, kind: str = 'code') -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def source(cell: dict) -> str: return ''.join(cell['source'])


def directives(cell: dict) -> set[str]: return set(re.findall(r'^#\|\s*(\w+)', source(cell), flags=re.M))


def visible(path: Path) -> list[dict]:
    "The code cells that a reader sees."
    return [c for c in cells(path) if source(c).strip() and not directives(c) & {'hide', 'default_exp'}]


# In step with the notebooks

def snapshot(folder: Path) -> dict[str, bytes]:
    skipped = ('.git', '__pycache__', '.last_checked')
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*')
            if p.is_file() and not any(part in skipped for part in p.parts)}


@pytest.fixture(scope='module')
def prepared(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes], Path]:
    "A copy of the working files, before and after `tools/prepare.py`; the checkout itself stays as it is."
    copy = tmp_path_factory.mktemp('copy')
    for f in files:
        (copy/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, copy/f)
    before = snapshot(copy)
    run_prepare(copy)
    return before, snapshot(copy), copy


def run_prepare(folder: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONPATH': str(folder)}
    done = subprocess.run([sys.executable, 'tools/prepare.py'], cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_made_from_notebooks_is_in_step(prepared: tuple) -> None:
    before, after, _ = prepared
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f'run `make prepare`; it changes {changed}'


def test_preparing_twice_changes_nothing(prepared: tuple) -> None:
    _, once, copy = prepared
    run_prepare(copy)
    assert snapshot(copy) == once


def test_no_module_is_left_over(prepared: tuple) -> None:
    _, _, copy = prepared
    (copy/'mwt'/'left_over.py').write_text('x = 1\n')
    run_prepare(copy)
    assert not (copy/'mwt'/'left_over.py').exists()


# Chapters

def position(path: Path) -> tuple[int, int]:
    "A notebook's place in the reading order; the index comes last, since it may use everything."
    folder = path.parent.relative_to(NBS).as_posix().replace('.', '', 1)
    number = re.match(r'\d+', path.name)
    return (FOLDERS.index(folder), int(number[0])) if number else (len(FOLDERS), 0)


def exported_module(path: Path) -> str | None:
    found = [m[1] for c in cells(path) if (m := re.match(r'#\|\s*default_exp\s+(\S+)', source(c)))]
    return found[0] if found else None


def imported(code: str) -> Iterator[str]:
    "The package's modules that a cell imports, at any depth."
    runnable = '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in code.splitlines())
    for node in ast.walk(ast.parse(runnable)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['mwt' if node.level else '', node.module]))
            names = [f'{base}.{a.name}' for a in node.names] if base == 'mwt' else [base]
        else: continue
        yield from (n.split('.', 1)[1] for n in names if n.startswith('mwt.'))


@by_notebook
def test_imports_point_backward(path: Path) -> None:
    place = {exported_module(p): position(p) for p in NOTEBOOKS if exported_module(p)}
    for cell in cells(path):
        for name in imported(source(cell)):
            if name.startswith('__'): continue # the version
            assert name in place, f'{path.name} imports mwt.{name}, which no notebook exports'
            assert place[name] < position(path), f'{path.name} imports mwt.{name}, a chapter that comes later (or itself)'


def test_chapter_numbers_are_unique() -> None:
    places = [position(p) for p in NOTEBOOKS]
    assert len(places) == len(set(places))


@by_notebook
def test_notebook_is_fit_to_read(path: Path) -> None:
    code, prose = visible(path), [c for c in cells(path, 'markdown') if source(c).strip()]
    assert path.stat().st_size < 300_000, 'over 300 KB: make plots smaller'
    assert re.match(r'# \S.*\n+> \S', source(prose[0])), 'begins with a title and a description (`# ...`, `> ...`)'
    if not code: return
    examples = [c for c in code if not directives(c) & {'export', 'exports', 'eval'}]
    assert not examples or any(c['outputs'] for c in examples), 'has no outputs: execute it before committing'
    assert len(prose) >= len(code) / 2, f'{len(prose)} prose cells for {len(code)} code cells'


@by_notebook
def test_no_error_is_stored(path: Path) -> None:
    for cell in cells(path):
        assert not [o for o in cell['outputs'] if o['output_type'] == 'error'], f'an error is stored below:\n{source(cell)}'


@by_notebook
def test_exported_cells_are_short(path: Path) -> None:
    for cell in cells(path):
        if not directives(cell) & {'export', 'exports', 'exporti'}: continue
        lines = [l for l in source(cell).strip().splitlines() if not l.startswith('#|')]
        assert len(lines) <= 45, f'{len(lines)} lines:\n{source(cell)}'


# Public names

def functions(name: str) -> Iterator[tuple[str, Callable]]:
    "A module's public functions, constructors and methods."
    module = importlib.import_module(f'mwt.{name}')
    for public in getattr(module, '__all__', []):
        obj = getattr(module, public)
        if inspect.isfunction(obj): yield public, obj
        elif inspect.isclass(obj): yield from ((f'{public}.{n}', f) for n, f in methods(obj))


def methods(cls: type) -> Iterator[tuple[str, Callable]]:
    for name, value in vars(cls).items():
        fn = getattr(value, '__func__', getattr(value, 'fget', value))
        if inspect.isfunction(fn) and (name == '__init__' or name[0] != '_'): yield name, fn


def untyped(fn: Callable) -> list[str]:
    "Parameters without a type (and `return`), apart from `self`, `cls`, `*args` and `**kwargs`."
    sig = inspect.signature(fn)
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [p.name for p in sig.parameters.values()
               if p.annotation is p.empty and p.kind not in loose and p.name not in ('self', 'cls')]
    return missing + (['return'] if sig.return_annotation is sig.empty else [])


@by_module
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(f'mwt.{name}')
    described = [n for n in getattr(module, '__all__', []) if inspect.isroutine(getattr(module, n)) or inspect.isclass(getattr(module, n))]
    assert not [n for n in described if not own_docstring(getattr(module, n))]


def own_docstring(obj: Any) -> str:
    "Not an inherited one, nor the signature that a dataclass without words gets."
    doc = (obj.__doc__ or '').strip()
    return '' if re.fullmatch(r'\w+\(.*\)', doc, flags=re.S) else doc


@by_module
def test_public_names_are_typed(name: str) -> None:
    assert not {n: untyped(f) for n, f in functions(name) if untyped(f)}


# Files

def test_no_path_of_one_machine(files: list[Path]) -> None:
    pattern = re.compile(r'(?<![\w.~*-])/(?:' + '|'.join(['work', 'root', 'home', 'Users']) + r')/\w')
    found = []
    for f in files:
        try: text = (ROOT/f).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{f}: {m[0]}' for m in pattern.finditer(text)]
    assert not found


@pytest.fixture(scope='module')
def setup_arguments() -> dict[str, Any]:
    "What setup.py tells setuptools."
    import setuptools
    said: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, 'setup', lambda **kwargs: said.update(kwargs))
        runpy.run_path(str(ROOT/'setup.py'))
    return said


def test_package_is_complete(setup_arguments: dict[str, Any]) -> None:
    import mwt
    assert setup_arguments['packages'] and setup_arguments['packages'][0] == 'mwt'
    assert setup_arguments['version'] == mwt.__version__
    assert (ROOT/'mwt'/'py.typed').is_file() and 'py.typed' in setup_arguments['package_data']['mwt']
    assert any(r.startswith('torch>') for r in setup_arguments['install_requires'])
    for name in re.findall(r'^include (.+)$', (ROOT/'MANIFEST.in').read_text(), flags=re.M):
        for file in name.split(): assert (ROOT/file).is_file(), f'MANIFEST.in names {file}'
    assert {'settings.ini', 'README.md', 'LICENSE'} <= set((ROOT/'MANIFEST.in').read_text().split())
    assert not (ROOT/'pyproject.toml').exists(), 'settings.ini and setup.py are the one place for metadata'


def test_entry_points_lead_somewhere(setup_arguments: dict[str, Any]) -> None:
    for group in ('console_scripts', 'nbdev'):
        for line in [setup_arguments['entry_points'][group]] if isinstance(setup_arguments['entry_points'][group], str) else setup_arguments['entry_points'][group]:
            module, attribute = line.split('=')[1].split(':')
            assert hasattr(importlib.import_module(module), attribute), line
