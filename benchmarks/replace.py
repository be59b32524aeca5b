"""A class of a weak model, decided with the help of a strong model's module.

    python benchmarks/replace.py run --data FOLDER                  # CPU
    python benchmarks/replace.py run --data FOLDER --preset quick   # a minute, to see that it works
    python benchmarks/replace.py table                              # all results as Markdown

The protocol is MODA's (Ngo et al., ICSE 2026): a strong model knows classes 0 to 4, with all training images.
A weak one (LeNet5) knows classes 5 to 9 and one of these, from a tenth of the images and without
augmentation, and is looked at early (under-fitted) and late (over-fitted). A module of the strong model for
that one class is to help. Five ways, on the same two models:

    layer     the weak logit replaced by the module's, a square linear layer behind, 5 epochs (MODA)
    min-max   the weak probability replaced by the module's logit, scaled to [0, 1] (CNNSplitter)
    ours      `replace_class`, fitted on validation images, a fifth as many as the weak model was trained on
    ours, 5   the same with a module of all five classes
    control   the layer of the first way behind the weak model alone: no module

Every strong model adds its lines to results/replace.jsonl; those that are there already are skipped. Strong
models are trained once and kept in the folder --trained.
"""
from __future__ import annotations
import argparse, json, statistics, sys, time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from mwt.core.checks import seeded
from mwt.data.batches import Batches, ImageData
from mwt.data.loaders import taken_by
from mwt.data.sources import image_data
from mwt.measure import count_params
from mwt.modules.compose import outputs
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import SlimModule
from mwt.modules.replace import fit_patch
from mwt.networks import create_model
from mwt.runs.report import environment
from quality import settings_of
from results import FOLDER, figure, markdown, read, run_or_table
from trained import trained_network

RESULTS = FOLDER/'replace.jsonl'
PRESETS: dict[str, dict[str, Any]] = {
    'cpu': dict(networks=['simcnn:0.375', 'vgg16_bn:0.25'], epochs=30, weak=[10, 195], batch=64),
    'quick': dict(networks=['simcnn:0.1'], epochs=1, weak=[1, 3], batch=128)}
STATES = 'under-fitted', 'over-fitted'


def tenth(batches: Batches, fraction: float = .1) -> Batches:
    "The first images of each class, in order, without augmentation."
    rows = [(batches.labels == c).nonzero()[:, 0] for c in range(len(batches.classes))]
    rows = torch.cat([r[:max(2, round(fraction * len(r)))] for r in rows])
    return batches.plain()._replace(images=batches.images[rows], labels=batches.labels[rows])


def weak_models(few: Batches, epochs: Sequence[int], batch: int, seed: int) -> Iterator[nn.Module]:
    "LeNet5 at some epochs of one run of SGD, whose rate falls along a cosine; from 0.05 some of them die."
    net = create_model('lenet5', len(few.classes), in_channels=few.shape[0], seed=seed).to(few.device)
    batches = few._replace(shuffle=True, batch_size=min(batch, few.n), seed=seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs) + 5)
    for epoch in range(1, max(epochs) + 1):
        net.train()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        schedule.step()
        if epoch in epochs: yield net.eval()


def logits(model: nn.Module, batches: Batches) -> Tensor: # (images, outputs), double
    "A model's answers, in the order of the images."
    images = torch.cat([x for x, _ in taken_by(batches.plain(), model)])
    return outputs(model, images)


def linear_layer(x: Tensor, labels: Tensor, n: int, seed: int) -> nn.Linear:
    "MODA's calibration: 5 epochs of SGD with rate .05, from weights near zero."
    with seeded(seed):
        layer = nn.Linear(x.shape[1], n).double()
        nn.init.normal_(layer.weight, std=.01)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=.05, momentum=.9)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[rows]), labels[rows]).backward()
                optimizer.step()
    return layer


def ways(weak: dict[str, Tensor], strong: dict[str, Tensor], five: dict[str, Tensor],
         labels: dict[str, Tensor], span: tuple[float, float], target: int,
         seed: int) -> Iterator[tuple[str, Tensor, int, float]]:
    "Of each way: name, answers for the test images, numbers added beside the module's, seconds."
    n = weak['test'].shape[1]
    def put_in(split: str) -> Tensor:
        x = weak[split].clone()
        x[:, target] = strong[split][:, 0]
        return x
    for name, make in (('layer', put_in), ('control', lambda split: weak[split])):
        start = time.perf_counter()
        layer = linear_layer(make('train'), labels['train'], n, seed)
        with torch.no_grad(): yield name, layer(make('test')), n * n + n, time.perf_counter() - start
    start = time.perf_counter()
    found = weak['test'].softmax(1)
    found[:, target] = ((strong['test'][:, 0] - span[0]) / (span[1] - span[0])).clamp(0, 1)
    yield 'min-max', found, 2, time.perf_counter() - start
    for name, m in (('ours', strong), ('ours, 5', five)):
        start = time.perf_counter()
        weight, bias = fit_patch(weak['valid'], m['valid'], labels['valid'], target)
        found = F.linear(torch.cat([weak['test'], m['test']], 1), weight, bias)
        yield name, found, 2 * n + m['test'].shape[1], time.perf_counter() - start


