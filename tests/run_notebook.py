"""Run one notebook as nbdev tests it, and compare what its cells say with the outputs stored in it.

    python tests/run_notebook.py nbs/01_core/02_checks.ipynb

Outputs are compared as text: what is printed, and the text of displayed objects. Paths, times, addresses and
versions are set aside. All other words must be the same everywhere. Numbers must be the same in the parts of
the book where nothing is trained; elsewhere they depend on the machine, since training amplifies rounding. A
cell that shows timings or the like says so with `#| varies`: it is not compared at all.
"""
from __future__ import annotations
import os, re, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXACT = {'01_core', '02_data', '03_networks', '04_channels', '05_methods'} # parts whose numbers are compared
NUMBER = re.compile(r'(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?')
SET_ASIDE = [ # pattern, what stands for it
    (r'(?:/tmp|/var/folders|/private)/[\w./-]+', 'PATH'),
    (r'0x[0-9a-f]+', 'ADDRESS'),
    (r'\b\d+\.\d+[\w.]*\+[\w.]+', 'VERSION'),
    (r'\b(?:x86_64|aarch64|arm64|AMD64)\b', 'MACHINE'),
    (r'\b(?:Linux|Darwin|Windows)\b', 'SYSTEM'),
    (r'\d[\d.,]*\s*(?:ns|µs|us|ms|s|seconds?|minutes?)\b', 'TIME'),
    (r'\d[\d.,]*\s*(?:GB|MB|GiB|MiB)\b', 'MEMORY'),
    (r'[-=:|\s]+(?=\||$)|(?<=\|)[-=:\s]+|-{3,}', ' '), # the lines and widths of tables
]


def said(outputs: list[dict]) -> str:
    "What a cell's outputs say, as text, without pictures and progress bars."
    texts = []
    for out in outputs:
        if out.get('name') == 'stderr': continue
        data = out.get('data', {})
        text = out.get('text') or data.get('text/markdown') or data.get('text/plain') or ''
        texts.append(''.join(text))
    return '\n'.join(texts)


def words(text: str) -> str:
    "The text without what changes from run to run, on one line."
    for pattern, name in SET_ASIDE: text = re.sub(pattern, name, text, flags=re.M)
    return re.sub(r'\s+', ' ', text).strip()


def close(a: str, b: str) -> bool:
    "Are two numbers the same, but for rounding?"
    x, y = (float(n.replace(',', '')) for n in (a, b))
    digits = min(len(n.partition('.')[2].partition('e')[0]) for n in (a, b))
    return abs(x - y) <= 2 * 10.0**-digits * ('.' in a) + 0.01 * max(abs(x), abs(y))


def differs(
    stored: str, # text of the outputs in the notebook
    now: str, # text of the outputs of this run
    exact: bool, # compare numbers as well
) -> bool:
    "Is the stored output stale?"
    old, new = words(stored), words(now)
    if NUMBER.sub('#', old) != NUMBER.sub('#', new): return True
    return exact and not all(map(close, NUMBER.findall(old), NUMBER.findall(new)))


def main(path: Path) -> int:
    from execnb.shell import CaptureShell
    from nbdev.test import nbdev_test
    import torch
    exact, stale = path.parent.name in EXACT, []
    run: Callable[..., Any] = CaptureShell.cell

    def run_and_compare(self: CaptureShell, cell: Any, *args: Any, **kwargs: Any) -> None:
        stored = said(cell.get('outputs', []))
        cell.outputs = []
        run(self, cell, *args, **kwargs)
        if cell.cell_type != 'code' or 'varies' in cell.directives_: return
        now = said(cell.outputs)
        if not differs(stored, now, exact): return
        stale.append(f'{cell.source.strip()}\n--- stored\n{stored}\n--- now\n{now}\n')

    CaptureShell.cell = run_and_compare
    nbdev_test.__wrapped__(path=str(path), n_workers=0)
    if not stale or torch.cuda.is_available(): return 0 # outputs are stored from a CPU
    print(f'{len(stale)} cells have stale outputs; run the notebook and save it\n', *stale, sep='\n')
    return 1


def say_into(name: str, path: Path) -> None:
    "`main` in a process of its own that says everything into a file, whatever it starts."
    with open(name, 'w') as said:
        for stream in (1, 2): os.dup2(said.fileno(), stream)
    os.chdir(ROOT)
    status = main(path)
    sys.stdout.flush()
    sys.exit(status)


if __name__ == '__main__': sys.exit(main(Path(sys.argv[1]).resolve()))
