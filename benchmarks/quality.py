"""How good are modules as they are cut?

Train, decompose, extract and judge, for several networks, methods and seeds.

    python benchmarks/quality.py run --data FOLDER                  # on a CPU: 80 minutes, two cores
    python benchmarks/quality.py run --data FOLDER --preset quick   # a minute, to see that it works
    python benchmarks/quality.py run --data FOLDER --preset gpu     # full width, 200 epochs; CUDA
    python benchmarks/quality.py run --data FOLDER --preset ablation
    python benchmarks/quality.py run --data FOLDER --preset trained # go on from a plain network
    python benchmarks/quality.py table                              # all results as Markdown

The table gives mean and spread over seeds.

Every run adds one line to results/quality.jsonl; runs that are there already are skipped, so a
stopped benchmark is resumed by the same command, and several may work side by side (--seeds 0,
--seeds 1, ...).
"""
from __future__ import annotations
import argparse, itertools, json, math, random, statistics, sys, time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from torch import Tensor
from mwt.core.nets import evaluating
from mwt.core.timing import time_in_turns
from mwt.methods.modular import ModularModel, plain
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.modules.parts import Parts
from mwt.modules.decompose import decompose
from mwt.modules.module import as_module
from mwt.modules.extract import extract
from mwt.modules.speed import fold_norms
from mwt.methods.base import METHODS, Method, make_method
from mwt.measure import count_flops, count_params, evaluate, rejection
from mwt.modules.modularity import jaccard_coupling
from mwt.runs.report import environment
from mwt.train.history import TrainConfig
from results import FOLDER, figure, markdown, read, run_or_table
from trained import modular_network, trained_network

RESULTS = FOLDER/'quality.jsonl'
RECIPE = dict(lr=0.05, weight_decay=5e-4, warmup=0.15, amp=True)
NETWORKS = ['simcnn:0.375', 'resnet18:0.25']
BOTH = ['plain', 'composable']
PRESETS: dict[str, dict[str, Any]] = {
    'cpu': dict(networks=NETWORKS, methods=[*BOTH, 'plain,epochs=15'], epochs=10),    # as long as composable
    'quick': dict(networks=['simcnn:0.1'], methods=BOTH, epochs=1, batch=128, pairs=5, fives=2),
    'mwt': dict(networks=NETWORKS, methods=['mwt'], epochs=10),
    'kernels': dict(networks=NETWORKS, epochs=10,
                    methods=['composable,dense=0', 'composable,target_krr=0.27']),
    'width': dict(networks=[f'{name}:{width}' for width in (.25, .5, 1) for name in ('simcnn', 'resnet18')],
                  methods=BOTH, epochs=10, size=16),
    'deep': dict(networks=['resnet_cifar:1', 'mobilenet:0.5'], methods=BOTH, epochs=10),
    'length': dict(networks=['simcnn:0.125'], epochs=10, methods=[
        f'{method},epochs={n}' for n in (5, 10, 20, 40) for method in BOTH]),
    'sizes': dict(networks=['simcnn:0.125'], epochs=5, methods=[
        'plain', 'composable', *(f'composable,target_flops={share}' for share in (.05, .1, .25, .5)),
        *(f'composable,target_params={share}' for share in (.02, .05, .15)),
        *(f'composable,target_latency={share}' for share in (.75, .85))]),
    'ablation': dict(networks=['simcnn:0.125'], epochs=5, methods=[
        'plain', 'composable', 'composable,dense=0',
        'composable,set_fraction=0.25', 'composable,set_fraction=1',
        'composable,distill=0', 'composable,distill=0.5', 'composable,distill=1',
        'composable,separation=0', 'composable,separation=3', 'composable,closed_by=0.2',
        'composable,target_by=0.5', 'composable,full_fraction=0', 'composable,target_krr=0.27']),
    'trained': dict(networks=NETWORKS, epochs=10, methods=[
        'plain', *(f'composable,trained=10,epochs={n},lr=0.02' for n in (1, 2, 3)), 'composable']),
    'gpu': dict(networks=['resnet18:1', 'vgg16_bn:1', 'mobilenet:1'],
                methods=['plain', 'composable', 'mwt'], epochs=200, batch=512)}
USUAL: dict[str, Any] = dict(batch=64, pairs=45, fives=20, size=None)


def words_of(method: str) -> tuple[str, dict[str, Any]]:
    "The name of a method, and the numbers that follow it."
    name, *changes = method.split(',')
    if name != 'plain' and name not in METHODS:
        raise SystemExit(f"unknown method {name!r}; known: plain, {', '.join(METHODS)}")
    return name, {k: float(v) for k, v in (c.split('=') for c in changes)}


def epochs_of(method: str, usual: int) -> tuple[int, int]: # of a plain network before; of the method
    "For how long is trained: `composable,trained=10,epochs=3` goes on from a plain network of ten epochs."
    _, given = words_of(method)
    return int(given.get('trained', 0)), int(given.get('epochs', usual))


