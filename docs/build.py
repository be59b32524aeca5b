"""Build the documentation site from the notebooks and the package, without the network.

Notebooks -> nbdev's filters -> MyST-NB pages (`chapters.py`); the package -> API reference (`symbols.py`);
both -> Sphinx. Someone who has Quarto can still run `nbdev_docs` on the same notebooks.
"""
from __future__ import annotations
import argparse, json, re, shutil, sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NBS = ROOT/'nbs'
sys.path[:0] = [str(DOCS), str(ROOT)]

import chapters, symbols
from chapters import DOWNLOADS, Chapter
from symbols import PACKAGE, Links, Symbol

# Folders of nbs/ that are not part of the package, and their captions in the sidebar.
GROUPS = {'tutorials': 'Tutorials', 'baselines': 'Baselines'}


@dataclass
class Part:
    "A numbered folder of chapters; its own page is `00_about.ipynb`, or is made where there is none yet."
    about: Chapter
    chapters: list[Chapter]

    @property
    def page(self) -> str: return self.about.page


def notebooks(folder: Path) -> list[Path]:
    "A folder's notebooks in reading order, which their numbers give."
    return sorted(p for p in folder.glob('*.ipynb') if p.name != 'index.ipynb' and p.name[0] not in '_.')


def read_all(folder: Path) -> list[Chapter]: return [chapters.read(p, NBS) for p in notebooks(folder)]


def parts() -> list[Part]:
    "The parts of the book, in reading order."
    return [read_part(p) for p in sorted(NBS.iterdir()) if p.is_dir() and p.name[0].isdigit()]


def read_part(folder: Path) -> Part:
    found = read_all(folder)
    name = chapters.unnumbered(folder.name)
    if found and found[0].page == f'{name}/about': return Part(found[0], found[1:])
    made = Chapter(folder/'00_about.ipynb', f'{name}/about', name.replace('_', ' ').capitalize())
    return Part(made, found)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def write_sources(out: Path) -> None:
    "Everything that Sphinx reads, made from scratch."
    shutil.rmtree(out, ignore_errors=True)
    book, last = parts(), read_all(NBS)
    groups = {caption: read_all(NBS/folder) for folder, caption in GROUPS.items()}
    core = [c for part in book for c in part.chapters] + last
    found = symbols.load([c.module for c in core if c.module])
    links = Links(found, [c.module for c in core if c.module])
    for c in core + sum(groups.values(), []):
        write(out/f'{c.page}.ipynb', json.dumps(chapters.to_page(c, found, links)))
    for part in book: write(out/f'{part.page}.ipynb', json.dumps(part_page(part, found, links)))
    write(out/'index.ipynb', json.dumps(landing(book, last, groups, found, links)))
    write_reference(out/'reference', core, found, links)
    copy_files(out)


def landing(
    book: list[Part],
    last: list[Chapter], # chapters outside the parts
    groups: dict[str, list[Chapter]], # tutorials and the like, by caption
    found: list[Symbol],
    links: Links,
) -> dict: # a notebook
    "The first page: the index notebook, then a table of contents, which is the sidebar's as well."
    page = chapters.to_page(chapters.read(NBS/'index.ipynb', NBS), found, links)
    shelves = {'Chapters': [*(part.about for part in book), *last]} | groups
    shelves = {caption: shelf for caption, shelf in shelves.items() if shelf}
    inside = {part.page: part.chapters for part in book}
    texts, trees = [], []
    for caption, shelf in shelves.items():
        texts.append(f'### {caption}\n\n' + '\n'.join(item(c, inside.get(c.page, [])) for c in shelf))
        trees.append(toctree([f'{short_title(c)} <{c.page}>' for c in shelf], caption))
    trees.append(toctree(['reference/index'], 'API reference'))
    page['cells'].append(chapters.markdown('\n\n'.join(['## Contents', *texts, *trees])))
    return page


def part_page(part: Part, found: list[Symbol], links: Links) -> dict:
    "What a part is about, and its chapters: a list of those that it does not name; all in the sidebar."
    page = chapters.to_page(part.about, found, links)
    said = '\n'.join(cell['source'] for cell in page['cells'])
    missing = [c for c in part.chapters if not any(way in said for way in ways_to(c))]
    folder = Path(part.page).parent
    if missing: page['cells'].append(chapters.markdown('\n'.join(item(c, folder=folder) for c in missing)))
    page['cells'].append(chapters.markdown(toctree([f'/{c.page}' for c in part.chapters])))
    return page


