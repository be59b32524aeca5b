"""What the speed benchmarks share: their options, rows kept as lines of JSON, tables.

Times are taken by `mwt.core.timing.time_in_turns`: medians over rounds in which each candidate runs
once, after rounds that warm up.
"""
from __future__ import annotations
import argparse, json, sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from results import read
from mwt.core.display import Table
from mwt.core.checks import resolve_device
from mwt.core.files import atomic_write
from mwt.runs.report import environment


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    "The options of every speed benchmark: --device, --threads, --quick, --results."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default=None, help='left out: CUDA where there is one')
    p.add_argument('--threads', type=int, default=0, help='of PyTorch on the CPU; 0: its own choice')
    p.add_argument('--quick', action='store_true',
                   help='a short form, to see that it works; keeps nothing unless --results is '
                        'given')
    p.add_argument('--results', type=Path,
                   help='a file of JSON lines; left out: results/NAME.jsonl, or nothing with '
                        '--quick')
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    "Read the options and set PyTorch up: threads, cuDNN's autotuning."
    a = p.parse_args(argv)
    a.device = resolve_device(a.device)
    if a.threads: torch.set_num_threads(a.threads)
    torch.backends.cudnn.benchmark = True
    return a


def keep(name: str, rows: Sequence[Mapping[str, Any]], a: argparse.Namespace) -> None:
    "Print rows and keep them with the machine's facts; earlier ones of its kind of device make room."
    shown = [{k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(Table(shown), flush=True)
    path = a.results or (None if a.quick else HERE/'results'/f'{name}.jsonl')
    if path is None: return
    about = dict(kind=a.device.type, quick=a.quick, **environment(a.device))
    others = [r for r in read(path) if r['kind'] != a.device.type]
    lines = [json.dumps(r) for r in [*others, *(dict(row) | about for row in rows)]]
    atomic_write(path, lambda p: p.write_text('\n'.join(lines) + '\n', encoding='utf-8'))
