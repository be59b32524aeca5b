"The benchmark scripts run; their figures are not judged here."
import json, subprocess, sys
from pathlib import Path
import pytest
from helpers import unpack_sample

ROOT = Path(__file__).resolve().parent.parent


def call(name, *words):
    "Run a script of `benchmarks/`; what it printed. A failure shows the script's own message."
    script = [sys.executable, str(ROOT/'benchmarks'/f'{name}.py'), *map(str, words)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Several commands of a script in one process: to start one takes seconds.
SEVERAL = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])
for words in json.loads(sys.argv[3]):
    sys.argv[1:] = words
    script.main()
"""


def call_all(name, *commands):
    "Call a script's `main` for each of the commands; what they printed."
    words = json.dumps([[str(w) for w in command] for command in commands])
    script = [sys.executable, '-c', SEVERAL, str(ROOT/'benchmarks'), name, words]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('methods', [
    ['plain,amp=0', 'composable,amp=0,full_fraction=0.5,weight_decay=0'],
    pytest.param(['plain', 'composable', 'composable,dense=0', 'mwt'], marks=pytest.mark.slow)],
    ids=['float32', 'methods'])
def test_quality(methods, tmp_path):
    images, results = unpack_sample(tmp_path), tmp_path/'quality.jsonl'
    run = ['run', '--data', images, '--root', tmp_path, '--preset', 'quick',
           '--networks', 'simcnn:0.05', '--seeds', '0', '--fives', '1',
           '--methods', *methods, '--device', 'cpu', '--results', results]
    call('quality', *run)
    said = call_all('quality', run, ['table', '--results', results])   # now there is nothing left to run
    plain, *modular = [json.loads(line) for line in results.read_text().splitlines()]
    assert [plain['method'], *(r['method'] for r in modular)] == methods
    assert [r['weight_decay'] for r in modular] == [0 if 'weight_decay=0' in m else 5e-4 for m in methods[1:]]
    assert all(r['accuracy_10'] == r['full'] for r in modular if 'dense=0' in r['method'])
    assert all(r['latency_2_1'] > 0 and r['cpu_seconds'] > 0 for r in modular)
    assert all(0 < r['params_2'] < r['params_5'] < r['params_10'] < 1 for r in modular)
    table = said[said.index('|'):]
    assert table.count('\n') == len(methods) + 2 + 9
    assert said.count('| 0 | not run |') == 9, 'rows for a GPU stay until they are run'
    assert '| simcnn:0.05 | 1 | 128 | composable' in said and '| 1.00 |' in said, 'plain over plain'


@pytest.mark.slow
def test_quality_goes_on_from_a_trained_network(tmp_path):
    results = tmp_path/'quality.jsonl'
    words = [f'{method},trained=2,epochs=1,amp=0' for method in ('composable', 'plain')]
    call('quality', 'run', '--data', 'digits', '--root', tmp_path, '--preset', 'quick',
         '--networks', 'simcnn:0.05', '--seeds', '0', '--fives', '1', '--methods', *words,
         '--device', 'cpu', '--results', results)
    modular, plain = [json.loads(line) for line in results.read_text().splitlines()]
    assert [modular['method'], plain['method']] == words and modular['epochs'] == 1
    assert len(list((tmp_path/'trained').iterdir())) == 1, 'both start from one network'


@pytest.mark.slow
def test_rivals(tmp_path):
    results = tmp_path/'rivals.jsonl'
    methods = ['full', 'narrow,rounds=2', 'ocap', 'random', 'thin', 'gradsplitter']
    run = ['run', '--data', 'digits', '--root', tmp_path, '--preset', 'quick', '--pairs', '1', '--fives', '1',
           '--seeds', '0', '--device', 'cpu', '--results', results, '--methods', *methods]
    for _ in range(2): call('rivals', *run)                    # the second time there is nothing left to do
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r['method'] for r in rows] == [m for m in methods for _ in range(2)]
    assert all({'accuracy', 'renormed', 'tuned', 'latency_1', 'layers'} <= r.keys() for r in rows)
    flops = {r['method']: r['flops'] for r in rows if r['n'] == 2}
    assert flops['full'] > .9
    assert all(abs(flops['thin'] - flops[m]) < .1 for m in ('narrow,rounds=2', 'random'))
    said = call('rivals', 'table', '--results', results)
    assert said.count('\n') == 2 + 2 * len(methods) and '| narrow, rounds=2 |' in said


@pytest.mark.slow
def test_compose(tmp_path):
    "Modules in twos and in ones, of models that know all classes and of such that know two."
    results = tmp_path/'compose.jsonl'
    run = ['run', '--data', 'digits', '--root', tmp_path, '--preset', 'quick', '--networks', 'simcnn:0.05',
           'rescnn:0.05', '--seeds', '0', '--device', 'cpu', '--results', results]
    said = call_all('compose', run, run, ['table', '--results', results])   # the second time nothing is left
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r['models'], r['modules']) for r in rows] == [
        (models, kind) for models in ('all,reject', 'own') for kind in ('twos', 'ones')]
    assert all(0 <= r[k] <= 1 for r in rows for k in ('before', 'calibrated', 'auroc', 'own'))
    assert all(r['params'] > 0 and r['flops'] > 0 and r['latency'] > 0 for r in rows)
    assert [{'best', 'rejection'} <= r.keys() for r in rows] == [True, True, False, False]
    assert said[said.index('|'):].count('\n') == 2 + len(rows)


@pytest.mark.slow
def test_replace(tmp_path):
    "Five classes, two states of the weak model, five ways to help it; one of them adds no module."
    images, results = unpack_sample(tmp_path), tmp_path/'replace.jsonl'
    run = ['run', '--data', images, '--root', tmp_path, '--preset', 'quick', '--networks', 'simcnn:0.05',
           '--seeds', '0', '--device', 'cpu', '--results', results]
    said = call_all('replace', run, run, ['table', '--results', results])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == 5 * 2 * 5 and len({(r['state'], r['target'], r['way']) for r in rows}) == len(rows)
    assert all(0 <= r['weak_target'] + r['change_target'] <= 1 for r in rows)
    assert all(0 <= r['weak_others'] + r['change_others'] <= 1 for r in rows)
    assert {r['added'] for r in rows if r['way'] == 'control'} == {42}, 'a square layer for six classes'
    assert min(r['added'] for r in rows if r['way'] != 'control') > 42
    assert said[said.index('|'):].count('\n') == 2 + 2 * 5


def lines_of(name, rows, tmp_path):
    "The lines of a benchmark's table of some rows, as lists of cells."
    results = tmp_path/f'{name}.jsonl'
    results.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    said = call(name, 'table', '--results', results)
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in said.splitlines()]


def test_table_of_compose(tmp_path):
    "Seeds share a line, with mean and spread; what was not measured is a dash."
    row = dict(data='c10', networks=['a:1', 'b:1'], epochs=9, models='own', modules='twos', before=.5, own=.9,
               auroc=.75, params=.1, flops=.2, latency=1.5)
    rows = [row | dict(seed=seed, calibrated=value) for seed, value in enumerate((.6, .8))]
    head, _, *lines = lines_of('compose', [*rows, rows[0] | dict(modules='ones', best=.95)], tmp_path)
    found = [dict(zip(head, line)) for line in lines]
    about = [(r['modules'], r['seeds'], r['calibrated']) for r in found]
    assert about == [('twos', '2', '70.0 ± 14.1'), ('ones', '1', '60.0')]
    assert [(r['best single model'], r['by rejection']) for r in found] == [('-', '-'), ('95.0', '-')]
    assert found[0]['latency'] == '150.0 ± 0.0' and found[0]['networks'] == 'a:1 b:1'


def test_table_of_replace(tmp_path):
    "Targets and seeds share a line; changes are in points, parameters and seconds are as they are."
    row = dict(data='c10', network='a:1', epochs=9, state='over-fitted', way='ours', weak_target=.3,
               weak_others=.6, change_others=-.01, added=1234, seconds=.5)
    rows = [row | dict(target=name, change_target=change) for name, change in (('cat', .1), ('dog', .2))]
    head, _, *lines = lines_of('replace', [*rows, rows[0] | dict(way='control')], tmp_path)
    assert len(head) == len(lines[0]) and [line[4:6] for line in lines] == [['ours', '2'], ['control', '1']]
    assert lines[0][6:] == ['30.0 ± 0.0', '15.0 ± 7.1', '60.0 ± 0.0', '-1.0 ± 0.0', '1,234', '0.50']


SPEED = ['losses', *(pytest.param(name, marks=pytest.mark.slow) for name in (
    'decompose', 'scaling', 'step', 'latency', 'convert', 'loading', 'end_to_end', 'families'))]


@pytest.mark.parametrize('name', SPEED)
def test_speed(name, tmp_path):
    "The short form writes rows that name the machine; those of another kind of device stay."
    results = tmp_path/'rows.jsonl'
    results.write_text('{"kind": "cuda"}\n{"kind": "cpu"}\n')
    data = []
    if name in ('loading', 'end_to_end'): data = ['--data', unpack_sample(tmp_path), '--root', tmp_path]
    call(name, '--quick', '--device', 'cpu', '--threads', '1', '--results', results, *data)
    other, *rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert other == dict(kind='cuda') and rows
    assert all(r['kind'] == 'cpu' and r['quick'] and r['torch'] for r in rows)


@pytest.mark.slow
def test_layerwise(tmp_path):
    "Each part writes rows, one whose package is missing is left out; a second run adds nothing."
    images, results = unpack_sample(tmp_path), tmp_path/'layerwise.jsonl'
    run = ['run', '--data', images, '--root', tmp_path, '--preset', 'quick', '--depth', '8', '--width', '.25',
           '--epochs', '1', '--retrain', '1', '--seeds', '0', '--device', 'cpu', '--results', results]
    said = call('layerwise', *run)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    parts = {r['part'] for r in rows}
    assert 'damage' in parts and ('shorten' in parts or 'no better than guessing' in said)
    assert all(f'{part} is left out' in said for part in {'pgd', 'fgsm', 'compress'} - parts)
    assert all(0 < r['weights'] <= 1 and 0 < r['neurons'] <= 1 for r in rows if r['part'] == 'damage')
    again = call('layerwise', *run, '--parts', 'damage')
    assert not again and len(results.read_text().splitlines()) == len(rows)
    assert '**damage**' in call('layerwise', 'table', '--results', results)
