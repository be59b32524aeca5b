"From nbdev's notebooks to pages that MyST-NB understands."
from __future__ import annotations
import ast, re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
import yaml
from execnb.nbio import nb2dict
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language
from nbdev.processors import FrontmatterProc, rm_header_dash, strip_ansi, strip_hidden_metadata
from nbdev.showdoc import showdoc_nm
from symbols import PACKAGE, Links, Symbol, body, chapter_label

# nbdev's own filters, without those that hide exported code (here it is what people come to read) and without
# those that run cells (the outputs are stored already, and the reference is made from the package).
FILTERS = [FrontmatterProc, populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash,
           clean_magics, hide_, strip_hidden_metadata]
DOWNLOADS = 'notebooks' # where the site keeps the notebooks themselves
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
EXPORTS = {'export', 'exports', 'exporti'}
TAGS = {('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output',
        ('include', 'false'): 'remove-cell'}


@dataclass
class Chapter:
    "A notebook on its way to a page."
    path: Path # of the notebook
    page: str # the page's name in the site, e.g. `data/streams` or `tutorials/cost`
    title: str = ''
    description: str = ''
    module: str = '' # what it exports to, without the package; empty for tutorials
    cells: list[dict] = field(default_factory=list)
    defined: set[str] = field(default_factory=set) # labels of what the page's code makes; `to_page` fills it


def unnumbered(path: str) -> str:
    "`02_data/04_Streams` -> `data/streams`: numbers give the order, and are no part of an address."
    return '/'.join(re.sub(r'^\d+\w*?_', '', name) for name in path.lower().split('/'))


def page_name(path: Path, root: Path) -> str:
    "The name of a notebook's page in the site."
    return unnumbered(path.relative_to(root).with_suffix('').as_posix())


def read(path: Path, root: Path) -> Chapter:
    "A notebook after nbdev's filters."
    nb = NBProcessor(path, procs=FILTERS, process=True).nb
    said = {k: str(nb.frontmatter_.get(k, '')) for k in ('title', 'description')}
    chapter = Chapter(path, page_name(path, root), **said)
    for cell in nb.cells:
        exp = cell.directives_.get('default_exp') if cell.cell_type == 'code' else None
        if exp: chapter.module = exp[0]
        elif cell.cell_type != 'raw' and cell.source.strip(): chapter.cells.append(cell)
    return chapter


def to_page(chapter: Chapter, symbols: list[Symbol], links: Links) -> dict:
    "The notebook of the page, as MyST-NB reads it."
    cells = [markdown(opening(chapter, links, any(s.module == chapter.module for s in symbols)))]
    for cell in chapter.cells:
        shown = re.match(r'\s*show_doc\((\w+(?:\.\w+)*)', cell.source)
        if cell.cell_type == 'markdown': cells.append(markdown(prose(cell.source, chapter, links)))
        elif shown: cells.append(_show_doc(shown[1], symbols, links))
        else: cells += code(cell, chapter, symbols)
    return dict(cells=cells, metadata=dict(language_info=dict(name='python')), nbformat=4, nbformat_minor=4)


def markdown(text: str) -> dict:
    "A cell of prose."
    return dict(cell_type='markdown', metadata={}, source=text)


def opening(chapter: Chapter, links: Links, has_reference: bool) -> str:
    "Title and lead; then the way to the reference and to the notebook."
    up, where = '../' * chapter.page.count('/'), []
    if has_reference: where.append(f'Makes [`{PACKAGE}.{chapter.module}`]({up}reference/{chapter.module}.md)')
    download = f'{up}{DOWNLOADS}/{chapter.page}.ipynb'
    if chapter.path.is_file(): where.append(f'{{download}}`the notebook <{download}>`')
    lead = f'{{.lead}}\n{links.add(chapter.description, chapter.module)}\n\n' if chapter.description else ''
    target = f'({chapter_label(chapter.module)})=\n' if chapter.module else ''
    head = f'{target}# {chapter.title}\n\n{lead}'
    if chapter.page == 'index' or not where: return head
    return f'{head}{{.where}}\n' + ' · '.join(where)


def prose(text: str, chapter: Chapter, links: Links) -> str:
    "Quarto's Markdown as MyST's, with links inside the site."
    return notebook_links(links.add(callouts(text), chapter.module))


def callouts(text: str) -> str:
    "Quarto's callouts as MyST's admonitions."
    def convert(m: re.Match) -> str:
        titled = re.search(r'title="(.*?)"', m['options'])
        inner = re.match(r'\s*#+ +(.*)\n', m['body'])
        title, content = '', m['body']
        if titled: title = titled[1]
        elif inner: title, content = inner[1], content[inner.end():]
        head = f":::{{admonition}} {title}\n:class: {m['kind']}\n" if title else f":::{{{m['kind']}}}\n"
        return head + content.strip('\n') + '\n:::'
    pattern = r'^:::+ *\{\.callout-(?P<kind>\w+)(?P<options>[^}]*)\}\n(?P<body>.*?)^:::+ *$'
    return re.sub(pattern, convert, text, flags=re.S | re.M)


def notebook_links(text: str) -> str:
    "Links to notebooks, by file or by their page's name, as links to the pages made from them."
    def convert(m: re.Match) -> str:
        return f"]({unnumbered(m['page'])}.ipynb{(m['anchor'] or '').lower()})"
    pattern = r'\]\((?P<page>(?:[\w.-]+/)*[\w-]+)\.(?:ipynb|html)(?P<anchor>#[\w.-]+)?\)'
    return re.sub(pattern, convert, text)


def _show_doc(name: str, symbols: list[Symbol], links: Links) -> dict:
    "What `show_doc(name)` shows: the reference entry."
    found = [s for s in symbols if s.name == name]
    if not found: raise ValueError(f'show_doc({name}): {PACKAGE} exports no {name}')
    return markdown(f'**[`{name}`](#{found[0].label})**\n\n' + body(found[0], links))


def code(cell: Any, chapter: Chapter, symbols: list[Symbol]) -> list[dict]:
    "A code cell, under a bar that names what it defines when it is exported."
    options, source = quarto_options(cell.source)
    tags = [t for o, t in TAGS.items() if str(options.get(o[0])).lower() == o[1]]
    page = dict(cell_type='code', metadata=dict(tags=tags), execution_count=None, source=source.strip('\n'),
                outputs=nb2dict(cell.get('outputs', [])))
    if caption := options.get('fig-cap'): page['metadata']['mystnb'] = dict(figure=dict(caption=str(caption)))
    if str(options.get('code-fold')).lower() == 'true': fold(page, str(options.get('code-summary', 'Code')))
    if alt := options.get('fig-alt'): page['metadata'].setdefault('mystnb', {})['image'] = dict(alt=str(alt))
    if not EXPORTS & cell.directives_.keys(): return [page]
    tags.append('exported')
    if only_imports(source): fold(page, 'Imports')
    bar = defines(source, chapter, symbols)
    return [markdown(bar), page] if bar else [page]


def only_imports(source: str) -> bool:
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def fold(page: dict, summary: str) -> None:
    "Show the cell's code only on demand."
    page['metadata']['tags'].append('hide-input')
    page['metadata'].setdefault('mystnb', {}).update(code_prompt_show=summary, code_prompt_hide=summary)


def quarto_options(source: str) -> tuple[dict, str]:
    "The `#| key: value` lines at the top of a cell, and the rest."
    lines = source.split('\n')
    head = [l for l in lines if re.match(r'#\|\s*[\w-]+:', l)]
    options = yaml.safe_load('\n'.join(l[2:].strip() for l in head)) or {}
    return options, '\n'.join(l for l in lines if l not in head)


def defines(source: str, chapter: Chapter, symbols: list[Symbol]) -> str:
    "A line of links to the entries of what a cell defines; the entries link back to it."
    known = {s.name: s for s in symbols if s.module == chapter.module and s.label not in chapter.defined}
    found = [known[n] for n in dict.fromkeys(_names(source)) if n in known]
    if not found: return ''
    chapter.defined.update(s.label for s in found)
    targets = ''.join(f'(chapter.{s.label})=\n' for s in found)
    return f"{targets}{{.defines}}\n{' '.join(f'[`{s.name}`](#{s.label})' for s in found)}"


def _names(source: str) -> list[str]:
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, DEFINITIONS): names.append(showdoc_nm(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign): # also `WIDTH, EPOCHS = ...`
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            names += [n.id for n in inside if isinstance(n.ctx, ast.Store)]
    return names
