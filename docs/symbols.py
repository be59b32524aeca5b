"The package's symbols, public and internal: where each is documented, and its reference entry."
from __future__ import annotations
import ast, importlib, inspect, re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from fastcore.docments import docments

PACKAGE = 'mwt'
STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}


@dataclass(frozen=True)
class Symbol:
    "A name that a module defines: a function, a class, a method or a constant."
    module: str # without the package, e.g. `core.display`
    name: str # e.g. `Table` or `Table.html`
    obj: Any # what the name stands for
    label: str # its target in the API reference, e.g. `core.display.Table.html`
    public: bool = True # in the module's `__all__`

    @property
    def is_method(self) -> bool: return '.' in self.name
    @property
    def summary(self) -> str: return docstring(self.obj).split('\n\n')[0].replace('\n', ' ')


def docstring(obj: Any) -> str:
    "The object's own docstring; a constant's type has one too, which says nothing about the constant."
    described = inspect.isroutine(obj) or inspect.isclass(obj) or isinstance(obj, property)
    doc = (inspect.getdoc(obj) or '') if described else ''
    without_words = re.match(r'\w+\(.*\)$', doc) # a dataclass describes itself by its signature then
    return '' if without_words else doc


def load(modules: list[str]) -> list[Symbol]:
    "Every symbol of `modules`, each class followed by its methods; a module's public ones first."
    taken: set[str] = set()
    found = []
    for module in modules:
        for name, obj, public in _symbols(importlib.import_module(f'{PACKAGE}.{module}')):
            found.append(Symbol(module, name, obj, _label(f'{module}.{name}', taken), public))
    return found


def _label(name: str, taken: set[str]) -> str:
    "A target of its own also for a function `simcnn` beside a class `SimCNN`: Sphinx's targets ignore case."
    label = name
    while label.lower() in taken: label += '-2'
    taken.add(label.lower())
    return label


def _exported(tree: ast.Module) -> list[str]:
    "The names that a module's own notebook makes public: nbdev's list, without re-exports by hand."
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.List): continue
        if getattr(node.targets[0], 'id', '') == '__all__': return ast.literal_eval(node.value)
    return []


def _internal(tree: ast.Module, public: list[str]) -> list[str]:
    "Functions and classes from cells marked `#| exporti`; names with an underscore stay where they are."
    made = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    names = [n.name for n in made if not _is_patch(n) and not n.name.startswith('_')]
    return [name for name in dict.fromkeys(names) if name not in public]


