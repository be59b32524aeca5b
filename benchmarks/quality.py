"""How good are modules as they are cut?

Train, decompose, extract and judge, for several networks, methods and seeds.

    python benchmarks/quality.py run --data FOLDER                  # on a CPU: 80 minutes, two cores
    python benchmarks/quality.py run --data FOLDER --preset quick   # a minute, to see that it works
    python benchmarks/quality.py run --data FOLDER --preset gpu     # full width, 200 epochs; CUDA
    python benchmarks/quality.py run --data FOLDER --preset ablation
    python benchmarks/quality.py table                              # all results as Markdown

The table gives mean and spread over seeds.

Every run adds one line to results/quality.jsonl; runs that are there already are skipped, so a
stopped benchmark is resumed by the same command, and several may work side by side (--seeds 0,
--seeds 1, ...).
"""
from __future__ import annotations
import argparse, itertools, json, random, statistics, sys, time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from torch import Tensor
from torch.nn import functional as F
from mwt.core.nets import evaluating
from mwt.methods.modular import ModularModel, modularize
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.modules.parts import Parts
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.methods.base import METHODS, Method, make_method
from mwt.methods.composable import Composable, draw_targets, random_sets
from mwt.measure import count_flops, count_params, evaluate
from mwt.modules.modularity import jaccard_coupling
from mwt.networks import create_model
from mwt.runs.report import environment
from mwt.train.history import TrainConfig
from mwt.train.fit import fit
from results import FOLDER, figure, read

RESULTS = FOLDER/'quality.jsonl'
RECIPE = dict(lr=0.05, weight_decay=5e-4, warmup=0.15, amp=True)
PRESETS: dict[str, dict[str, Any]] = {
    'cpu': dict(networks=['simcnn:0.375', 'resnet18:0.25'], methods=['plain', 'composable'],
                epochs=10, batch=64, fives=20),
    'quick': dict(networks=['simcnn:0.1'], methods=['plain', 'composable'], epochs=1, batch=128, fives=2),
    'mwt': dict(networks=['simcnn:0.375', 'resnet18:0.25'], methods=['mwt'], epochs=10, batch=64, fives=20),
    'ablation': dict(networks=['simcnn:0.125'], epochs=5, batch=64, fives=20, methods=[
        'plain', 'composable', 'composable,twice=0', 'composable,twice=0,full=1',
        'composable,twice=0,full=0', 'uniform,twice=0', 'distilled,twice=0', 'both,twice=0',
        'composable,twice=0,separation=0', 'composable,twice=0,separation=3',
        'composable,twice=0,end=0.9,start=0.5', 'composable,twice=0,memory=0.9',
        'plain,weight_decay=0', 'composable,twice=0,weight_decay=0']),
    'gpu': dict(networks=['resnet18:1', 'vgg16_bn:1', 'mobilenet:1'],
                methods=['plain', 'composable', 'mwt'], epochs=200, batch=512, fives=20)}


@dataclass(frozen=True)
class Uniform(Composable, name='uniform'):
    "For the ablation: sizes of target sets are equally likely."
    def targets(self, labels: Tensor, n_classes: int, progress: float) -> Tensor:
        size = torch.randint(2, n_classes + 1, labels.shape, device=labels.device)
        if not (self.two_roles and self.ready(progress)):
            full = 1 - (1 - self.full_fraction) * progress
            size = size.masked_fill(torch.rand_like(size, dtype=torch.float) < full, n_classes)
        return random_sets(labels, size, n_classes)


