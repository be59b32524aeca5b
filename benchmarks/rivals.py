"""Modules of this library beside what others make of a trained network, and beside controls.

    python benchmarks/rivals.py run --data FOLDER                   # on a CPU: hours, see --methods, --seeds
    python benchmarks/rivals.py run --data FOLDER --preset quick    # a few minutes, to see that it works
    python benchmarks/rivals.py run --data FOLDER --preset gpu      # full width, 200 epochs; CUDA
    python benchmarks/rivals.py table                               # all results as Markdown

For each set of classes every method makes one module:

    composable, mwt, moda   extracted from a model trained by that method
    narrow                  gates closed on the weights of a plain trained network
    ocap, magnitude         class-aware pruning, and Torch-Pruning, of the same plain network
    gradsplitter            gates and heads learned for each class of it
    recompose               masks of classes, pulled together; a module is their union (recompose,shared=0)
    random                  kernels drawn at random
    full                    all kernels, the outputs of the set
    thin                    a thin network that was trained on the classes of the set alone

Methods that can be asked for a size get that of the composable module of the same classes, in operations;
recompose, which makes its masks once for all sets, gets that of two classes on average.
Each module is judged three times on the test images: as it is cut, with new running statistics of its norms,
and after a fine-tuning of equal length. What a method may not prune makes its modules larger; the columns of
sizes and of layers say so.

Every module adds one line to results/rivals.jsonl; those that are there already are skipped, so a stopped
benchmark is resumed by the same command, and several may work side by side (--seeds 0, --methods thin, ...).
Networks are trained once and kept in the folder --trained, which may be that of quality.py.

CPU seconds for one network (simcnn:0.375 or resnet18:0.25) and seed with `--pairs 15 --fives 5 --tune 1`,
where plain and composable networks are there already; from single steps timed on one core of an AMD EPYC that
others share. 425 of them judge and fine-tune twenty small modules:

    composable, random, ocap    450 each
    recompose                   470     magnitude   530
    full                        750     narrow      830
    thin                       3600     twenty networks are trained
    mwt, moda                   600 each, and 1400 for their training
    gradsplitter               6800     4300 to split, once; modules are several whole networks
"""
from __future__ import annotations
import argparse, copy, itertools, json, statistics, sys, time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from torch import nn
from mwt.baselines.controls import random_kernels, thin_width, whole_network
from mwt.baselines.grad_splitter import Split, open_splitter, split
from mwt.baselines.magnitude import magnitude, torch_pruning
from mwt.baselines.ocap import layers_of_its_own, ocap
from mwt.baselines.recompose import Decomposed, recompose
from mwt.core.files import load_tensors, save_tensors
from mwt.core.timing import time_in_turns
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.measure import count_flops, count_params, evaluate
from mwt.methods.base import METHODS
from mwt.methods.composable import module_masks
from mwt.methods.shared import union
from mwt.modules.compose import fine_tune
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import SlimModule, as_module
from mwt.modules.narrow import OneSet, narrow, one_set, renormalise_
from mwt.modules.speed import fold_norms
from mwt.networks import create_model
from mwt.runs.report import environment
from mwt.train.fit import fit
from quality import NETWORKS, RECIPE, class_sets, settings_of
from results import FOLDER, each, figure, markdown, read, run_or_table
from trained import file_of, trained_network

RESULTS = FOLDER/'rivals.jsonl'
SHORT = dict(cycles=2, heads_first=1, gate_epochs=1, head_epochs=1, gate_lr_factor=10.)
OTHERS = ['narrow', 'ocap', 'magnitude', 'gradsplitter', 'recompose', 'random', 'full', 'thin']
ALL = ['composable', 'mwt', 'moda', *OTHERS]
PRESETS: dict[str, dict[str, Any]] = {
    'cpu': dict(networks=NETWORKS, epochs=10, batch=64, pairs=45, fives=20, tune=2, split=SHORT),
    'quick': dict(networks=['simcnn:0.1'], epochs=1, batch=128, pairs=2, fives=1, tune=1,
                  split=SHORT | dict(cycles=1)),
    'gpu': dict(networks=['resnet18:1', 'vgg16_bn:1'], epochs=200, batch=512, pairs=45, fives=20, tune=10,
                split={})}
STATISTICS = 8      # batches that new running statistics are taken from

ANIMALS = {'bird', 'cat', 'deer', 'dog', 'frog', 'horse'}
VEHICLES = {'airplane', 'automobile', 'ship', 'truck'}


