"""The stored results: rows of `results/NAME.jsonl`, and what is said of several runs at once."""
from __future__ import annotations
import argparse, json, statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent/'results'
Row = Mapping[str, Any]         # one run, or one line of a table, as a benchmark stored it


def read(path: Path) -> list[dict[str, Any]]:
    "Rows of a file of JSON lines; none where there is no file."
    if not path.exists(): return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def results(name: str) -> list[dict[str, Any]]:
    "All rows that the benchmark `name` stored."
    return read(FOLDER/f'{name}.jsonl')


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    "The rows that have these values, such as `network='simcnn:0.375'`."
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def each(rows: Sequence[Row], key: str) -> list[Any]:
    "The different values of a column, in the order in which they come."
    return list(dict.fromkeys(r[key] for r in rows))


def values(rows: Sequence[Row], figure: str, less: str = '') -> list[float]:
    "A figure of each run that has it, in percent; of two names, the first less the second."
    found = [r for r in rows if figure in r]
    if less: return [100 * (r[figure] - r[less]) for r in found]
    return [100 * r[figure] for r in found]


def mean(rows: Sequence[Row], figure: str, less: str = '') -> str:
    "Mean over the runs, in percent: `95.0`; `-` where no run has it."
    found = values(rows, figure, less)
    return f'{statistics.mean(found):.1f}' if found else '-'


def spread(rows: Sequence[Row], figure: str, less: str = '') -> str:
    "Standard deviation over the runs, in points; `-` for fewer than two."
    found = values(rows, figure, less)
    return f'{statistics.stdev(found):.1f}' if len(found) > 1 else '-'


def figure(rows: Sequence[Row], name: str) -> str:
    "Mean and spread together: `95.0 ± 0.3`; the mean alone for a single run."
    if len(values(rows, name)) < 2: return mean(rows, name)
    return f'{mean(rows, name)} ± {spread(rows, name)}'


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    "A table in Markdown."
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return '\n'.join([*lines, *('| ' + ' | '.join(cells) + ' |' for cells in rows)])


def run_or_table(
    doc: str, # of the script
    presets: Iterable[str], # names
    path: Path, # where results are kept
    run: Callable[[argparse.Namespace], None], # makes rows and keeps them
    table: Callable[[Path], str], # shows all that are kept
    more: Callable[[argparse.ArgumentParser], None], # adds the options that this script alone has
) -> None:
    "The commands `run` and `table` of a benchmark that is run for hours."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='command', required=True)
    r, t = sub.add_parser('run'), sub.add_parser('table')
    r.add_argument('--data', required=True, help='a folder of images, or the name of a data set')
    r.add_argument('--root', default='data', help='decoded images are kept here')
    r.add_argument('--preset', default='cpu', choices=presets)
    r.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    r.add_argument('--device', default=None)
    r.add_argument('--threads', type=int, default=0)
    more(r)
    for q in (r, t): q.add_argument('--results', type=Path, default=path, help='where results are kept')
    a = p.parse_args()
    if a.command == 'run': run(a)
    else: print(table(a.results))
