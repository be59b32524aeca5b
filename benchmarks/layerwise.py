"""What do layer-wise modules save: in retraining, in compressing, in latency?

    python benchmarks/layerwise.py run --data FOLDER                   # a ResNet of 44 layers; CPU: hours
    python benchmarks/layerwise.py run --data FOLDER --preset quick    # minutes, to see that it works
    python benchmarks/layerwise.py table                               # all results as Markdown

Four parts, in the protocol of DeepArc (Ren et al., ICSE 2023) but for one thing: whatever is chosen (blocks,
epochs) is chosen on validation images, and the test images are looked at once.

    pgd, fgsm   adversarial twins of some images. The blocks that drift most are trained alone, on clean ones
                and their twins, beside training the whole network on the same images: the share of the
                weights that learn, seconds, accuracy on clean and on attacked test images
    damage      weights of some blocks are drawn anew until accuracy is down; the sound network is the teacher
    compress    Torch-Pruning from the whole network, and from the one without blocks that nobody misses
    shorten     two-class modules of a modular network: accuracy, parameters and latency at batch size 1

pgd and fgsm need torchattacks, compress needs torch-pruning: `pip install '.[bench]'`. torchattacks pins an
old `requests`; where that collides with other packages, `pip install --no-deps torchattacks` will do.
A part whose package is missing is left out, and said to be.

Every run adds a line to results/layerwise.jsonl; lines that are there already are skipped.
"""
from __future__ import annotations
import argparse, copy, importlib.util, itertools, json, sys, time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from torch import Tensor, nn
from mwt.core.errors import WrongValue
from mwt.data.batches import Batches, ImageData
from mwt.data.sources import image_data
from mwt.layers.blocks import find_blocks
from mwt.layers.edit import drop_blocks
from mwt.layers.retrain import drifting, retrain_blocks
from mwt.layers.shorten import shorten
from mwt.layers.similarity import modularity, similarity
from mwt.measure import count_flops, count_params, evaluate, profiles
from mwt.methods.modular import modularize
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.networks import create_model
from mwt.runs.report import environment
from mwt.train.fit import fit
from results import FOLDER, each, figure, markdown, read, run_or_table, values

RESULTS = FOLDER/'layerwise.jsonl'
RECIPE = dict(lr=0.05, weight_decay=5e-4, warmup=0.15)
THRESHOLD = 0.95        # neighbours more alike than that are one segment
PARTS = dict(pgd='torchattacks', fgsm='torchattacks', damage='', compress='torch_pruning', shorten='')
PRESETS: dict[str, dict[str, Any]] = {
    'quick': dict(depth=14, width=0.5, epochs=2, retrain=2, attacked=64, worst=1, batch=32, pairs=1),
    'cpu': dict(depth=44, width=1.0, epochs=30, retrain=10, attacked=1000, worst=5, batch=128, pairs=5),
    'gpu': dict(depth=44, width=1.0, epochs=200, retrain=10, attacked=1000, worst=5, batch=128, pairs=20)}


def network(a: argparse.Namespace, data: ImageData, seed: int) -> nn.Module:
    "The residual network of this benchmark, fresh."
    return create_model('resnet_cifar', data.n_classes, a.width, data.channels, seed=seed, depth=a.depth)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    "What a call returns, and the seconds that it takes."
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return result, time.perf_counter() - start


# Attacks

class Pixels(nn.Module):
    "A network as torchattacks wants it: for pixels from 0 to 1."
    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', batches.mean[:, None, None])
        self.register_buffer('std', batches.std[:, None, None])

    def forward(self, x: Tensor) -> Tensor: return self.model((x - self.mean) / self.std)


def attacked(model: nn.Module, batches: Batches, name: str) -> Batches:
    "The same images, attacked: 8/255 at most; rounded to bytes, as files hold them."
    import torchattacks
    makers = dict(pgd=lambda m: torchattacks.PGD(m, eps=8/255, alpha=2/255, steps=10),
                  fgsm=lambda m: torchattacks.FGSM(m, eps=8/255))
    attack = makers[name](Pixels(model, batches).to(batches.device).eval())
    found = []
    for start in range(0, batches.n, batches.batch_size):
        some = slice(start, start + batches.batch_size)
        found.append(attack(batches.images[some].float() / 255, batches.labels[some]))
    return batches._replace(images=(torch.cat(found).detach() * 255).round().to(torch.uint8))