def ways_to(c: Chapter) -> list[str]:
    "How a page of the same part may link to a chapter."
    return [f'({Path(c.page).name}.ipynb', f'(#{symbols.chapter_label(c.module)})']


def item(
    c: Chapter,
    inside: Sequence[Chapter] = (), # named below it
    folder: Path = Path(), # of the page that links to it
) -> str: # one line of a list
    "A link to a chapter, what it is about, and links to the chapters inside."
    text = f'- **[{short_title(c)}]({Path(c.page).relative_to(folder)}.ipynb)**'
    if c.description: text += f' — {c.description}'
    if inside: text += '\\\n  ' + ' · '.join(f'[{x.title}]({x.page}.ipynb)' for x in inside)
    return text


def short_title(c: Chapter) -> str:
    "For the sidebar: `About data` is `Data`."
    title = re.sub(r'^About (?:the )?', '', c.title)
    return title[:1].upper() + title[1:]


def toctree(
    pages: Iterable[str], # by their names in the site; with a slash in front, from its root
    caption: str = '', # shown in the sidebar
) -> str:
    options = ':hidden:\n' + (f':caption: {caption}\n' if caption else '')
    return f'```{{toctree}}\n{options}\n' + '\n'.join(pages) + '\n```'


def write_reference(out: Path, everything: list[Chapter], found: list[Symbol], links: Links) -> None:
    "A page per module, and one that lists all symbols."
    names: list[str] = []
    overview = ['# All symbols', '{.lead}\nEverything that the chapters make, in their order. '
                'Names in *italics* are internal: documented, but not part of the public interface.']
    for c in everything:
        own = [s for s in found if s.module == c.module]
        if not own: continue
        names.append(c.module)
        write(out/f'{c.module}.md', reference_page(c, own, links))
        rows = '\n'.join(row(s, links) for s in own if not s.is_method)
        head = f'## [`{PACKAGE}.{c.module}`]({c.module}.md)'
        overview.append(f'{head}\n\n| Symbol | What it is |\n| --- | --- |\n{rows}')
    write(out/'index.md', '\n\n'.join([*overview, toctree(names)]) + '\n')


def reference_page(c: Chapter, own: list[Symbol], links: Links) -> str:
    "A module's symbols: the public ones first."
    public = [symbols.entry(s, links, back(c, s)) for s in own if s.public]
    internal = [symbols.entry(s, links, back(c, s)) for s in own if not s.public]
    if internal: internal.insert(0, '## Internal\n\nUsed by other chapters; may change without notice.')
    return '\n\n'.join([f'# `{PACKAGE}.{c.module}`\n\n{{.lead}}\n{c.description}', *public, *internal]) + '\n'


def row(s: Symbol, links: Links) -> str:
    "A symbol's line in the list of all."
    name = f'[`{s.name}`](#{s.label})' if s.public else f'*[`{s.name}`](#{s.label})*'
    return f'| {name} | {links.add(s.summary, s.module)} |'


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
        target = out/DOWNLOADS/f'{chapters.page_name(p, NBS)}.ipynb'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, target)


def build(out: Path, work: Path) -> int:
    "Sphinx's exit status; a warning is an error."
    sys.modules['rfc3987_syntax'] = None    # jsonschema does without; to be imported it takes seconds
    from sphinx.cmd.build import main
    write_sources(work)
    shutil.rmtree(out, ignore_errors=True)
    options = ['-q', '-b', 'html', '-W', '--keep-going', '-c', str(DOCS), '-d', str(work/'.doctrees')]
    return main([*options, str(work), str(out)])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT/'_docs'/'html', help='where the site goes')
    parser.add_argument('--work', type=Path, default=ROOT/'_sphinx', help='where the sources for Sphinx go')
    args = parser.parse_args()
    status = build(args.out.resolve(), args.work.resolve())
    if not status: print(f'{args.out}/index.html')
    sys.exit(status)
