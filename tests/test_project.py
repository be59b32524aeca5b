"The project as a whole: what is made from the notebooks is in step with them, and the house rules are kept."
from __future__ import annotations
import ast, importlib, inspect, io, json, os, re, runpy, shutil, statistics, subprocess, sys, tokenize, types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
LAST = ['baselines', 'tutorials'] # folders that come after the parts and the chapters beside them
EXPORTS = {'export', 'exports', 'exporti'}

# What `import mwt` and `from mwt.all import *` give: all that most programs type.
PUBLIC = set('''
    image_data from_tensors ImageData Batches Augment create_model modularize plain mask_table
    MwtError Method MwT Composable MODA fit TrainConfig History save_checkpoint load_checkpoint evaluate
    profile
    decompose Parts save_parts load_parts extract SlimModule save_module load_module compose fine_tune
    replace_class export mend fit_budget narrow
    plot_masks plot_coupling Table percent Run similarity drop_blocks shorten'''.split())


def is_notebook(path: Path) -> bool: return not any(part[0] in '._' for part in path.relative_to(NBS).parts)


def module_name(path: Path) -> str:
    "`mwt/core/checks.py` -> `core.checks`"
    return '.'.join(path.relative_to(ROOT/'mwt').with_suffix('').parts)


NOTEBOOKS = sorted(filter(is_notebook, NBS.rglob('*.ipynb')))
MODULES = sorted(module_name(p) for p in (ROOT/'mwt').rglob('*.py') if p.name[0] != '_')
by_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
by_module = pytest.mark.parametrize('name', MODULES)


def all_cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding='utf-8'))['cells']


def cells(path: Path, kind: str = 'code') -> list[dict]:
    return [c for c in all_cells(path) if c['cell_type'] == kind]


def source(cell: dict) -> str: return ''.join(cell['source'])


def directives(cell: dict) -> set[str]: return set(re.findall(r'^#\|\s*(\w+)', source(cell), flags=re.M))


def runnable(code: str) -> str:
    "Without the lines that only IPython understands."
    return '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in code.splitlines())


def exported(path: Path) -> list[str]:
    "The source of the cells that make the package."
    return [source(c) for c in cells(path) if directives(c) & EXPORTS]


def visible(path: Path) -> list[dict]:
    "The code cells that a reader sees."
    return [c for c in cells(path) if source(c).strip() and not directives(c) & {'hide', 'default_exp'}]


# In step with the notebooks

def snapshot(folder: Path) -> dict[str, bytes]:
    skipped = {'.git', '__pycache__', '.last_checked'}
    found = [p for p in folder.rglob('*') if p.is_file() and not skipped & {*p.parts}]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@pytest.fixture(scope='module')
def prepared(
    files: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, bytes], dict[str, bytes], Path]: # files before and after, and where they are
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
    cmd = [sys.executable, 'tools/prepare.py']
    done = subprocess.run(cmd, cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_made_from_notebooks_is_in_step(prepared: tuple) -> None:
    before, after, _ = prepared
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f'run `make prepare`; it changes {changed}'


def test_preparing_twice_changes_nothing_and_leaves_no_module_over(prepared: tuple) -> None:
    _, once, copy = prepared
    names = ('left_over.py', 'core/left_over.py', 'attic/__init__.py', 'attic/old.py')
    left_over = [copy/'mwt'/name for name in names]
    for p in left_over:
        p.parent.mkdir(exist_ok=True)
        p.write_text('x = 1\n')
    run_prepare(copy)
    assert not [p for p in left_over if p.exists()]
    assert (copy/'mwt'/'core'/'__init__.py').exists() and not (copy/'mwt'/'attic').exists()
    assert snapshot(copy) == once


# Chapters

def number(name: str) -> int: return int(re.match(r'\d+', name)[0])


def position(path: Path) -> tuple[int, int]:
    "A notebook's place in the reading order; the index comes last, since it may use everything."
    *folders, name = path.relative_to(NBS).parts
    if not folders: return (number(name), 0) if name[0].isdigit() else (1000, 0)
    first = 100 + LAST.index(folders[0]) if folders[0] in LAST else number(folders[0])
    return first, number(name)


def exported_module(path: Path) -> str | None:
    found = [m[1] for c in cells(path) if (m := re.match(r'#\|\s*default_exp\s+(\S+)', source(c)))]
    return found[0] if found else None


def imported(code: str) -> Iterator[str]:
    "What a cell imports of the package, at any depth: modules, and names of the package itself."
    for node in ast.walk(ast.parse(runnable(code))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['mwt' if node.level else '', node.module]))
            names = [f'{base}.{a.name}' for a in node.names] if base == 'mwt' else [base]
        else: continue
        yield from (n.partition('.')[2] for n in names if n.split('.')[0] == 'mwt')