def joined(a: Batches, b: Batches) -> Batches:
    "The images of both."
    return a._replace(images=torch.cat([a.images, b.images]), labels=torch.cat([a.labels, b.labels]))


def attack_rows(a: argparse.Namespace, name: str, model: nn.Module, data: ImageData) -> Iterator[dict]:
    "The blocks that drift most, and all of them, trained on an attack."
    clean = {split: getattr(data, split).sample(min(a.attacked, getattr(data, split).n))
             for split in ('train', 'valid', 'test')}
    other = {split: attacked(model, batches, name) for split, batches in clean.items()}
    drift, seconds = timed(lambda: drifting(model, clean['train'], other['train'], show_progress=False))
    both = ImageData(*(joined(clean[s], other[s]) for s in ('train', 'valid', 'test')))
    twins = joined(clean['train'], clean['train'])
    start = dict(clean_before=evaluate(model, clean['test']), other_before=evaluate(model, other['test']))
    for how, blocks in (('worst', drift.worst(a.worst)), ('all blocks', drift.names)):
        better, took = timed(lambda: retrain_blocks(
            model, both, blocks, clean=twins, epochs=a.retrain, show_progress=False))
        yield start | dict(how=how, blocks=blocks, drift_seconds=seconds, seconds=took,
                           **shares(model, blocks), clean=evaluate(better, clean['test']),
                           other=evaluate(better, other['test']))
    whole = copy.deepcopy(model)
    _, took = timed(lambda: fit(whole, both, a.retrain, lr=0.01, show_progress=False))
    yield start | dict(how='whole, plain', blocks=[], seconds=took, weights=1., neurons=1.,
                       clean=evaluate(whole, clean['test']), other=evaluate(whole, other['test']))


