"""One classifier made of modules of several models that never met.

    python benchmarks/compose.py run --data FOLDER                  # CPU
    python benchmarks/compose.py run --data FOLDER --preset quick   # a minute, to see that it works
    python benchmarks/compose.py table                              # all results as Markdown

Five models, of two architectures and three seeds, give a module of two classes each (`twos`), or two
modules of one class (`ones`). `all` models were trained on all ten classes, with and without `reject`; `own`
ones only on their two classes, so they never saw any other. The modules are composed as they are, by
rejection where they have it, and calibrated on a hundred validation images a class. Beside it the best single
model, chosen on validation images.

Every set of five models adds its lines to results/compose.jsonl; those that are there already are skipped.
Networks are trained once and kept in the folder --trained, which may be that of quality.py.
"""
from __future__ import annotations
import argparse, copy, json, statistics, sys
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from torch import nn
from mwt.core.timing import time_in_turns
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.measure import count_flops, count_params, evaluate, rejection
from mwt.methods.modular import ModularModel, plain
from mwt.modules.compose import compose
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import SlimModule
from mwt.runs.report import environment
from quality import settings_of
from results import FOLDER, figure, markdown, read, run_or_table
from trained import trained_network

RESULTS = FOLDER/'compose.jsonl'
PRESETS: dict[str, dict[str, Any]] = {
    'cpu': dict(networks=['simcnn:0.375', 'resnet18:0.25'], models=['all', 'all,reject', 'own'],
                epochs=10, batch=64),
    'quick': dict(networks=['simcnn:0.1', 'resnet18:0.1'], models=['all,reject', 'own'], epochs=1, batch=128)}
MODELS = 'all', 'all,reject', 'own'


def trained(a: argparse.Namespace, data: ImageData, number: int, models: str, seed: int) -> ModularModel:
    "One of the five models."
    seeds, which = divmod(number, len(a.networks))
    called = 'composable,reject=1' if models.endswith('reject') else 'composable'
    masks, recipe = settings_of(called)
    if models == 'own': called += f" of {' '.join(data.classes)}"
    model, _ = trained_network(a.trained, a.networks[which], called, masks, recipe, a.epochs,
                               10 * seed + seeds, data, a.show_progress)
    return model


def without_rejection(module: SlimModule) -> SlimModule:
    "The same module, of which nobody knows that it rejects."
    other = copy.deepcopy(module)
    other.description.pop('reject', None)
    return other


def judge(modules: list[SlimModule], data: ImageData, like: nn.Module) -> dict[str, float]:
    "What modules are worth together."
    bare = [without_rejection(m) for m in modules]
    made = dict(before=compose(bare, share=False),
                calibrated=compose(bare, calibrate=data.valid, share=False))
    if any('reject' in m.description for m in modules):
        made['rejection'] = compose(modules, share=False)
    found = {name: evaluate(m, data.test) for name, m in made.items()}
    image = torch.rand(1, *data.shape, device=data.device)
    calls = dict(full=partial(like, image), made=partial(made['calibrated'], image))
    with torch.no_grad(): times = time_in_turns(calls, data.device, 20)
    return found | dict(
        params=count_params(made['calibrated']) / count_params(like),
        flops=count_flops(made['calibrated'], image) / count_flops(like, image),
        latency=times['made']['ratio'],
        own=statistics.mean(evaluate(m, data.test) for m in modules),
        auroc=statistics.mean(rejection(m, data.test) for m in modules))


def one_run(a: argparse.Namespace, data: ImageData, models: str, seed: int) -> list[dict[str, Any]]:
    "Five models; their modules in twos and in ones."
    pairs = [data.classes[2 * n:2 * n + 2] for n in range(5)]
    twos, ones, best = [], [], (0., 0.)
    for number, pair in enumerate(pairs):
        own = data.subset(pair) if models == 'own' else data
        model = trained(a, own, number, models, seed)
        parts = decompose(model, own.train, show_progress=False)
        twos.append(extract(model, parts, pair))
        ones += [extract(model, parts, [c]) for c in pair]
        if number == 0: like = plain(model).eval()
        if models != 'own': best = max(best, (evaluate(model, data.valid), evaluate(model, data.test)))
    rows = [dict(modules=kind) | judge(m, data, like) for kind, m in (('twos', twos), ('ones', ones))]
    return [r | dict(best=best[1]) if models != 'own' else r for r in rows]


def run(a: argparse.Namespace) -> None:
    for k, v in PRESETS[a.preset].items():
        if getattr(a, k) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    data = image_data(a.data, root=a.root, batch_size=a.batch, device=a.device)
    if data.n_classes != 10: raise SystemExit(f'the data has {data.n_classes} classes; ten are needed')
    a.trained = a.trained or Path(a.root)/'trained'
    for seed in a.seeds:
        for models in a.models:
            key = dict(networks=list(a.networks), models=models, seed=seed, epochs=a.epochs,
                       data=Path(a.data).name)
            if any(all(r.get(k) == v for k, v in key.items()) for r in read(a.results)): continue
            rows = one_run(a, data, models, seed)
            about = dict(threads=torch.get_num_threads(), **environment(data.device))
            with a.results.open('a') as f: f.writelines(json.dumps(key | r | about) + '\n' for r in rows)
            print(key, rows, flush=True)


COLUMNS = {'best single model': 'best', 'modules on their own classes': 'own',
           'composed as they are': 'before', 'calibrated': 'calibrated',
           'by rejection': 'rejection', 'AUROC': 'auroc',
           'parameters': 'params', 'FLOPs': 'flops', 'latency': 'latency'}


def table(path: Path) -> str:
    "Mean and spread over seeds, in percent; costs over one full model of the first architecture."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in read(path):
        about = r['data'], ' '.join(r['networks']), r['epochs'], r['models'], r['modules']
        groups.setdefault(about, []).append(r)
    head = ['data', 'networks', 'epochs', 'models', 'modules', 'seeds', *COLUMNS]
    lines = []
    for about, rows in groups.items():
        cells = [*map(str, about), str(len(rows)), *(figure(rows, k) for k in COLUMNS.values())]
        lines.append(cells)
    return markdown(head, lines)


def options(r: argparse.ArgumentParser) -> None:
    "What this benchmark alone can be told."
    r.add_argument('--trained', type=Path, help='trained networks are kept here (default: ROOT/trained)')
    r.add_argument('--networks', nargs='+', help='NAME:WIDTH ..., taken in turns')
    r.add_argument('--models', nargs='+', choices=MODELS, help='what the models were trained on')
    for name in ('epochs', 'batch'): r.add_argument(f'--{name}', type=int)
    r.add_argument('--show-progress', action='store_true', help='progress bars')


def main() -> None: run_or_table(__doc__, PRESETS, RESULTS, run, table, options)


if __name__ == '__main__': main()
