"""After editing notebooks: export the package, clean the notebooks, write README.md.

A second run changes nothing.
"""
from __future__ import annotations
import os, re, shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HAND_WRITTEN = {'__init__.py', '_modidx.py'} # in the package, but made by no notebook's `default_exp`


def exports(root: Path) -> set[str]:
    "The modules that notebooks name with `#| default_exp`, as files of the package."
    found = [p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    texts = [p.read_text(encoding='utf-8') for p in found]
    names = [m for t in texts for m in re.findall(r'"#\|\s*default_exp\s+([\w.]+)', t)]
    return {n.replace('.', '/') + '.py' for n in names}


def orphans(root: Path, package: str = 'mwt') -> list[Path]:
    "Modules left behind by a notebook that was renamed or removed, and sub-packages without a module."
    made = exports(root)
    packages = {parent.as_posix() for name in made for parent in Path(name).parents}
    known = made | HAND_WRITTEN | {f'{package}/__init__.py' for package in packages}
    found = [p for p in (root/package).rglob('*.py') if '__pycache__' not in p.parts]
    return sorted(p for p in found if p.relative_to(root/package).as_posix() not in known)


def prepare(root: Path) -> None:
    "Bring everything that is made from the notebooks in step with them."
    os.environ.pop('IN_TEST', None) # nbdev exports nothing, and says nothing, where it is set
    os.chdir(root)
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export
    from readme import update
    for p in orphans(root):
        print(f'deleted {p.relative_to(root)}: no notebook exports it')
        p.unlink()
        if not [*p.parent.glob('*.py')]: shutil.rmtree(p.parent) # a part of the package without any chapter
    nbdev_export.__wrapped__()
    nbdev_clean.__wrapped__()
    changed = update(root)
    if changed: print('written:', *changed)


if __name__ == '__main__':
    prepare(ROOT)
