"""Build the documentation site from the notebooks and the package, without the network.

Notebooks -> nbdev's filters -> MyST-NB pages (`chapters.py`); the package -> API reference (`symbols.py`);
both -> Sphinx. Someone who has Quarto can still run `nbdev_docs` on the same notebooks.
"""
from __future__ import annotations
import argparse, json, shutil, sys
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NBS = ROOT/'nbs'
sys.path[:0] = [str(DOCS), str(ROOT)]

import chapters, symbols
from chapters import Chapter
from symbols import PACKAGE, Links, Symbol

GROUPS = {'': 'Chapters', 'tutorials': 'Tutorials', 'baselines': 'Baselines'} # folders of nbs/, in the sidebar's order


def notebooks(folder: Path) -> list[Path]:
    "A folder's notebooks in reading order, which their numbers give."
    return sorted(p for p in folder.glob('*.ipynb') if p.name != 'index.ipynb' and p.name[0] not in '_.')


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def write_sources(out: Path) -> None:
    "Everything that Sphinx reads, made from scratch."
    shutil.rmtree(out, ignore_errors=True)
    groups = {caption: [chapters.read(p, NBS) for p in notebooks(NBS/folder)] for folder, caption in GROUPS.items()}
    everything = [c for group in groups.values() for c in group]
    found = symbols.load([c.module for c in everything if c.module])
    modules = list(dict.fromkeys(s.module for s in found)) # those that have symbols of their own
    links = Links(found)
    for c in everything: write(out/f'{c.page}.ipynb', json.dumps(chapters.to_page(c, found, links)))
    write(out/'index.ipynb', json.dumps(landing(groups, modules, found, links)))
    write_reference(out/'reference', everything, found, links)
    copy_files(out)


def landing(groups: dict[str, list[Chapter]], modules: list[str], found: list[Symbol], links: Links) -> dict:
    "The first page: the index notebook, then a table of contents, which is the sidebar's as well."
    page = chapters.to_page(chapters.read(NBS/'index.ipynb', NBS), found, links)
    listed = {caption: group for caption, group in groups.items() if group}
    contents = '\n\n'.join(f'### {caption}\n\n' + '\n'.join(_item(c, links) for c in group) for caption, group in listed.items())
    trees = [_toctree(caption, [c.page for c in group]) for caption, group in listed.items()]
    trees.append(_toctree('API reference', ['reference/index', *(f'reference/{m}' for m in modules)]))
    page['cells'].append(dict(cell_type='markdown', metadata={}, source=f'## Contents\n\n{contents}\n\n' + '\n\n'.join(trees)))
    return page


def _item(c: Chapter, links: Links) -> str:
    return f'- **[{c.title}]({c.page}.ipynb)** ' + (f'— {c.description}' if c.description else '')


def _toctree(caption: str, pages: Iterable[str]) -> str:
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```'


def write_reference(out: Path, everything: list[Chapter], found: list[Symbol], links: Links) -> None:
    "A page per module, and one that lists all symbols."
    overview = ['# All symbols\n\n{.lead}\nEverything that the package exports, by chapter.']
    for c in everything:
        own = [s for s in found if s.module == c.module]
        if not own: continue
        name = f'{PACKAGE}.{c.module}'
        entries = '\n\n'.join(symbols.entry(s, links, back(c, s)) for s in own)
        write(out/f'{c.module}.md', f'# `{name}`\n\n{{.lead}}\n{c.description}\n\n{entries}\n')
        rows = [f'| [`{s.name}`](#{s.label}) | {links.add(s.summary, s.module)} |' for s in own if not s.is_method]
        overview.append(f'## [`{name}`]({c.module}.md)\n\n| Symbol | What it is |\n| --- | --- |\n' + '\n'.join(rows))
    write(out/'index.md', '\n\n'.join(overview) + '\n')


def back(c: Chapter, s: Symbol) -> str:
    "A link from a symbol's entry to the cell that makes it."
    return f'[{c.title}](#chapter.{s.label})' if s.label in c.defined else f'[{c.title}](../{c.page}.ipynb)'


def copy_files(out: Path) -> None:
    "Pictures that the notebooks show, the notebooks for download, and MathJax."
    for p in NBS.rglob('*'):
        if p.suffix in ('.png', '.svg', '.jpg', '.gif'):
            (out/p.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(p, out/p.relative_to(NBS))
    for p in NBS.rglob('*.ipynb'):
        if '.ipynb_checkpoints' in p.parts: continue
        (out/'notebooks').mkdir(exist_ok=True)
        shutil.copy2(p, out/'notebooks'/p.name)


def build(out: Path, work: Path) -> int:
    "Sphinx's exit status; a warning is an error."
    from sphinx.cmd.build import main
    write_sources(work)
    shutil.rmtree(out, ignore_errors=True)
    return main(['-q', '-b', 'html', '-W', '--keep-going', '-c', str(DOCS), '-d', str(work/'.doctrees'), str(work), str(out)])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT/'_docs'/'html', help='where the site goes')
    parser.add_argument('--work', type=Path, default=ROOT/'_sphinx', help='where the sources for Sphinx go')
    args = parser.parse_args()
    status = build(args.out.resolve(), args.work.resolve())
    if not status: print(f'{args.out}/index.html')
    sys.exit(status)