def kind_of(names: Sequence[str]) -> str:
    "Are two classes of CIFAR-10 similar (both animals, both vehicles) or distinct? Empty for other sets."
    if len(names) != 2 or not set(names) <= ANIMALS | VEHICLES: return ''
    return 'distinct' if len(set(names) & ANIMALS) == 1 else 'similar'


def some(sets: list[list[int]], n: int) -> list[list[int]]:
    "An even choice of sets."
    return [sets[i * len(sets) // n] for i in range(min(n, len(sets)))] if n else []


def words_of(method: str) -> tuple[str, dict[str, Any]]: # name; settings of a baseline, whole numbers as such
    "A method and its settings, from words like `narrow,rounds=20`; `settings_of` knows those of training."
    name, *changes = method.split(',')
    if name in METHODS: return name, {}
    given = {k: float(v) for k, v in (c.split('=') for c in changes)}
    return name, {k: int(v) if v.is_integer() else v for k, v in given.items()}


@dataclass
class Start:
    "One network and seed: what was trained, and what is made of it; all when it is asked for."
    a: argparse.Namespace
    network: str
    seed: int
    data: ImageData
    splits: dict[str, tuple[Split, float]] = field(default_factory=dict)
    decomposed: dict[str, tuple[Decomposed, float]] = field(default_factory=dict)
    models: dict[str, tuple[Any, Any, dict[str, float]]] = field(default_factory=dict)

    def trained(self, method: str) -> tuple[nn.Module, dict[str, float]]:
        masks, recipe = settings_of(method)
        a = self.a
        return trained_network(a.trained, self.network, method, masks, recipe, a.epochs, self.seed, self.data,
                               a.show_progress)

    @cached_property
    def plain(self) -> tuple[nn.Module, dict[str, float]]: return self.trained('plain')

    @cached_property
    def any_set(self) -> OneSet:
        "The plain network with gates, for what can be asked about its layers."
        return one_set(self.plain[0], self.data, [0, 1])

    @cached_property
    def full(self) -> SlimModule: return whole_network(self.plain[0], self.data, self.data.classes)

    def modular(self, method: str) -> tuple[Any, Any, dict[str, float]]: # model, parts, cost
        if method not in self.models:
            model, cost = self.trained(method)
            self.models[method] = model, decompose(model, self.data.train, show_progress=False), cost
        return self.models[method]

    def split(self, method: str) -> tuple[Split, float]: # and seconds of processor time
        if method not in self.splits: self.splits[method] = self.new_split(method)
        return self.splits[method]

    def new_split(self, method: str) -> tuple[Split, float]:
        a, settings = self.a, self.a.split | words_of(method)[1]
        about = self.network, method, a.epochs, a.batch, self.seed, *settings.values()
        path = file_of(a.trained, *about, data=self.data)
        if path.exists():
            splitter, classes = open_splitter(self.plain[0], self.data)
            tensors, said = load_tensors(path, 'splitter')
            splitter.load_state_dict(tensors)
            return Split(splitter, classes), said['cpu_seconds']
        start = time.process_time()
        found = split(self.plain[0], self.data, **settings, seed=self.seed, show_progress=a.show_progress)
        seconds = time.process_time() - start
        save_tensors(path, 'splitter', found.splitter.state_dict(), dict(cpu_seconds=seconds))
        return found, seconds

    def masks_of_classes(self, method: str) -> tuple[Decomposed, float]: # and seconds of processor time
        if method not in self.decomposed:
            target = dict(target_flops=self.a.target_flops) if self.a.target_flops else {}
            start, settings = time.process_time(), target | words_of(method)[1]
            found = recompose(self.plain[0], self.data, **settings, seed=self.seed, show_progress=False)
            self.decomposed[method] = found, time.process_time() - start
        return self.decomposed[method]

    def goal(self, rows: list[int]) -> float:
        "The fraction of the operations that the module of these classes may keep."
        if self.a.target_flops: return self.a.target_flops
        model, _, _ = self.modular('composable')
        gates = model.masks.gates
        chosen = torch.zeros(1, model.n_classes, dtype=torch.bool, device=gates.gates.device)
        chosen[0, rows] = True
        return gates.costs.fraction(module_masks(union(gates.gates, chosen))).item()


def make(start: Start, method: str, rows: list[int]) -> tuple[SlimModule, dict[str, Any]]:
    "The module of a method for some classes; what its training cost over plain."
    (name, settings), (plain, cost) = words_of(method), start.plain
    if name in METHODS:
        model, parts, own = start.modular(method)
        over = own['cpu_seconds'] / cost['cpu_seconds']
        return extract(model, parts, rows), dict(train_over_plain=over)
    if name == 'gradsplitter':
        found, seconds = start.split(method)
        return found.module(rows), dict(train_over_plain=1 + seconds / cost['cpu_seconds'])
    if name == 'recompose':
        decomposed, seconds = start.masks_of_classes(method)
        return decomposed.module(rows), dict(train_over_plain=1 + seconds / cost['cpu_seconds'])
    if name == 'thin': return thin(start, rows, cost)
    if name == 'full': return whole_network(plain, start.data, rows), dict(train_over_plain=1.)
    makers: dict[str, Callable[..., SlimModule]] = dict(
        narrow=partial(narrow, new_statistics=False, show_progress=False, seed=start.seed), ocap=ocap,
        magnitude=magnitude, random=partial(random_kernels, seed=start.seed))
    target = dict(target_flops=min(1., start.goal(rows)))
    return makers[name](plain, start.data, rows, **target | settings), dict(train_over_plain=1.)


def thin(start: Start, rows: list[int], cost: Mapping[str, float]) -> tuple[SlimModule, dict[str, Any]]:
    "A thin network, trained on the classes alone."
    a, data = start.a, start.data
    name = start.network.split(':')[0]
    width = thin_width(name, len(rows), data.shape, start.goal(rows) * start.full.full['flops'])
    few, begin = data.subset(rows), time.process_time()
    net = create_model(name, len(rows), width, data.channels, seed=start.seed)
    fit(net, few, a.epochs, seed=start.seed, show_progress=False, **RECIPE)
    over = (time.process_time() - begin) / cost['cpu_seconds']
    module = as_module(net, few.classes, data.shape, start.full.full, net.signature)
    return module, dict(train_over_plain=over, width=width)


def latencies(module: SlimModule, full: SlimModule, data: ImageData) -> dict[str, float]:
    "For 1 and 32 images: seconds over those of the whole network, with folded norms and channels-last."
    found = {}
    nets = [fold_norms(m).eval().to(memory_format=torch.channels_last) for m in (full, module)]
    for batch, rounds in ((1, 60), (32, 9)):
        x = torch.rand(batch, *data.shape, device=data.device).to(memory_format=torch.channels_last)
        calls = {str(i): partial(net, x) for i, net in enumerate(nets)}
        with torch.no_grad(): times = time_in_turns(calls, data.device, rounds)
        found[f'latency_{batch}'] = times['1']['ratio']
    return found


def layers(start: Start, method: str) -> str: # e.g. `13 of 14`
    "How many layers with kernels a method may prune."
    name, settings = words_of(method)
    infos, model = start.any_set.model.channels.infos, start.any_set.model
    counts = dict.fromkeys(('narrow', 'random', 'gradsplitter', 'recompose'), len(model.kernels))
    counts |= dict(full=0, thin=len(infos), magnitude=len(infos) - 1)
    if name in METHODS: n = len(start.modular(method)[0].kernels)
    elif name == 'ocap': n = len(layers_of_its_own(start.any_set, settings.get('skip', 3)))
    else: n = counts[name]
    return f'{n} of {len(infos)}'


def one_module(start: Start, method: str, rows: list[int], timed: bool) -> dict[str, Any]:
    "Make a module and judge it."
    a, data = start.a, start.data
    begin, cpu = time.perf_counter(), time.process_time()
    module, result = make(start, method, rows)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    few, full = data.subset(rows), start.full.full
    image = torch.zeros(1, *data.shape, device=data.device)
    renormed = copy.deepcopy(module)
    renormalise_(renormed, few.train, STATISTICS)
    tuned = fine_tune(module, few, a.tune, new_head=False, amp=True, seed=start.seed, show_progress=False)
    judged = dict(accuracy=module, renormed=renormed, tuned=tuned)
    result |= {key: evaluate(m, few.test) for key, m in judged.items()}
    result |= dict(params=count_params(module) / full['params'],
                   flops=count_flops(module, image) / full['flops'], prepare_seconds=seconds, prepare_cpu=cpu,
                   layers=layers(start, method))
    if timed: result |= latencies(module, start.full, data)
    return result | dict(seconds=time.perf_counter() - begin)


def check_methods(methods: Sequence[str]) -> None:
    "Ends the program, before any work, for a method that is unknown or lacks its package."
    for method in methods:
        name = method.split(',')[0]
        if name == 'magnitude': torch_pruning()
        if name in OTHERS: words_of(method)
        elif name in METHODS: settings_of(method)
        else: raise SystemExit(f"unknown method {name!r}; known: {', '.join([*METHODS, *OTHERS])}")


def run(a: argparse.Namespace) -> None:
    for k, v in PRESETS[a.preset].items():
        if getattr(a, k, None) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    check_methods(a.methods)
    data = image_data(a.data, root=a.root, batch_size=a.batch, device=a.device)
    a.trained = a.trained or Path(a.root)/'trained'
    n = data.n_classes
    pairs = some(class_sets(n, 2, a.pairs), a.pairs)
    fives = some(class_sets(n, 5, a.fives), a.fives) if n > 5 else []
    sets = [(rows, i % 9 == 0) for group in (pairs, fives) for i, rows in enumerate(group)]
    for seed, network in itertools.product(a.seeds, a.networks):
        start = Start(a, network, seed, data)
        for method, (rows, timed) in itertools.product(a.methods, sets):
            names = [data.classes[row] for row in rows]
            key = dict(network=network, method=method, seed=seed, epochs=a.epochs, batch=a.batch, tune=a.tune,
                       data=Path(a.data).name, classes=names)
            if a.target_flops: key['target_flops'] = a.target_flops
            if any(all(r.get(k) == v for k, v in key.items()) for r in read(a.results)): continue
            result = one_module(start, method, rows, timed)
            about = dict(n=len(rows), kind=kind_of(names), threads=torch.get_num_threads())
            line = json.dumps(key | about | result | environment(data.device))
            with a.results.open('a') as f: f.write(line + '\n')
            print(network, method, seed, *names, {k: round(v, 3) if isinstance(v, float) else v
                                                  for k, v in result.items()}, flush=True)


ABOUT = 'data', 'network', 'epochs', 'tune', 'classes', 'method'
COLUMNS = [('as cut', 'accuracy'), ('new statistics', 'renormed'), ('fine-tuned', 'tuned'),
           ('parameters', 'params'), ('FLOPs', 'flops'), ('latency, batch 1', 'latency_1'),
           ('batch 32', 'latency_32')]


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [r[key] for r in rows if key in r]
    return statistics.mean(found) if found else None


def seeds_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]: # one a seed
    "Means over sets of classes for each seed: similar and distinct pairs beside all."
    found = []
    for seed in each(rows, 'seed'):
        mine = [r for r in rows if r['seed'] == seed]
        said = {key: mean_of(mine, key) for _, key in COLUMNS}
        for kind in ('similar', 'distinct'):
            of_kind = [r for r in mine if r['kind'] == kind]
            said |= {f'{kind}_{key}': mean_of(of_kind, key) for key in ('accuracy', 'tuned')}
        found.append({k: v for k, v in said.items() if v is not None})
    return found


def place(data: str, network: str, epochs: int, tune: int, n: int, method: str) -> tuple[Any, ...]:
    "Where a group of rows stands in the table: methods in the order of `ALL`."
    return data, network, epochs, tune, n, ALL.index(method.split(',')[0]), method


def table(path: Path) -> str:
    "Mean and spread over seeds, in percent, of means over sets of classes."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in read(path):
        about = (*(r.get(k) for k in ABOUT[:4]), r['n'], r['method'])
        groups.setdefault(about, []).append(r)
    kinds = [(f'{kind}, {word}', f'{kind}_{key}') for kind in ('similar', 'distinct')
             for word, key in (('as cut', 'accuracy'), ('tuned', 'tuned'))]
    head = [*ABOUT, 'seeds', 'modules', *(c[0] for c in COLUMNS + kinds), 'layers that may go',
            'seconds of preparation', 'training over plain']
    lines = []
    for about, rows in sorted(groups.items(), key=lambda group: place(*group[0])):
        seeds = seeds_of(rows)
        cells = [str(k).replace(',', ', ') for k in about] + [str(len(seeds)), str(len(rows))]
        cells += [figure(seeds, key) for _, key in COLUMNS + kinds]
        cells += [rows[0]['layers'], f"{statistics.median(r['prepare_seconds'] for r in rows):.1f}",
                  f"{mean_of(rows, 'train_over_plain'):.2f}"]
        lines.append(cells)
    return markdown(head, lines)


def options(r: argparse.ArgumentParser) -> None:
    "What this benchmark alone can be told."
    r.add_argument('--trained', type=Path, help='trained networks are kept here (default: ROOT/trained)')
    r.add_argument('--networks', nargs='+', help='NAME:WIDTH ...')
    r.add_argument('--methods', nargs='+', default=ALL, help='also with settings: narrow,rounds=20')
    for name in ('epochs', 'batch', 'pairs', 'fives', 'tune'): r.add_argument(f'--{name}', type=int)
    r.add_argument('--target-flops', type=float, help='one size for all, not that of composable')
    r.add_argument('--show-progress', action='store_true', help='progress bars')


def main() -> None: run_or_table(__doc__, PRESETS, RESULTS, run, table, options)


if __name__ == '__main__': main()
