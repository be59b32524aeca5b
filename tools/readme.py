"""Write README.md from nbs/index.ipynb, without Quarto: nbdev's filters, then nbconvert's Markdown.

`--check` writes nothing and fails when README.md is not what it would write.
"""
from __future__ import annotations
import argparse, json, re, sys
from pathlib import Path
import nbformat
from execnb.nbio import nb2dict
from nbconvert import MarkdownExporter
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, populate_language
from nbdev.processors import rm_export, strip_ansi, strip_hidden_metadata

ROOT = Path(__file__).resolve().parents[1]
IMAGES = Path('docs/images') # where the pictures of the notebook's outputs go; named relative to README.md
NOTE = '<!-- This file is made from nbs/index.ipynb: edit that, then run `make prepare`. -->'
FILTERS = [FrontmatterProc, populate_language, strip_ansi, hide_line, rm_export, clean_magics, hide_,
           strip_hidden_metadata]


def render(root: Path) -> tuple[str, dict[str, bytes]]:
    "README.md's text, and the pictures that it shows by path."
    nb = NBProcessor(root/'nbs'/'index.ipynb', procs=FILTERS, process=True).nb
    title, lead = (str(nb.frontmatter_.get(k, '')) for k in ('title', 'description'))
    node = plain(nb2dict(nb))
    text, resources = MarkdownExporter().from_notebook_node(node, dict(unique_key='index'))
    pictures = {f'{IMAGES.as_posix()}/{name}': data for name, data in sorted(resources['outputs'].items())}
    for path in pictures: # index_<cell>_<output>.png
        name = Path(path).name
        alt = node.cells[int(name.split('_')[1])].metadata.get('alt') or 'plot'
        text = re.sub(rf'!\[.*?\]\({re.escape(name)}\)', lambda m: f'![{alt}]({path})', text)
    head = f'# {title}\n\n{NOTE}\n\n' + (f'{lead}\n\n' if lead else '')
    return tidy(head + links(text)), pictures


def plain(nb: dict) -> nbformat.NotebookNode:
    "The notebook without front matter and Quarto's cell options; its metadata give fences their language."
    metadata = dict(language_info=dict(name='python'))
    whole = nb | dict(metadata=metadata, nbformat=4, nbformat_minor=4)
    node = nbformat.reads(json.dumps(whole), as_version=4)
    node.cells = [c for c in node.cells if c.cell_type != 'raw']
    for c in node.cells:
        if c.cell_type == 'code': apply_options(c)
    return node


def apply_options(cell: nbformat.NotebookNode) -> None:
    "Take Quarto's options out of a cell and do what they say."
    options = dict(re.findall(r'^#\|\s*([\w-]+):\s*"?(.*?)"?$', cell.source, flags=re.M))
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    hidden = options.get('echo') == 'false'
    cell.metadata['transient'] = dict(remove_source=hidden) # as nbconvert's own tags do it
    if options.get('output') == 'false': cell.outputs = []
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    cell.metadata['alt'] = options.get('fig-alt') or options.get('fig-cap') or ''


def links(text: str) -> str:
    "Links and pictures beside the notebook, as seen from the folder above."
    pattern = r'(\]\()(?!docs/)((?:\w[\w-]*/)*[\w-]+\.(?:ipynb|png|svg|jpg|gif)(?:#[\w.-]+)?\))'
    return re.sub(pattern, r'\1nbs/\2', text)


def tidy(text: str) -> str:
    "No trailing blanks, no runs of empty lines, one line end at the end."
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip() + '\n'


def stale(root: Path) -> list[str]:
    "What README.md's step would change: paths."
    text, pictures = render(root)
    wanted = {'README.md': text.encode(), **pictures}
    differing = [p for p, data in wanted.items() if not (root/p).is_file() or (root/p).read_bytes() != data]
    return differing + [str(p.relative_to(root)) for p in old_pictures(root, pictures)]


def old_pictures(root: Path, pictures: dict[str, bytes]) -> list[Path]:
    "Pictures that an earlier run left and no output shows any longer."
    return sorted(p for p in (root/IMAGES).glob('index_*') if p.relative_to(root).as_posix() not in pictures)


def update(root: Path) -> list[str]:
    "Write what is out of step; says which files those were."
    changed = stale(root)
    text, pictures = render(root)
    for p in old_pictures(root, pictures): p.unlink()
    for path, data in {'README.md': text.encode(), **pictures}.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        if path in changed: (root/path).write_bytes(data)
    return changed


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail if README.md is stale')
    args = parser.parse_args()
    found = stale(ROOT) if args.check else update(ROOT)
    if found: print('out of step:' if args.check else 'written:', *found)
    sys.exit(bool(args.check and found))