@by_notebook
def test_imports_point_backward(path: Path) -> None:
    place = {exported_module(p): position(p) for p in NOTEBOOKS if exported_module(p)}
    face = place['all'] # what `import mwt` itself gives
    for cell in cells(path):
        for name in imported(source(cell)):
            if name.startswith('__') or not name: continue # the version; the package itself
            known = name in place or name in PUBLIC
            assert known, f'{path.name} imports mwt.{name}, which no notebook exports'
            earlier = place.get(name, face) < position(path)
            assert earlier, f'{path.name} imports mwt.{name}, a chapter that comes later (or itself)'


def test_chapter_numbers_are_unique() -> None:
    places = [position(p) for p in NOTEBOOKS]
    assert len(places) == len(set(places))


def test_each_part_says_what_it_is_about() -> None:
    folders = [p for p in sorted(NBS.iterdir()) if p.is_dir() and p.name[0].isdigit()]
    missing = [p.name for p in folders if not (p/'00_about.ipynb').is_file()]
    assert folders and not missing, f'no 00_about.ipynb in {missing}'


def test_a_chapter_makes_the_module_of_its_name() -> None:
    wrong = {}
    for path in NOTEBOOKS:
        name = exported_module(path)
        if name is None: continue
        steps = [re.sub(r'^\d+_', '', part) for part in path.relative_to(NBS).with_suffix('').parts]
        if len(steps) == 2 and steps[0] == steps[1]: steps = steps[:1] # a part of one chapter is a module
        if name not in ('.'.join(steps), '__main__'): wrong[path.relative_to(NBS).as_posix()] = name
    assert not wrong


@by_notebook
def test_notebook_is_fit_to_read(path: Path) -> None:
    code, prose = visible(path), [c for c in cells(path, 'markdown') if source(c).strip()]
    assert path.stat().st_size < 300_000, 'over 300 KB: make plots smaller'
    opens = re.match(r'# \S.*\n+> \S', source(prose[0]))
    assert opens, 'begins with a title and a description (`# ...`, `> ...`)'
    if not code: return
    examples = [c for c in code if not directives(c) & (EXPORTS | {'eval'})]
    assert not examples or any(c['outputs'] for c in examples), 'has no outputs: execute it before committing'
    assert len(prose) >= len(code) / 2, f'{len(prose)} prose cells for {len(code)} code cells'


@by_notebook
def test_no_error_is_stored(path: Path) -> None:
    for cell in cells(path):
        errors = [o for o in cell['outputs'] if o['output_type'] == 'error']
        assert not errors, f'an error is stored below:\n{source(cell)}'


@by_notebook
def test_exported_cells_are_short(path: Path) -> None:
    for cell in cells(path):
        if not directives(cell) & EXPORTS: continue
        lines = [l for l in source(cell).strip().splitlines() if not l.startswith('#|')]
        assert len(lines) <= 45, f'{len(lines)} lines:\n{source(cell)}'


# How it reads

FOLDERS = ['tests', 'benchmarks', 'docs', 'tools']
PYTHON_FILES = sorted(p for folder in FOLDERS for p in (ROOT/folder).rglob('*.py'))


def prose_lines(text: str) -> list[str]:
    "Lines of Markdown, without rows of tables and lines that are one long word, such as an address."
    return [l for l in text.splitlines() if not l.lstrip().startswith('|') and ' ' in l.strip(' -*>')]


def listed(found: list[str], most: int = 40) -> str:
    more = [f'... and {len(found) - most} more'] if len(found) > most else []
    return '\n'.join(['', *found[:most], *more])


@pytest.mark.parametrize('kind', ['notebooks', 'prose', 'files'])
def test_lines_fit_a_page(kind: str) -> None:
    "110 columns are what a page of the site shows without scrolling sideways."
    if kind == 'files':
        lines = [(p, l) for p in PYTHON_FILES for l in p.read_text(encoding='utf-8').splitlines()]
    elif kind == 'prose':
        lines = [(p, l) for p in NOTEBOOKS for c in cells(p, 'markdown') for l in prose_lines(source(c))]
    else:
        lines = [(p, l) for p in NOTEBOOKS for c in cells(p) for l in source(c).splitlines()]
    wide = [f'{p.relative_to(ROOT)}: {len(l)}: {l}' for p, l in lines if len(l) > 110]
    assert not wide, f'{len(wide)} lines over 110 columns:{listed(wide)}'