def settings_of(method: str) -> tuple[Method | None, dict[str, Any]]: # `None` for a plain network
    "A method and the recipe, from words like `mwt`, `composable,full_fraction=0.5,weight_decay=0`."
    name, given = words_of(method)
    for word in ('trained', 'epochs'): given.pop(word, None)        # `epochs_of` knows them
    for switch in ('amp', 'dense', 'two_roles', 'reject'):
        if switch in given: given[switch] = bool(given[switch])
    recipe = {f.name: given.pop(f.name) for f in fields(TrainConfig) if f.name in given}
    return (None if name == 'plain' else make_method(name, **given)), RECIPE | recipe


@torch.no_grad()
def logits_of(model: torch.nn.Module, data: ImageData) -> Tensor:
    "The model's answers for all test images."
    with evaluating(model): return torch.cat([model(images) for images, _ in data.test.plain()])


def judge_sets(
    model: ModularModel, # a trained one
    parts: Parts, # what it was taken apart into
    data: ImageData, # its test images are looked at
    sets: list[list[int]], # of classes; a module is cut for each
    logits: Tensor, # the model's answers for all test images
) -> dict[str, float]: # means over the sets
    "The module as it is cut, and beside it the full model choosing among the same classes."
    found = []
    for rows in sets:
        module, chosen = extract(model, parts, rows), torch.tensor(rows, device=logits.device)
        among = torch.isin(data.test.labels, chosen)
        right = chosen[logits[among][:, chosen].argmax(1)] == data.test.labels[among]
        image = torch.zeros(1, *module.input_shape, device=data.device)
        found.append(dict(accuracy=evaluate(module, data.test), full=right.float().mean().item(),
                          params=count_params(module) / module.full['params'],
                          flops=count_flops(module, image) / module.full['flops']))
    return {k: statistics.mean(f[k] for f in found) for k in found[0]}


def class_sets(
    n: int, # classes
    size: int, # of a set
    most: int, # sets
) -> list[list[int]]:
    "All sets of one or two classes where they are few, else random ones, the same in every run."
    if size == n: return [list(range(n))]
    if size <= 2 and math.comb(n, size) <= 45: return list(map(list, itertools.combinations(range(n), size)))
    return [sorted(random.Random(i).sample(range(n), size)) for i in range(most)]


def latencies(
    model: ModularModel, # a trained one
    parts: Parts, # what it was taken apart into
    data: ImageData, # for its shape
    sets: Sequence[Sequence[int]], # of classes
) -> dict[str, float]: # for 1 and 32 images: seconds of the modules over those of the full network
    "How long modules take, with folded norms and channels-last."
    found: dict[str, float] = {}
    full = fold_norms(as_module(plain(model), data.classes, data.shape))
    modules = [extract(model, parts, rows, fuse=True) for rows in sets]
    nets = [net.eval().to(memory_format=torch.channels_last) for net in (full, *modules)]
    for batch, rounds in ((1, 60), (32, 9)):
        x = torch.rand(batch, *data.shape, device=data.device).to(memory_format=torch.channels_last)
        calls = {str(i): partial(net, x) for i, net in enumerate(nets)}
        with torch.no_grad(): times = time_in_turns(calls, data.device, rounds)
        ratios = [t['ratio'] for t in list(times.values())[1:]]
        found[f'latency_2_{batch}'] = statistics.mean(ratios)
    return found