def shares(model: nn.Module, blocks: list[str]) -> dict[str, float]:
    "Which share of the weights, and of the kernels and units ('neurons'), some blocks are."
    found = find_blocks(model)
    weights = sum(found.params(b) for b in found if b.name in blocks) / count_params(model)
    layers = {path for b in found if b.name in blocks for path in b.layers}
    sizes = {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    neurons = sum(size for n, size in sizes.items() if n in layers) / sum(sizes.values())
    return dict(weights=weights, neurons=neurons)


# Damage

def damaged(model: nn.Module, data: ImageData, drop: float, seed: int) -> tuple[nn.Module, list[str]]:
    "Kernels of random blocks are drawn anew, until validation accuracy is down; the blocks."
    generator = torch.Generator().manual_seed(seed)
    broken, blocks = copy.deepcopy(model), find_blocks(model)
    before, hit = evaluate(model, data.valid), []
    for i in torch.randperm(len(blocks), generator=generator).tolist():
        block = blocks.items[i]
        for path in block.layers:
            layer = broken.get_submodule(path)
            if not isinstance(layer, nn.Conv2d): continue
            fresh = torch.randn(layer.weight.shape, generator=generator) * layer.weight.std().item()
            layer.weight.data.copy_(fresh)
        hit.append(block.name)
        if evaluate(broken, data.valid) < before - drop: break
    return broken, hit


def damage_rows(a: argparse.Namespace, model: nn.Module, data: ImageData, seed: int) -> Iterator[dict]:
    "Mending what was broken: blocks alone, with the sound network as teacher, and everything."
    for drop in (.1, .3, .5):
        broken, hit = damaged(model, data, drop, seed)
        start = dict(drop=drop, clean_before=evaluate(broken, data.test), full=evaluate(model, data.test))
        mended, took = timed(lambda: retrain_blocks(
            broken, data, hit, teacher=model, epochs=a.retrain, show_progress=False))
        yield start | dict(how='damaged blocks', blocks=hit, seconds=took, **shares(model, hit),
                           clean=evaluate(mended, data.test))
        whole = copy.deepcopy(broken)
        _, took = timed(lambda: fit(whole, data, a.retrain, lr=0.01, show_progress=False))
        yield start | dict(how='whole, plain', blocks=[], seconds=took, weights=1., neurons=1.,
                           clean=evaluate(whole, data.test))


# Compressing

def not_missed(model: nn.Module, data: ImageData, most_lost: float = .01) -> list[str]:
    "Blocks that can go for a point of validation accuracy; most alike neighbours first."
    alike = similarity(model, data.valid, of='blocks', show_progress=False)
    order = sorted(zip(alike.neighbours[1:], alike.names[1:]), reverse=True)
    lowest, gone = evaluate(model, data.valid) - most_lost, []
    removable = set(find_blocks(model).removable)
    for name in (name for _, name in order if name in removable):
        if evaluate(drop_blocks(model, [*gone, name]), data.valid) >= lowest: gone.append(name)
    return gone


def pruned(model: nn.Module, data: ImageData, ratio: float) -> nn.Module:
    "A copy with fewer kernels, chosen by Torch-Pruning: by magnitude, over all layers."
    import torch_pruning as tp
    model, x = copy.deepcopy(model).eval(), torch.zeros(2, *data.shape, device=data.device)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.MetaPruner(model, x, importance=importance, pruning_ratio=ratio, global_pruning=True,
                         ignored_layers=heads).step()
    return model


def compress_rows(a: argparse.Namespace, model: nn.Module, data: ImageData) -> Iterator[dict]:
    "Pruned from the whole network and from the shorter one, both fine-tuned alike."
    gone, found = timed(lambda: not_missed(model, data))
    starts = dict(whole=model)
    if gone: starts['without blocks'] = drop_blocks(model, gone)
    alike = similarity(model, data.valid, of='blocks', show_progress=False)
    image = torch.zeros(1, *data.shape, device=data.device)
    for (how, net), ratio in itertools.product(starts.items(), (0., .3, .5)):
        small = pruned(net, data, ratio) if ratio else copy.deepcopy(net)
        _, took = timed(lambda: fit(small, data, a.retrain, lr=0.01, show_progress=False))
        yield dict(how=how, ratio=ratio, blocks=gone if how != 'whole' else [], seconds=took,
                   choosing_seconds=found, modularity=modularity(alike, THRESHOLD),
                   params=count_params(small) / count_params(model),
                   flops=count_flops(small, image) / count_flops(model, image),
                   clean=evaluate(small, data.test), full=evaluate(model, data.test))


# Short modules

def shorten_rows(a: argparse.Namespace, data: ImageData, seed: int) -> Iterator[dict]:
    "Two-class modules as they are cut, and without the blocks that they do not need."
    model = modularize(network(a, data, seed), data.n_classes, seed=seed)
    fit(model, data, a.epochs, seed=seed, show_progress=False, **RECIPE)
    parts = decompose(model, data.train, show_progress=False)
    pairs = list(itertools.combinations(range(data.n_classes), 2))
    for rows in pairs[::max(1, len(pairs) // a.pairs)][:a.pairs]:
        module = extract(model, parts, list(rows))
        for by in ('accuracy', 'similarity'):
            try: (short, table), took = timed(lambda: shorten(
                module, data, by=by, epochs=a.retrain, show_progress=False))
            except WrongValue as e:         # after few epochs a module may be no better than guessing
                print(f'{module.classes} left out: {e}', flush=True)
                continue
            whole, less = profiles([module, short], repeats=15)
            yield dict(how=by, classes=module.classes, seconds=took,
                       blocks=[row['left out'] for row in table.rows[1:] if row['left out'][0] != '('],
                       accuracy_before=evaluate(module, data.test), accuracy=evaluate(short, data.test),
                       params=less.params / whole.params, flops=less.flops / whole.flops,
                       latency_before=whole.latency, latency=less.latency / whole.latency)


# Runs

def rows_of(part: str, a: argparse.Namespace, data: ImageData, model: nn.Module, seed: int) -> Iterator[dict]:
    "The rows of one part."
    if part == 'damage': return damage_rows(a, model, data, seed)
    if part == 'compress': return compress_rows(a, model, data)
    if part == 'shorten': return shorten_rows(a, data, seed)
    return attack_rows(a, part, model, data)


def run(a: argparse.Namespace) -> None:
    for k, v in PRESETS[a.preset].items():
        if getattr(a, k) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    data = image_data(a.data, root=a.root, batch_size=a.batch, device=a.device)
    for seed in a.seeds:
        key = dict(depth=a.depth, width=a.width, seed=seed, epochs=a.epochs, retrain=a.retrain,
                   batch=a.batch, data=Path(a.data).name)
        model = None
        for part in a.parts:
            needs = PARTS[part]
            if needs and not importlib.util.find_spec(needs):
                print(f"{part} is left out: {needs} is not installed (pip install '.[bench]')", flush=True)
                continue
            if any(all(r.get(k) == v for k, v in (key | dict(part=part)).items()) for r in read(a.results)):
                continue
            if model is None and part != 'shorten':
                model = network(a, data, seed)
                fit(model, data, a.epochs, seed=seed, show_progress=False, **RECIPE)
            rows = list(rows_of(part, a, data, model, seed))
            machine = dict(threads=torch.get_num_threads(), **environment(data.device))
            with a.results.open('a') as f:
                for row in rows: f.write(json.dumps(key | dict(part=part) | row | machine) + '\n')
            print(key | dict(part=part), f'{len(rows)} rows', flush=True)


COLUMNS = dict(
    pgd=[('weights', 'weights'), ('neurons', 'neurons'), ('clean before', 'clean_before'), ('clean', 'clean'),
         ('attacked before', 'other_before'), ('attacked', 'other')],
    damage=[('weights', 'weights'), ('neurons', 'neurons'), ('damaged', 'clean_before'), ('mended', 'clean'),
            ('sound', 'full')],
    compress=[('parameters', 'params'), ('FLOPs', 'flops'), ('accuracy', 'clean'), ('full', 'full'),
              ('modularity', 'modularity')],
    shorten=[('accuracy as cut', 'accuracy_before'), ('shortened', 'accuracy'), ('parameters', 'params'),
             ('FLOPs', 'flops'), ('latency', 'latency')])
COLUMNS['fgsm'] = COLUMNS['pgd']


def table(path: Path) -> str:
    "A table a part: means and spreads in percent, mean seconds."
    rows, texts = read(path), []
    for part in each(rows, 'part'):
        mine = [r for r in rows if r['part'] == part]
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for r in mine:
            detail = r.get('drop', r.get('ratio', ''))
            groups.setdefault((r['depth'], r['width'], r['epochs'], r['how'], detail), []).append(r)
        columns = COLUMNS[part]
        head = ['depth', 'width', 'epochs', 'how', 'detail', 'runs', 'seconds', *(c for c, _ in columns)]
        lines = []
        for group, runs in groups.items():
            seconds = sum(values(runs, 'seconds')) / 100 / len(runs)
            cells = [*map(str, group), str(len(runs)), f'{seconds:.1f}']
            cells += [figure(runs, k) for _, k in columns]
            lines.append(cells)
        texts.append(f'**{part}**\n\n{markdown(head, lines)}')
    return '\n\n'.join(texts)


def options(r: argparse.ArgumentParser) -> None:
    "What this benchmark alone can be told."
    r.add_argument('--parts', nargs='+', default=list(PARTS), choices=list(PARTS))
    for name in ('depth', 'epochs', 'retrain', 'attacked', 'worst', 'batch', 'pairs'):
        r.add_argument(f'--{name}', type=int)
    r.add_argument('--width', type=float)


def main() -> None: run_or_table(__doc__, PRESETS, RESULTS, run, table, options)


if __name__ == '__main__': main()