def _is_patch(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    "A method: fastcore's `@patch`, `@patch_to(...)`, `@patch_property`."
    called = [getattr(d, 'func', d) for d in node.decorator_list]
    return any(getattr(d, 'id', '').startswith('patch') for d in called)


def _symbols(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    tree = ast.parse(inspect.getsource(module))
    public = _exported(tree)
    for name in public + _internal(tree, public):
        obj, is_public = getattr(module, name), name in public
        yield name, obj, is_public
        if not inspect.isclass(obj): continue
        for method, function in _methods(obj): yield f'{name}.{method}', function, is_public


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(cls).items():
        obj = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        documented = (inspect.isfunction(obj) or isinstance(obj, property)) and inspect.getdoc(obj)
        if documented and not name.startswith('_'): yield name, obj


def chapter_label(module: str) -> str: return f'makes.{module}'


class Links:
    "Finds the entry that a backticked name in prose means, or the chapter that makes a module."
    def __init__(self, symbols: list[Symbol], modules: Iterable[str]) -> None:
        self.modules = {f'{PACKAGE}.{m}': chapter_label(m) for m in modules}
        self.found: dict[str, list[Symbol]] = {}
        for s in symbols:
            names = [s.name, f'{s.module}.{s.name}', f'{PACKAGE}.{s.module}.{s.name}']
            if s.public: names.append(f'{PACKAGE}.{s.name}')
            for name in names: self.found.setdefault(name, []).append(s)

    def label(self, name: str, module: str = '') -> str | None:
        "The target for `name`; a name of two modules means the page's own, the public one, or nothing."
        if name in self.modules: return self.modules[name]
        found = self.found.get(name, [])
        own = [s for s in found if s.module == module]
        public = [s for s in found if s.public]
        chosen = own or public or found
        return chosen[0].label if len(chosen) == 1 else None

    def add(self, markdown: str, module: str = '') -> str:
        "`markdown` with its backticked names linked; headings, code blocks and links stay as they are."
        parts = re.split(r'(^ *```.*?^ *```|^ *~~~.*?^ *~~~|^#.*?$)', markdown, flags=re.S | re.M)
        return ''.join(p if i % 2 else self._in_prose(p, module) for i, p in enumerate(parts))

    def _in_prose(self, text: str, module: str) -> str:
        def link(match: re.Match) -> str:
            label = match['name'] and self.label(match['name'], module)
            return f'[{match[0]}](#{label})' if label else match[0]
        pattern = r'\[[^\]]*\]\([^)]*\)|``.*?``|`(?P<name>[A-Za-z_][\w.]*)(?:\(\))?`'
        return re.sub(pattern, link, text, flags=re.S)


def entry(symbol: Symbol, links: Links, chapter: str) -> str:
    "The reference entry of one symbol, in MyST Markdown; `chapter` is a link to where the symbol is made."
    level = '###' if symbol.is_method or not symbol.public else '##'
    if symbol.is_method and not symbol.public: level = '####'
    parts = [f'({symbol.label})=\n{level} `{symbol.name}`', body(symbol, links)]
    if not symbol.is_method: parts.append(f'{{.where}}\nChapter: {chapter}')
    return '\n\n'.join(parts)


def body(symbol: Symbol, links: Links) -> str:
    "Signature, docstring and parameter table."
    obj = symbol.obj
    parts = [f'```python\n{signature(symbol)}\n```', links.add(docstring(obj), symbol.module), bases(obj)]
    return '\n\n'.join(p for p in parts + [parameters(symbol, links)] if p)


def signature(symbol: Symbol, width: int = 78) -> str:
    "The call with types and defaults; a parameter a line where one line would be too long."
    obj, name = symbol.obj, symbol.name.split('.')[-1]
    if isinstance(obj, property): return f'{name}{_returns(inspect.signature(obj.fget))}  # property'
    if not callable(obj): return f'{name} = {_value(obj)}'
    kind = 'class' if inspect.isclass(obj) else 'def'
    try: sig = inspect.signature(obj)
    except ValueError: return f'{kind} {name}'
    args = _arguments(sig, symbol)
    returns = '' if kind == 'class' else _returns(sig)
    line = f'{kind} {name}({", ".join(args)}){returns}'
    if len(line) <= width: return line
    return f'{kind} {name}(\n' + ''.join(f'    {a},\n' for a in args) + f'){returns}'


def _arguments(sig: inspect.Signature, symbol: Symbol) -> list[str]:
    args, star = [], False
    for i, p in enumerate(sig.parameters.values()):
        if i == 0 and p.name in ('self', 'cls') and symbol.is_method: continue
        if p.kind is p.KEYWORD_ONLY and not star: args.append('*')
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        anno = '' if p.annotation is p.empty else f': {_type(p.annotation)}'
        default = '' if p.default is p.empty else f'={_value(p.default)}'
        if default and anno: default = f' = {default[1:]}'
        args.append(f"{STARS.get(p.kind, '')}{p.name}{anno}{default}")
    return args


def _returns(sig: inspect.Signature) -> str:
    return '' if sig.return_annotation is sig.empty else f' -> {_type(sig.return_annotation)}'


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _value(value: Any, longest: int = 60) -> str:
    "A default as one would type it, as far as it is short."
    text = getattr(value, '__qualname__', None) or repr(value)
    text = re.sub(r"<(?:class|function|enum) '?(?:\w+\.)*(\w+).*?>|<.*?>", lambda m: m[1] or '...', text)
    text = ' '.join(text.split())
    return text if len(text) <= longest else text[:longest] + ' ...'


def bases(obj: Any) -> str:
    "What a class builds upon, where that says something."
    names = [b for b in getattr(obj, '__bases__', ()) if b is not object] if inspect.isclass(obj) else []
    return f"A kind of {', '.join(f'`{b.__module__}.{b.__qualname__}`' for b in names)}." if names else ''


def parameters(symbol: Symbol, links: Links) -> str:
    "The table of parameters, from the comments that stand beside them in the code."
    fn = symbol.obj.fget if isinstance(symbol.obj, property) else symbol.obj
    if not callable(fn): return ''
    found = {k: v for k, v in docments(fn, full=True, args_kwargs=True).items() if k not in ('self', 'cls')}
    if inspect.isclass(fn): found.pop('return', None)
    rows = [_row(k, v, symbol, links) for k, v in found.items() if k != 'return' or v.docment]
    if not rows: return ''
    return '| Parameter | Meaning | Type | Default |\n| --- | --- | --- | --- |\n' + '\n'.join(rows)


def _row(name: str, p: Any, symbol: Symbol, links: Links) -> str:
    empty = inspect.Parameter.empty
    anno = '' if p.anno in (None, empty) else f'`{_type(p.anno)}`'
    default = '' if p.default is empty else f'`{_value(p.default, 40)}`'
    meaning = links.add((p.docment or '').replace('\n', ' ').strip(), symbol.module)
    stars = STARS.get(p.get('kind'), '')
    cells = ['**returns**' if name == 'return' else f'`{stars}{name}`', meaning, anno, default]
    return '| ' + ' | '.join(re.sub(r'(?<!\\)\|', r'\\|', c) for c in cells) + ' |'