@dataclass(frozen=True)
class Distilled(Composable, name='distilled'):
    "For the ablation: samples of small target sets also learn from the full model's answers; a second pass."
    def training_loss(self, model: ModularModel, images: Tensor, labels: Tensor,
                      progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        with evaluating(model): teacher = model(images).float()
        targets = self.targets(labels, model.n_classes, progress)
        model.masks.gates.learning = not self.ready(progress)
        logits = model(images, targets).float().masked_fill(~targets, -1e4)
        answers = teacher.masked_fill(~targets, -1e4).softmax(1)
        soft = F.cross_entropy(logits, answers, reduction='none')
        hard = F.cross_entropy(logits, labels, reduction='none')
        loss = torch.where(targets.all(1), hard, (hard + soft) / 2).mean()
        return loss, dict(cross_entropy=hard.mean().detach())


@dataclass(frozen=True)
class Both(Composable, name='both'):
    "For the ablation: every image trains all classes and a random target set; twice the work."
    def training_loss(self, model: ModularModel, images: Tensor, labels: Tensor,
                      progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        small = draw_targets(labels, model.n_classes, 0)
        targets, images = torch.cat([torch.ones_like(small), small]), torch.cat([images, images])
        model.masks.gates.learning = not self.ready(progress)
        logits = model(images, targets).float().masked_fill(~targets, -1e4)
        loss = F.cross_entropy(logits, torch.cat([labels, labels]))
        return 2 * loss, dict(cross_entropy=loss.detach())

    def after_backward(self, model: ModularModel, labels: Tensor, progress: float, step: int = 0) -> None:
        super().after_backward(model, torch.cat([labels, labels]), progress, step)


def settings_of(method: str) -> tuple[Method | None, dict[str, Any]]: # `None` for a plain network
    "A method and the recipe, from words like `mwt`, `composable,full_fraction=0.5,weight_decay=0`."
    name, *changes = method.split(',')
    if name != 'plain' and name not in METHODS:
        raise SystemExit(f"unknown method {name!r}; known: plain, {', '.join(METHODS)}")
    given: dict[str, Any] = {k: float(v) for k, v in (c.split('=') for c in changes)}
    for switch in ('amp', 'dense', 'twice', 'two_roles'):       # the last two: an old name and a new one
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


def one_run(a: argparse.Namespace, network: str, method: str, seed: int, data: ImageData) -> dict[str, Any]:
    "Train and judge one network."
    name, width = network.split(':')
    (masks, recipe), start = settings_of(method), time.perf_counter()
    model = create_model(name, data.n_classes, float(width), data.channels, seed=seed)
    if masks:
        image = torch.zeros(1, *data.shape)
        model = modularize(model, data.n_classes, masks, example_input=image, seed=seed)
    history = fit(model, data, a.epochs, seed=seed, device=data.device,
                  show_progress=a.show_progress, **recipe)
    seconds = time.perf_counter() - start
    net = model.net if masks else model
    result = dict(train_seconds=seconds, params=count_params(net),
                  valid=history.series('valid_accuracy')[history.best_epoch - 1],
                  full=evaluate(model, data.test))
    if masks:
        parts = decompose(model, data.train, show_progress=False)
        n = data.n_classes
        logits = logits_of(model, data)
        pairs = list(map(list, itertools.combinations(range(n), 2)))
        fives = [sorted(random.Random(i).sample(range(n), 5)) for i in range(a.fives)]
        result |= dict(krr=parts.kept.double().mean().item(),
                       coupling=jaccard_coupling(parts.kept).mean().item(),
                       cohesion=parts.cohesion.mean().item())
        for size, sets in ((1, [[i] for i in range(n)]), (2, pairs), (5, fives), (n, [list(range(n))])):
            result |= {f'{k}_{size}': v for k, v in judge_sets(model, parts, data, sets, logits).items()}
    return result | dict(seconds=time.perf_counter() - start)


def key_of(a: argparse.Namespace, network: str, method: str, seed: int) -> dict[str, Any]:
    "What tells runs apart."
    about = dict(network=network, method=method, seed=seed, epochs=a.epochs, batch=a.batch)
    return about | dict(data=Path(a.data).name) | settings_of(method)[1]


def run(a: argparse.Namespace) -> None:
    preset = PRESETS[a.preset]
    for k, v in preset.items():
        if getattr(a, k) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    data = image_data(a.data, root=a.root, batch_size=a.batch, device=a.device)
    for seed, network, method in itertools.product(a.seeds, a.networks, a.methods):
        key = key_of(a, network, method, seed)
        if any(all(r[k] == v for k, v in key.items()) for r in read(a.results)): continue
        result = one_run(a, network, method, seed, data)
        line = json.dumps(key | result | dict(threads=torch.get_num_threads(), **environment(data.device)))
        with a.results.open('a') as f: f.write(line + '\n')
        print(key, {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, flush=True)


COLUMNS = [('full', 'full'), ('KRR', 'krr'),
           ('2 classes', 'accuracy_2'), ('5', 'accuracy_5'), ('10', 'accuracy_10'),
           ('full on the 2', 'full_2'), ('on the 5', 'full_5'),
           ('parameters 2', 'params_2'), ('5', 'params_5'), ('10', 'params_10')]


def table(path: Path) -> str:
    "Mean and spread over seeds, in percent; and what the preset for GPUs has in store."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in read(path): groups.setdefault((r['network'], r['epochs'], r['batch'], r['method']), []).append(r)
    head = ['network', 'epochs', 'batch', 'method', 'seeds', *(c[0] for c in COLUMNS)]
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for (network, epochs, batch, method), runs in sorted(groups.items()):
        cells = [network, str(epochs), str(batch), method.replace(',', ', '), str(len(runs))]
        cells += [figure(runs, k) for _, k in COLUMNS]
        lines.append('| ' + ' | '.join(cells) + ' |')
    gpu = PRESETS['gpu']
    planned = itertools.product(gpu['networks'], [gpu['epochs']], [gpu['batch']], gpu['methods'])
    missing = [m for m in planned if m not in groups]
    lines += ['| ' + ' | '.join([*map(str, m), '0', *['not run'] * len(COLUMNS)]) + ' |' for m in missing]
    return '\n'.join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='command', required=True)
    r = sub.add_parser('run')
    r.add_argument('--data', required=True, help='a folder of images, or the name of a data set')
    r.add_argument('--root', default='data', help='decoded images are kept here')
    r.add_argument('--preset', default='cpu', choices=PRESETS)
    r.add_argument('--networks', nargs='+', help='NAME:WIDTH ...')
    r.add_argument('--methods', nargs='+',
                   help='plain, composable, mwt, or with settings, of the method or of the recipe: '
                        'composable,full_fraction=0.5')
    r.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    for name in ('epochs', 'batch', 'fives'): r.add_argument(f'--{name}', type=int)
    r.add_argument('--device', default=None)
    r.add_argument('--threads', type=int, default=0)
    r.add_argument('--show-progress', action='store_true', help='progress bars')
    t = sub.add_parser('table')
    for q in (r, t): q.add_argument('--results', type=Path, default=RESULTS, help='where results are kept')
    a = p.parse_args()
    run(a) if a.command == 'run' else print(table(a.results))


if __name__ == '__main__': main()
