"The stored results of the benchmarks, for pages and tables."
from __future__ import annotations
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent/'results'


def results(
    name: str, # of a benchmark, such as `quality`
) -> list[dict[str, Any]]: # a row for each run or figure; none where nothing is stored
    "The rows that a benchmark stored."
    path = RESULTS/f'{name}.jsonl'
    if not path.exists(): return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