def test_few_lines_of_the_package_are_long() -> None:
    lines = [l for p in NOTEBOOKS for code in exported(p) for l in code.splitlines() if l.strip()]
    wide = [l for l in lines if len(l) > 100]
    fraction = len(wide) / len(lines)
    problem = f'{fraction:.1%} of {len(lines)} exported lines are over 100 columns'
    assert fraction <= 0.02, f'{problem}:{listed(wide)}'


IGNORED = {tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
           tokenize.DEDENT, tokenize.ENDMARKER}

def tokens_per_line(code: str) -> dict[int, int]:
    "How many tokens start on each line; a string is one, also where Python takes f-strings apart (3.12)."
    start, end = (getattr(tokenize, f'FSTRING_{k}', -1) for k in ('START', 'END'))
    found: dict[int, int] = {}
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        depth -= token.type == end
        if not depth and token.type not in IGNORED | {end}:
            found[token.start[0]] = found.get(token.start[0], 0) + 1
        depth += token.type == start
    return found


def body_lines(code: str) -> set[int]:
    "The lines of function bodies, without docstrings."
    lines: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef): continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        for statement in body: lines.update(range(statement.lineno, statement.end_lineno + 1))
    return lines


def test_tokens_are_counted() -> None:
    code = 'def f(x: int) -> str:\n    "Words."\n    y = x + 1 # a comment\n    return f"{y + 1} kernels"\n'
    assert body_lines(code) == {3, 4}
    assert {line: n for line, n in tokens_per_line(code).items() if line > 2} == {3: 5, 4: 2}


def test_one_idea_a_line() -> None:
    "At the 90th percentile a line of a function body has at most 23 tokens, as in fastcore."
    counts = []
    for path in NOTEBOOKS:
        for code in exported(path):
            per_line, lines = tokens_per_line(code), code.splitlines()
            counts += [(per_line[n], path, lines[n - 1]) for n in body_lines(code) & per_line.keys()]
    p90 = statistics.quantiles([n for n, _, _ in counts], n=10)[-1]
    worst = sorted(counts, key=lambda c: -c[0])
    shown = [f'{n} tokens: {p.relative_to(NBS)}: {line.strip()}' for n, p, line in worst]
    assert p90 <= 23, f'{p90:.0f} tokens at the 90th percentile of {len(counts)} lines:{listed(shown)}'


def only_imports(code: str) -> bool:
    "Also such as only type checkers need: `if TYPE_CHECKING: ...`."
    nodes = ast.parse(runnable(code)).body
    nodes = [inner for node in nodes for inner in (node.body if isinstance(node, ast.If) else [node])]
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)


def is_proof(cell: dict) -> bool:
    "Does a code cell show or check something?"
    code = source(cell)
    if directives(cell) & (EXPORTS | {'default_exp'}) or only_imports(code): return False
    checks = re.search(r'\b(?:assert|test_\w+|show_doc)\b', code)
    return bool(checks or cell['outputs'])


def followed_by_proof(following: list[dict]) -> bool:
    "Is the next cell, or the next after the prose that introduces it, one that shows or checks something?"
    if following and following[0]['cell_type'] == 'markdown':
        if source(following[0]).startswith('#'): return False # another section
        following = following[1:]
    return bool(following) and following[0]['cell_type'] == 'code' and is_proof(following[0])


def proofs(path: Path) -> list[bool]:
    "For each exported cell of a chapter: is it shown or checked right after?"
    found = [c for c in all_cells(path) if source(c).strip()]
    counted = [i for i, c in enumerate(found) if c['cell_type'] == 'code' and directives(c) & EXPORTS]
    return [followed_by_proof(found[i + 1:]) for i in counted if not only_imports(source(found[i]))]


def test_code_is_shown_working() -> None:
    "At least 60 % of the exported cells are followed by a cell that shows or checks something."
    by_chapter = {p.relative_to(NBS).as_posix(): proofs(p) for p in NOTEBOOKS}
    everything = sum(by_chapter.values(), [])
    fraction = sum(everything) / len(everything)
    worst = sorted((sum(found) / len(found), name, found) for name, found in by_chapter.items() if found)
    shown = [f'{f:4.0%}  {sum(found)} of {len(found)}  {name}' for f, name, found in worst]
    assert fraction >= 0.6, f'{fraction:.0%} of {len(everything)} exported cells:{listed(shown, 20)}'


