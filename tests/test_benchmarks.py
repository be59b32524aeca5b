"The benchmark scripts run; their figures are not judged here."
import json, subprocess, sys
from pathlib import Path
from helpers import unpack_sample

ROOT = Path(__file__).resolve().parent.parent


def test_quality(tmp_path):
    images, results = unpack_sample(tmp_path), tmp_path/'quality.jsonl'
    words = [sys.executable, str(ROOT/'benchmarks'/'quality.py')]
    methods = ['plain', 'composable', 'uniform', 'distilled', 'both', 'composable,full=0.5,weight_decay=0']
    run = [*words, 'run', '--data', str(images), '--root', str(tmp_path), '--preset', 'quick', '--networks', 'simcnn:0.05', '--seeds', '0', '--fives', '1',
           '--methods', *methods, '--device', 'cpu', '--results', str(results)]
    for _ in range(2): subprocess.run(run, check=True, capture_output=True, timeout=300)           # the second time there is nothing left to do
    plain, *modular = [json.loads(line) for line in results.read_text().splitlines()]
    assert [plain['method'], *(r['method'] for r in modular)] == methods and [r['weight_decay'] for r in modular] == 4 * [5e-4] + [0]
    assert all(r['accuracy_10'] == r['full'] and 0 < r['params_2'] < r['params_5'] < r['params_10'] < 1 for r in modular)
    said = subprocess.run([*words, 'table', '--results', str(results)], check=True, capture_output=True, text=True).stdout
    assert said.count('\n') == 8 and '| simcnn:0.05 | 1 | 128 | composable | 1 |' in said