def aurocs(model: ModularModel, parts: Parts, data: ImageData, sets: list[list[int]]) -> dict[str, float]:
    "How well modules of five sets tell images of their classes from all others: mean AUROC."
    few = sets[::-(-len(sets) // 5)]
    found = [rejection(extract(model, parts, rows), data.test) for rows in few]
    return {f'auroc_{len(few[0])}': statistics.mean(found)}


SIZES = 1, 2, 5, 10, 50         # of target sets

def one_run(a: argparse.Namespace, network: str, method: str, seed: int, data: ImageData) -> dict[str, Any]:
    "Train and judge one network."
    (masks, recipe), (before, epochs) = settings_of(method), epochs_of(method, a.epochs)
    began, model, train = time.perf_counter(), None, partial(trained_network, a.trained, network)
    if before:
        model, _ = train('plain', None, RECIPE, before, seed, data)
        if masks: model = modular_network(model, masks, seed, data)
    model, cost = train(method, masks, recipe, epochs, seed, data, a.show_progress, model)
    net = model.net if masks else model
    result = cost | dict(params=count_params(net), full=evaluate(model, data.test))
    if masks:
        parts = decompose(model, data.train, show_progress=False)
        n, logits = data.n_classes, logits_of(model, data)
        result |= dict(krr=parts.kept.double().mean().item(),
                       opened=parts.kept.any(0).double().mean().item(),
                       coupling=jaccard_coupling(parts.kept).mean().item(),
                       cohesion=parts.cohesion.mean().item())
        for size in sorted({size for size in SIZES if size < n} | {n}):
            most = a.pairs if size <= 2 else a.fives
            sets = class_sets(n, size, most)[:most]
            result |= {f'{k}_{size}': v for k, v in judge_sets(model, parts, data, sets, logits).items()}
        result |= latencies(model, parts, data, class_sets(n, 2, 45)[::9])
        for size in (s for s in (2, 5) if s < n): result |= aurocs(model, parts, data, class_sets(n, size, 5))
    return result | dict(seconds=time.perf_counter() - began)


def key_of(a: argparse.Namespace, network: str, method: str, seed: int) -> dict[str, Any]:
    "What tells runs apart."
    epochs = epochs_of(method, a.epochs)[1]
    about = dict(network=network, method=method, seed=seed, epochs=epochs, batch=a.batch)
    if a.size: about['size'] = a.size
    return about | dict(data=Path(a.data).name) | settings_of(method)[1]


def run(a: argparse.Namespace) -> None:
    preset = USUAL | PRESETS[a.preset]
    for k, v in preset.items():
        if getattr(a, k) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    data = image_data(a.data, root=a.root, batch_size=a.batch, size=a.size, device=a.device)
    a.trained = a.trained or Path(a.root)/'trained'
    for seed, network, method in itertools.product(a.seeds, a.networks, a.methods):
        key = key_of(a, network, method, seed)
        if any(all(r.get(k) == v for k, v in key.items()) for r in read(a.results)): continue
        result = one_run(a, network, method, seed, data)
        line = json.dumps(key | result | dict(threads=torch.get_num_threads(), **environment(data.device)))
        with a.results.open('a') as f: f.write(line + '\n')
        print(key, {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, flush=True)


COLUMNS = [('full', 'full'), ('KRR', 'krr'),
           ('2 classes', 'accuracy_2'), ('5', 'accuracy_5'), ('10', 'accuracy_10'), ('50', 'accuracy_50'),
           ('full on the 2', 'full_2'), ('on the 5', 'full_5'),
           ('parameters 2', 'params_2'), ('5', 'params_5'), ('10', 'params_10'),
           ('AUROC 2', 'auroc_2'), ('5', 'auroc_5'),
           ('FLOPs 2', 'flops_2'), ('latency 2, batch 1', 'latency_2_1'), ('batch 32', 'latency_2_32')]
ABOUT = 'data', 'size', 'network', 'epochs', 'batch', 'method'


def time_over_plain(runs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    "Seconds of processor time in training over those of the plain runs on the same machine."
    same = [*ABOUT[:-1], 'device']
    ratios, timed = [], [p for p in rows if 'cpu_seconds' in p]
    for r in runs:
        beside = [p for p in timed if all(p.get(k) == r.get(k) for k in same)]
        plains = [p['cpu_seconds'] for p in beside if p['method'].split(',')[0] == 'plain']
        if plains and 'cpu_seconds' in r: ratios.append(r['cpu_seconds'] / statistics.mean(plains))
    return f'{statistics.mean(ratios):.2f}' if ratios else '-'


def table(path: Path) -> str:
    "Mean and spread over seeds, in percent; and what the preset for GPUs has in store."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    rows = read(path)
    for r in rows: groups.setdefault(tuple(r.get(k) for k in ABOUT), []).append(r)
    head = [*ABOUT, 'seeds', *(c[0] for c in COLUMNS), 'time over plain']
    lines = []
    for about, runs in sorted(groups.items(), key=lambda group: [str(k) for k in group[0]]):
        cells = [str(k or '-').replace(',', ', ') for k in about] + [str(len(runs))]
        cells += [figure(runs, k) for _, k in COLUMNS] + [time_over_plain(runs, rows)]
        lines.append(cells)
    gpu = USUAL | PRESETS['gpu']
    planned = itertools.product(gpu['networks'], [gpu['epochs']], [gpu['batch']], gpu['methods'])
    missing = [m for m in planned if m not in {group[2:] for group in groups}]
    absent = ['not run'] * (len(COLUMNS) + 1)
    lines += [['-', '-', *map(str, m), '0', *absent] for m in missing]
    return markdown(head, lines)


def options(r: argparse.ArgumentParser) -> None:
    "What this benchmark alone can be told."
    r.add_argument('--trained', type=Path,
                   help='trained networks are kept here, for rivals.py too (default: ROOT/trained)')
    r.add_argument('--networks', nargs='+', help='NAME:WIDTH ...')
    r.add_argument('--methods', nargs='+',
                   help='plain, composable, mwt, or with settings, of the method or of the recipe: '
                        'composable,full_fraction=0.5')
    for name in ('epochs', 'batch', 'pairs', 'fives', 'size'): r.add_argument(f'--{name}', type=int)
    r.add_argument('--show-progress', action='store_true', help='progress bars')


def main() -> None: run_or_table(__doc__, PRESETS, RESULTS, run, table, options)


if __name__ == '__main__': main()