@by_notebook
def test_one_statement_a_line(path: Path) -> None:
    found = []
    for code in exported(path):
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        found += [t.line.strip() for t in tokens if t.type == tokenize.OP and t.string == ';']
    assert not found, listed(found)


def test_conditions_stand_outside_of_calls() -> None:
    "A conditional expression inside an argument hides a decision."
    found = []
    for path in NOTEBOOKS:
        for code in exported(path):
            calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
            given = [a for c in calls for a in [*c.args, *(k.value for k in c.keywords)]]
            found += [f'{path.relative_to(NBS)}: {ast.unparse(a)}' for a in given if isinstance(a, ast.IfExp)]
    assert not found, listed(found)


# Public names

STARS = '''
for module in ('mwt', 'mwt.all'):
    found = {}
    exec(f'from {module} import *', found)
    print(*sorted(found.keys() - {'__builtins__'}))
'''

@pytest.fixture(scope='module')
def stars() -> dict[str, set[str]]:
    "The names that `from module import *` brings, in a fresh process."
    done = subprocess.run([sys.executable, '-c', STARS], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(('mwt', 'mwt.all'), map(set, map(str.split, done.stdout.splitlines()))))


@pytest.mark.parametrize('module', ['mwt', 'mwt.all'])
def test_the_public_face_is_small(module: str, stars: dict[str, set[str]]) -> None:
    found = stars[module]
    assert not PUBLIC - found, f'{module} lacks {sorted(PUBLIC - found)}'
    assert not found - PUBLIC, f'{module} also has {sorted(found - PUBLIC)}'


def test_every_public_name_leads_somewhere() -> None:
    "Names are imported on first use."
    import mwt
    assert set(mwt.__all__) == PUBLIC
    assert not [n for n in PUBLIC if isinstance(getattr(mwt, n), types.ModuleType)]


def own(module: types.ModuleType) -> dict[str, Any]:
    "The functions and classes that a module defines, public or internal."
    made = {n: o for n, o in vars(module).items() if inspect.isroutine(o) or inspect.isclass(o)}
    return {n: o for n, o in made.items() if n[0] != '_' and getattr(o, '__module__', '') == module.__name__}


def functions(name: str) -> Iterator[tuple[str, Callable]]:
    "A module's functions, constructors and methods."
    for known, obj in own(importlib.import_module(f'mwt.{name}')).items():
        if inspect.isfunction(obj): yield known, obj
        elif inspect.isclass(obj): yield from ((f'{known}.{n}', f) for n, f in methods(obj))


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
def test_names_are_documented(name: str) -> None:
    "Also the internal ones: each is documented where it lives."
    found = own(importlib.import_module(f'mwt.{name}'))
    assert not [n for n, obj in found.items() if not own_docstring(obj)]


def own_docstring(obj: Any) -> str:
    "Not an inherited one, nor the signature that a dataclass without words gets."
    doc = (obj.__doc__ or '').strip()
    return '' if re.fullmatch(r'\w+\(.*\)', doc, flags=re.S) else doc


@by_module
def test_names_are_typed(name: str) -> None:
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


def test_promises_of_safety_name_their_tests() -> None:
    "SECURITY.md says which test shows what, and where to report a problem."
    text = (ROOT/'SECURITY.md').read_text(encoding='utf-8')
    named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', text)
    assert len(named) >= 10
    for file, test in named: assert f'def {test}(' in (ROOT/'tests'/file).read_text(encoding='utf-8'), test
    assert '/security/advisories/new' in text and 'SECURITY.md' in (ROOT/'MANIFEST.in').read_text()


def test_entry_points_lead_somewhere(setup_arguments: dict[str, Any]) -> None:
    for group in ('console_scripts', 'nbdev'):
        lines = setup_arguments['entry_points'][group]
        for line in [lines] if isinstance(lines, str) else lines:
            module, attribute = line.split('=')[1].split(':')
            assert hasattr(importlib.import_module(module), attribute), line


def test_promises_name_tests_that_there_are() -> None:
    "What the page on guarantees, and the one on security, name as their proof."
    found = []
    for page in ('nbs/tutorials/07_what_can_go_wrong.ipynb', 'SECURITY.md'):
        path = ROOT/page
        text = path.read_text(encoding='utf-8') if path.exists() else ''
        found += re.findall(r'(test_\w+\.py)::(test_\w+)', text)
    assert len(found) > 20
    for file, name in found:
        text = (ROOT/'tests'/file).read_text(encoding='utf-8')
        assert re.search(rf'^def {name}\(', text, re.M), f'{file}::{name}'
