"""What the speed benchmarks share: times taken side by side, rows kept as lines of JSON, tables.

Figures are medians over rounds, after rounds that warm up. In every round each candidate runs once, in turn, so that a
machine whose speed drifts slows all of them alike; ratios are medians of the ratios of one round.
"""
from __future__ import annotations
import argparse, json, statistics, sys, time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from mwt.core.display import Table
from mwt.core.checks import resolve_device
from mwt.core.files import atomic_write
from mwt.runs.report import environment


def wait(device: torch.device) -> None:
    "Until the device has done what it was given."
    if device.type == 'cuda': torch.cuda.synchronize(device)


def side_by_side(
    candidates: Mapping[str, Callable[[], Any]], # name -> what is timed; the first is what others are held against
    device: torch.device, # where they work
    rounds: int = 15, # that count
    warmup: int = 3, # that do not
) -> dict[str, dict[str, float]]: # name -> seconds (median), low and high (quartiles), ratio (median over rounds, to the first)
    "Time several things in turns."
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup + rounds):
        for name, work in candidates.items():
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))[warmup:]
    return {name: summary(all_[warmup:], first) for name, all_ in times.items()}


def summary(times: Sequence[float], first: Sequence[float]) -> dict[str, float]:
    "Median and quartiles, and the median of the ratios of each round."
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * [times[0]]
    return dict(seconds=middle, low=low, high=high, ratio=statistics.median(t / f for t, f in zip(times, first)))


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    "The options of every speed benchmark: --device, --threads, --quick, --results."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default=None, help='left out: CUDA where there is one')
    p.add_argument('--threads', type=int, default=0, help='of PyTorch on the CPU; 0: its own choice')
    p.add_argument('--quick', action='store_true', help='a short form, to see that it works; keeps nothing unless --results is given')
    p.add_argument('--results', type=Path, help='a file of JSON lines; left out: results/NAME.jsonl, or nothing with --quick')
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    "Read the options and set PyTorch up: threads, cuDNN's autotuning."
    a = p.parse_args(argv)
    a.device = resolve_device(a.device)
    if a.threads: torch.set_num_threads(a.threads)
    torch.backends.cudnn.benchmark = True
    return a


def keep(name: str, rows: Sequence[Mapping[str, Any]], a: argparse.Namespace) -> None:
    "Print rows as a table and keep them with the machine's facts; earlier rows of the same kind of device make room."
    print(Table([{k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows]), flush=True)
    path = a.results or (None if a.quick else HERE/'results'/f'{name}.jsonl')
    if path is None: return
    about = dict(kind=a.device.type, quick=a.quick, **environment(a.device))
    others = [r for r in read(path) if r['kind'] != a.device.type]
    lines = [json.dumps(r) for r in [*others, *(dict(row) | about for row in rows)]]
    atomic_write(path, lambda p: p.write_text('\n'.join(lines) + '\n', encoding='utf-8'))


def read(path: Path) -> list[dict[str, Any]]:
    "Rows that were kept; none where there is no file."
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