def accuracy(answers: Tensor, labels: Tensor,
             target: int) -> tuple[float, float]: # of the class, of the others
    "How many images of the class, and of the others, are told right."
    right = (answers.argmax(1) == labels).double()
    return right[labels == target].mean().item(), right[labels != target].mean().item()


def one_target(a: argparse.Namespace, data: ImageData, modules: dict[str, SlimModule], name: str,
               seed: int) -> list[dict[str, Any]]:
    "A weak model without help and with it, early and late."
    classes = [*data.classes[5:10], name]
    splits = data.subset(classes)
    few = tenth(splits.train)
    valid = tenth(splits.valid, min(1., .02 * splits.train.n / splits.valid.n))
    split = dict(train=few, valid=valid, test=splits.test)
    labels = {k: b.plain().labels.cpu() for k, b in split.items()}
    strong, five = ({k: logits(modules[m], b) for k, b in split.items()} for m in (name, 'all'))
    seen = logits(modules[name], data.subset(data.classes[:5]).train)
    span, rows = (seen.min().item(), seen.max().item()), []
    for state, weak in zip(STATES, weak_models(few, a.weak, a.batch, seed)):
        known = {k: logits(weak, b) for k, b in split.items()}
        own, rest = accuracy(known['test'], labels['test'], 5)
        for way, answers, added, seconds in ways(known, strong, five, labels, span, 5, seed):
            target, others = accuracy(answers, labels['test'], 5)
            sizes = {'control': 0, 'ours, 5': count_params(modules['all'])}
            module = sizes.get(way, count_params(modules[name]))
            rows.append(dict(state=state, target=name, way=way, weak_target=own, weak_others=rest,
                             change_target=target - own, change_others=others - rest,
                             added=added + module, seconds=seconds))
    return rows


def strong_modules(a: argparse.Namespace, data: ImageData, network: str, seed: int) -> dict[str, SlimModule]:
    "A module for each of the first five classes, and one for all."
    few = data.subset(data.classes[:5])
    masks, recipe = settings_of('composable')
    called = f"composable of {' '.join(few.classes)}"
    model, _ = trained_network(a.trained, network, called, masks, recipe, a.epochs, seed, few,
                               a.show_progress)
    parts = decompose(model, few.train, show_progress=False)
    return {c: extract(model, parts, [c]) for c in few.classes} | {'all': extract(model, parts, few.classes)}


def run(a: argparse.Namespace) -> None:
    for k, v in PRESETS[a.preset].items():
        if getattr(a, k) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    data = image_data(a.data, root=a.root, batch_size=a.batch, device=a.device)
    if data.n_classes < 10: raise SystemExit(f'the data has {data.n_classes} classes; ten are needed')
    a.trained = a.trained or Path(a.root)/'trained'
    for seed in a.seeds:
        for network in a.networks:
            key = dict(network=network, seed=seed, epochs=a.epochs, weak=list(a.weak), data=Path(a.data).name)
            if any(all(r.get(k) == v for k, v in key.items()) for r in read(a.results)): continue
            modules = strong_modules(a, data, network, seed)
            rows = [r for name in data.classes[:5] for r in one_target(a, data, modules, name, seed)]
            about = dict(threads=torch.get_num_threads(), **environment(data.device))
            with a.results.open('a') as f: f.writelines(json.dumps(key | r | about) + '\n' for r in rows)
            print(key, f'{len(rows)} rows', flush=True)


def table(path: Path) -> str:
    "Mean and spread over target classes and seeds; changes in points."
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in read(path):
        key = r['data'], r['network'], r['epochs'], r['state'], r['way']
        groups.setdefault(key, []).append(r)
    head = ['data', 'strong', 'epochs', 'weak model', 'way', 'n', 'weak on the class', 'change',
            'weak on the others', 'change', 'parameters added', 'seconds']
    lines = []
    for about, rows in groups.items():
        cells = [*map(str, about), str(len(rows))]
        cells += [figure(rows, k) for k in ('weak_target', 'change_target', 'weak_others', 'change_others')]
        cells.append(f"{statistics.mean(r['added'] for r in rows):,.0f}")
        cells.append(f"{statistics.mean(r['seconds'] for r in rows):.2f}")
        lines.append(cells)
    return markdown(head, lines)


def options(r: argparse.ArgumentParser) -> None:
    "What this benchmark alone can be told."
    r.add_argument('--trained', type=Path, help='trained networks are kept here (default: ROOT/trained)')
    r.add_argument('--networks', nargs='+', help='NAME:WIDTH ... of the strong models')
    r.add_argument('--weak', nargs=2, type=int, help='epochs after which the weak model is looked at')
    for name in ('epochs', 'batch'): r.add_argument(f'--{name}', type=int)
    r.add_argument('--show-progress', action='store_true', help='progress bars')


def main() -> None: run_or_table(__doc__, PRESETS, RESULTS, run, table, options)


if __name__ == '__main__': main()
