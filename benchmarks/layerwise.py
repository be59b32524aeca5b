"""What do layer-wise modules save: in retraining, in compressing, in latency?

    python benchmarks/layerwise.py run --data FOLDER --seeds 0         # CPU: about an hour a seed, one core
    python benchmarks/layerwise.py run --data FOLDER --parts pgd       # one part alone
    python benchmarks/layerwise.py run --data FOLDER --preset quick    # minutes, to see that it works
    python benchmarks/layerwise.py run --data FOLDER --preset gpu      # full width, 200 epochs; CUDA
    python benchmarks/layerwise.py table                               # all results as Markdown

The parts follow DeepArc (Ren et al., ICSE 2023) but for one thing: whatever is chosen (blocks, epochs) is
chosen on validation images, and the test images are looked at once.

    pgd, fgsm   adversarial twins of some images, made against the network as it was. The blocks that drift
                most are trained alone, on the images and their twins
    damage      kernels of some blocks are drawn anew until training accuracy is down by 10, 30, 50 points.
                The blocks that have drifted from the sound network, their teacher, are trained alone
    compress    the network, and the same without blocks that nobody misses, pruned by Torch-Pruning, a tenth
                of the operations at a time; after each cut both are trained until validation accuracy is
                within a point of the whole network's again. An iteration is one pass over --images images
    shorten     two-class modules of a modular network: accuracy, parameters and latency at batch size 1

Beside `worst`, the blocks that drift most: `whole`, every layer trained on the same images, with the same
loss, optimiser, epochs and start, and `whole, plain`, with cross-entropy alone. `neurons` is the share of the
kernels and units that learn.

CPU seconds at the preset `cpu`, one seed, one core of an AMD EPYC that others share (44 layers, half width,
32x32 pixels, bfloat16; a step of 64 images takes 0.15 s, a modular one 0.23 s):

    plain network, 10 epochs        1080    once, kept in --trained
    its gates, 3 epochs              480    once, for `shorten`
    pgd                              270    60 of them for the attack
    fgsm                             200
    damage                           700    3 degrees, 3 ways
    compress                         400    more where accuracy comes back slowly; 1000 at most
    shorten                          420    3 pairs, 2 ways

pgd and fgsm need torchattacks, compress needs torch-pruning: `pip install '.[bench]'`. torchattacks pins an
old `requests`; where that collides with other packages, `pip install --no-deps torchattacks` will do.
A part whose package is missing is left out, and said to be.

Every row is added to results/layerwise.jsonl as soon as it is there; rows that are there already are skipped,
so a stopped benchmark is resumed by the same command. Networks are trained once and kept in --trained.
"""
from __future__ import annotations
import argparse, copy, importlib.util, itertools, json, statistics, sys, time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # runs from a plain checkout

import torch
from torch import Tensor, nn
from mwt.baselines.magnitude import prune_
from mwt.core.errors import WrongValue
from mwt.core.nets import evaluating
from mwt.core.signature import Signature
from mwt.data.batches import Batches, ImageData
from mwt.data.sources import image_data
from mwt.layers.blocks import find_blocks
from mwt.layers.edit import drop_blocks
from mwt.layers.retrain import (Across, Drift, Student, block_sums, drifting, paired_data, retrain_blocks,
                                teacher_of)
from mwt.layers.shorten import shorten
from mwt.layers.similarity import FEWEST, Watch, centred_gram, modularity, similarity
from mwt.measure import count_flops, count_params, evaluate, profiles
from mwt.modules.compose import fine_tune
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.parts import Parts
from mwt.runs.report import environment
from mwt.train.fit import fit
from quality import settings_of
from results import FOLDER, each, figure, markdown, read, run_or_table
from trained import modular_network, trained_network

RESULTS = FOLDER/'layerwise.jsonl'
MEND = dict(lr=0.01, amp=True, show_progress=False)     # of all retraining, local or not
THRESHOLD = 0.95        # neighbours more alike than that are one segment
GOAL, CUT = 0.5, 0.1    # operations that pruning leaves, and takes in a round; of the whole network's
NEEDS = dict(pgd='torchattacks', fgsm='torchattacks', compress='torch_pruning')       # packages
ABOUT = 'depth', 'width', 'epochs', 'batch'         # what tells runs apart, of all parts
PARTS = dict(pgd=('retrain', 'attacked', 'worst'), fgsm=('retrain', 'attacked', 'worst'),
             damage=('retrain', 'images', 'worst'), compress=('retrain', 'images'),
             shorten=('gates', 'tune', 'lost'))     # and of one
CPU = dict(depth=44, width=0.5, epochs=10, gates=3, retrain=10, images=2500, attacked=1000, worst=5,
           batch=64, tune=3, pairs=3, lost=0.03)
PRESETS: dict[str, dict[str, Any]] = {
    'cpu': CPU,
    'quick': CPU | dict(depth=14, epochs=2, gates=2, retrain=2, images=300, attacked=64, worst=1, batch=32,
                        tune=1, pairs=1),
    'gpu': CPU | dict(width=1.0, epochs=200, gates=20, images=45000, batch=128, tune=10, pairs=20)}


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]: # and `seconds`, `cpu_seconds`
    "What a call returns, and the time that it takes."
    start, cpu = time.perf_counter(), time.process_time()
    result = call()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return result, dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)


@dataclass
class Start:
    "One seed: what was trained, and what is made of it; all when it is asked for."
    a: argparse.Namespace
    data: ImageData
    seed: int
    kept: dict[Any, Any] = field(default_factory=dict)

    def once(self, make: Callable[..., Any], *about: Any) -> Any:
        "What `make(self, *about)` returned when it was asked for first."
        key = make, *about
        if key not in self.kept: self.kept[key] = make(self, *about)
        return self.kept[key]

    @property
    def network(self) -> str: return f'resnet_cifar:{self.a.width},depth={self.a.depth}'

    def trained(self, method: str, epochs: int, model: nn.Module | None = None) -> nn.Module:
        masks, recipe = settings_of(method)
        if model is not None: model = modular_network(model, masks, self.seed, self.data)
        return trained_network(self.a.trained, self.network, method, masks, recipe, epochs, self.seed,
                               self.data, self.a.show_progress, model)[0]

    @cached_property
    def plain(self) -> nn.Module: return self.trained('plain', self.a.epochs)

    @cached_property
    def modular(self) -> nn.Module:
        "Gates on the weights of the plain network."
        method = f'composable,trained={self.a.epochs},epochs={self.a.gates},lr=0.02'
        return self.trained(method, self.a.gates, copy.deepcopy(self.plain))

    @cached_property
    def parts(self) -> Parts: return decompose(self.modular, self.data.train, show_progress=False)

    @cached_property
    def full(self) -> float: return evaluate(self.plain, self.data.test)

    @cached_property
    def few(self) -> ImageData:
        "As many training images as one pass of retraining takes, half as many to choose on."
        return sampled(self.data, self.a.images, self.a.images // 2, self.data.test.n, self.seed)


def sampled(data: ImageData, train: int, valid: int, test: int, seed: int = 0) -> ImageData:
    "Some images of each split; all where there are fewer."
    return ImageData(*(split.sample(min(n, split.n), seed)
                       for split, n in zip(data.splits().values(), (train, valid, test))))


# Retraining

class Whole(Student):
    "A network of which every layer is trained, with the loss of local retraining."
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for p in self.net.parameters(): p.requires_grad_(True)

    def train(self, mode: bool = True) -> Whole: return nn.Module.train(self, mode)


def retrain_whole(model: nn.Module, data: ImageData, blocks: list[str], teacher: nn.Module | None = None,
                  clean: Batches | None = None, **options: Any) -> nn.Module:
    "As `retrain_blocks`, of the same blocks and thus with the same loss, but everything learns."
    net = copy.deepcopy(model)
    found = block_sums(net, data.shape)
    chosen = found.chosen(blocks, projections=True)
    teach = teacher_of(teacher or net, chosen[0].name, found)
    student = Whole(net, found, chosen, teach, 0.5)
    student.signature = Signature(list(data.classes))
    fit(student, paired_data(data, clean, net), compile=False, **options)
    return net


def mended(start: Start, how: str, model: nn.Module, data: ImageData, blocks: list[str],
           **teach: Any) -> tuple[nn.Module, dict[str, Any]]: # and how much has learned, for how long
    "A network after retraining in one of three ways."
    options = dict(epochs=start.a.retrain, seed=start.seed) | MEND
    if how == 'whole, plain':
        net = copy.deepcopy(model)
        _, took = timed(partial(fit, net, data, **options))
    else:
        call = retrain_blocks if how == 'worst' else retrain_whole
        net, took = timed(partial(call, model, data, blocks, **teach, **options))
    learned = shares(model, blocks) if how == 'worst' else dict(weights=1., neurons=1.)
    return net, dict(blocks=blocks) | took | learned


WAYS = 'worst', 'whole', 'whole, plain'


def shares(model: nn.Module, blocks: list[str]) -> dict[str, float]:
    "Which share of the weights, and of the kernels and units ('neurons'), some blocks are."
    found = find_blocks(model)
    weights = sum(found.params(b) for b in found if b.name in blocks) / count_params(model)
    layers = {path for b in found if b.name in blocks for path in b.layers}
    sizes = {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    neurons = sum(size for n, size in sizes.items() if n in layers) / sum(sizes.values())
    return dict(weights=weights, neurons=neurons)


# Attacks

class Pixels(nn.Module):
    "A network as torchattacks wants it: for pixels from 0 to 1."
    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', batches.mean[:, None, None])
        self.register_buffer('std', batches.std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        return self.model(x.contiguous(memory_format=torch.channels_last))


def attacked(model: nn.Module, batches: Batches, name: str, seed: int) -> Batches:
    "The same images, attacked: 8/255 at most; rounded to bytes, as files hold them."
    import torchattacks
    makers = dict(pgd=lambda m: torchattacks.PGD(m, eps=8/255, alpha=2/255, steps=10),
                  fgsm=lambda m: torchattacks.FGSM(m, eps=8/255))
    net = Pixels(copy.deepcopy(model), batches).to(batches.device, memory_format=torch.channels_last).eval()
    attack, found = makers[name](net), []
    torch.manual_seed(seed)         # PGD begins at a random place
    for start in range(0, batches.n, batches.batch_size):
        some = slice(start, start + batches.batch_size)
        found.append(attack(batches.images[some].float() / 255, batches.labels[some]))
    return batches._replace(images=(torch.cat(found).detach() * 255).round().to(torch.uint8))


def joined(a: Batches, b: Batches) -> Batches:
    "The images of both."
    return a._replace(images=torch.cat([a.images, b.images]), labels=torch.cat([a.labels, b.labels]))


def twins(start: Start, name: str) -> dict[str, Any]:
    "Some images, their adversarial twins, and the blocks that take them for something else."
    n, model = start.a.attacked, start.plain
    clean = sampled(start.data, n, n // 4, n)
    def make() -> ImageData:
        return ImageData(*(attacked(model, split, name, start.seed) for split in clean.splits().values()))
    other, attack = timed(make)
    drift, took = timed(lambda: drifting(model, clean.train, other.train, show_progress=False))
    about = dict(attack_seconds=attack['seconds'], drift_seconds=took['seconds'],
                 clean_before=evaluate(model, clean.test), other_before=evaluate(model, other.test))
    both = ImageData(*map(joined, clean.splits().values(), other.splits().values()))
    return dict(clean=clean, other=other, both=both, blocks=drift.worst(start.a.worst), about=about)


def attack_row(start: Start, name: str, how: str) -> dict[str, Any]:
    "The network trained on an attack in one of three ways; judged on held-out images and their twins."
    found = start.once(twins, name)
    clean, other = found['clean'], found['other']
    benign = joined(clean.train, clean.train)       # of the images, and of their twins
    net, about = mended(start, how, start.plain, found['both'], found['blocks'], clean=benign)
    return found['about'] | about | dict(clean=evaluate(net, clean.test), other=evaluate(net, other.test))


# Damage

def damaged(start: Start, drop: float) -> dict[str, Any]:
    "Kernels of random blocks are drawn anew, a quarter of a layer at a time, until accuracy is down."
    generator = torch.Generator().manual_seed(start.seed)
    model, judge = start.plain, start.few.train.sample(min(1000, start.few.train.n)).plain()
    broken, blocks = copy.deepcopy(model), find_blocks(model)
    lowest = evaluate(model, judge) - drop
    def hit() -> Iterator[str]:
        for i in torch.randperm(len(blocks), generator=generator).tolist():
            for path in blocks.items[i].layers:
                weight = broken.get_submodule(path).weight.data
                if weight.ndim != 4: continue
                fresh = torch.randn(weight.shape, generator=generator).to(weight) * weight.std()
                for rows in torch.randperm(len(weight), generator=generator).chunk(4):
                    weight[rows] = fresh[rows]
                    yield blocks.names[i]
    found = []
    for name in hit():
        found.append(name)
        if (now := evaluate(broken, judge)) <= lowest: break
    blocks = compared(model, broken, judge).worst(start.a.worst)
    about = dict(drop=drop, hit=list(dict.fromkeys(found)), train_before=now,
                 clean_before=evaluate(broken, start.data.test), full=start.full)
    return dict(model=broken, blocks=blocks, about=about)


def compared(sound: nn.Module, broken: nn.Module, batches: Batches) -> Drift:
    "In which blocks two networks of the same layers part, by their answers to the same images."
    across, watches = Across(), []
    for net in (sound, broken):
        blocks = block_sums(net, batches.shape)
        watches.append(Watch(net, blocks.graph, [block.add for block in blocks], centred_gram))
    with torch.no_grad(), evaluating(sound), evaluating(broken):
        for images, _ in batches.shuffled(0):
            if len(images) >= FEWEST: across.add(*(watch.of(images) for watch in watches))
    return Drift(blocks.names, [1., *across.alike().nan_to_num(0.).tolist()])


def damage_row(start: Start, drop: float, how: str) -> dict[str, Any]:
    "Mending what was broken in one of three ways, with the sound network as teacher."
    found = start.once(damaged, drop)
    net, about = mended(start, how, found['model'], start.few, found['blocks'], teacher=start.plain)
    return found['about'] | about | dict(clean=evaluate(net, start.data.test))


# Compressing

def shorter(start: Start) -> tuple[nn.Module, list[str], dict[str, float], float]: # blocks; time; modularity
    "The network without blocks that can go for a point of validation accuracy; most alike neighbours first."
    model, valid = start.plain, start.few.valid
    alike, looked = timed(lambda: similarity(model, valid, of='blocks', show_progress=False))
    def choose() -> list[str]:
        order = sorted(zip(alike.neighbours[1:], alike.names[1:]), reverse=True)
        lowest, gone, removable = evaluate(model, valid) - .01, [], find_blocks(model).removable
        for name in (name for _, name in order if name in removable):
            if evaluate(drop_blocks(model, [*gone, name]), valid) >= lowest: gone.append(name)
        return gone
    gone, took = timed(choose)
    took = {k: v + looked[k] for k, v in took.items()}
    return drop_blocks(model, gone) if gone else model, gone, took, modularity(alike, THRESHOLD)


def head_of(model: nn.Module) -> nn.Module:
    "The last linear layer."
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def regained(start: Start, net: nn.Module, lowest: float, passes: int) -> tuple[bool, int]: # did it; passes
    "Train until validation accuracy is back, each pass on other images."
    a, data = start.a, start.data
    for n in range(a.retrain + 1):
        if evaluate(net, start.few.valid) >= lowest: return True, n
        if n == a.retrain: break
        seed = start.seed + passes + n
        images = ImageData(data.train.sample(min(a.images, data.train.n), seed), start.few.valid, data.test)
        fit(net, images, 1, seed=seed, **MEND)
    return False, a.retrain


def pruned(start: Start, net: nn.Module) -> tuple[nn.Module, list[dict[str, float]], int]: # and all passes
    "The smallest network that is as accurate as the whole one but for a point, and all on the way to it."
    whole, image = start.plain, torch.zeros(1, *start.data.shape, device=start.data.device)
    lowest, full = evaluate(whole, start.few.valid) - .01, count_flops(whole, image)
    good, trace, began, passes = net, [], time.process_time(), 0
    for share in (1 - CUT * n for n in range(round((1 - GOAL) / CUT) + 1)):
        now, net = count_flops(good, image) / full, copy.deepcopy(good)
        if now <= share < 1: continue           # without some blocks it is as small already
        if share < 1: prune_(net, head_of(net), image, share / now, 'flops')
        back, more = regained(start, net, lowest, passes)
        passes += more
        if not back: break
        good = net
        trace.append(dict(flops=count_flops(net, image) / full,
                          params=count_params(net) / count_params(whole),
                          iterations=passes, cpu_seconds=time.process_time() - began))
    return good, trace, passes


def compress_row(start: Start, how: str) -> dict[str, Any]:
    "Pruned and trained in turns, until half the operations are left or accuracy does not come back."
    net, blocks, chosen, modular = start.plain, [], dict(seconds=0., cpu_seconds=0.), None
    if how != 'whole': net, blocks, chosen, modular = start.once(shorter)
    (small, trace, passes), took = timed(lambda: pruned(start, copy.deepcopy(net)))
    last = trace[-1] if trace else dict(flops=1., params=1.)
    about = dict(choosing_seconds=chosen['seconds'], choosing_cpu=chosen['cpu_seconds'])
    if modular is not None: about['modularity'] = modular
    return took | about | dict(blocks=blocks, trace=trace, reached=float(last['flops'] <= GOAL + .01),
                               iterations=passes, flops=last['flops'], params=last['params'],
                               clean=evaluate(small, start.data.test), full=start.full)


# Short modules

def two_classes(start: Start, rows: tuple[int, ...]) -> dict[str, Any]:
    "A module as it is cut, and how well it does after the fine-tuning that shorter ones get."
    module = extract(start.modular, start.parts, list(rows))
    tuned = fine_tune(module, start.data, start.a.tune, False, **MEND)
    about = dict(accuracy_before=evaluate(module, start.data.test),
                 accuracy_tuned=evaluate(tuned, start.data.test))
    return dict(module=module, about=about)


def shorten_row(start: Start, rows: tuple[int, ...], how: str) -> dict[str, Any]:
    "The module without the blocks that it does not need."
    found, a = start.once(two_classes, rows), start.a
    module = found['module']
    (short, table), took = timed(lambda: shorten(
        module, start.data, most_lost=a.lost, by=how, epochs=a.tune, **MEND))
    whole, less = profiles([module, short], repeats=30)
    gone = [row['left out'] for row in table.rows[1:] if row['left out'][0] != '(']
    return found['about'] | took | dict(
        blocks=gone, accuracy=evaluate(short, start.data.test), params=less.params / whole.params,
        flops=less.flops / whole.flops, latency_before=whole.latency, latency=less.latency / whole.latency)


# Runs

Task = tuple[dict[str, Any], Callable[[], dict[str, Any]]]     # what a row is about, what measures it

def tasks(part: str, start: Start) -> Iterator[Task]:
    "The rows of one part."
    if part == 'damage':
        for drop, how in itertools.product((.1, .3, .5), WAYS):
            yield dict(drop=drop, how=how), partial(damage_row, start, drop, how)
    elif part == 'compress':
        for how in ('whole', 'without blocks'): yield dict(how=how), partial(compress_row, start, how)
    elif part == 'shorten':
        pairs, n = list(itertools.combinations(range(start.data.n_classes), 2)), start.a.pairs
        for rows, how in itertools.product(pairs[::max(1, len(pairs) // n)][:n], ('accuracy', 'similarity')):
            about = dict(how=how, classes=[start.data.classes[row] for row in rows])
            yield about, partial(shorten_row, start, rows, how)
    else:
        for how in WAYS: yield dict(how=how), partial(attack_row, start, part, how)


def run_part(part: str, start: Start) -> None:
    "Add the rows of a part that are not there yet."
    a = start.a
    key = {k: getattr(a, k) for k in (*ABOUT, *PARTS[part])} | dict(
        seed=start.seed, data=Path(a.data).name, part=part)
    for about, measure in tasks(part, start):
        about = key | about
        if any(all(r.get(k) == v for k, v in about.items()) for r in read(a.results)): continue
        try: row = measure()
        except WrongValue as e:         # after few epochs a module may be no better than guessing
            if part != 'shorten': raise
            print(f"{about['classes']} left out: {e}", flush=True)
            continue
        machine = dict(threads=torch.get_num_threads(), **environment(start.data.device))
        with a.results.open('a') as f: f.write(json.dumps(about | row | machine) + '\n')
        print(about, {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}, flush=True)


def run(a: argparse.Namespace) -> None:
    for k, v in PRESETS[a.preset].items():
        if getattr(a, k) is None: setattr(a, k, v)
    if a.threads: torch.set_num_threads(a.threads)
    data = image_data(a.data, root=a.root, batch_size=a.batch, device=a.device)
    a.trained = a.trained or Path(a.root)/'trained'
    missing = [p for p in a.parts if p in NEEDS and not importlib.util.find_spec(NEEDS[p])]
    for part in missing:
        print(f"{part} is left out: {NEEDS[part]} is not installed (pip install '.[bench]')", flush=True)
    for seed in a.seeds:
        start = Start(a, data, seed)
        for part in a.parts:
            if part not in missing: run_part(part, start)


COLUMNS = dict(
    pgd=[('weights', 'weights'), ('neurons', 'neurons'), ('clean before', 'clean_before'), ('clean', 'clean'),
         ('attacked before', 'other_before'), ('attacked', 'other')],
    damage=[('weights', 'weights'), ('neurons', 'neurons'), ('damaged', 'clean_before'), ('mended', 'clean'),
            ('sound', 'full')],
    compress=[('parameters', 'params'), ('FLOPs', 'flops'), ('accuracy', 'clean'), ('full', 'full'),
              ('modularity', 'modularity'), ('reached', 'reached')],
    shorten=[('accuracy as cut', 'accuracy_before'), ('fine-tuned', 'accuracy_tuned'),
             ('shortened', 'accuracy'), ('parameters', 'params'), ('FLOPs', 'flops'), ('latency', 'latency')])
COLUMNS['fgsm'] = COLUMNS['pgd']
NUMBERS = [('seconds', 'seconds'), ('CPU seconds', 'cpu_seconds'), ('iterations', 'iterations')]


def number(runs: list[dict[str, Any]], key: str) -> str:
    "Its mean over the runs that have it."
    found = [r[key] for r in runs if key in r]
    return f'{statistics.mean(found):.1f}' if found else '-'


def table(path: Path) -> str:
    "A table a part: means and spreads in percent, mean seconds."
    rows, texts = read(path), []
    for part in each(rows, 'part'):
        about = [*ABOUT, *PARTS[part], *(['drop'] if part == 'damage' else []), 'how']
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for r in rows:
            if r['part'] == part: groups.setdefault(tuple(r[k] for k in about), []).append(r)
        head = [*about, 'runs', *(c for c, _ in NUMBERS), *(c for c, _ in COLUMNS[part])]
        lines = []
        for group, runs in groups.items():
            cells = [*map(str, group), str(len(runs)), *(number(runs, k) for _, k in NUMBERS)]
            lines.append(cells + [figure(runs, k) for _, k in COLUMNS[part]])
        texts.append(f'**{part}**\n\n{markdown(head, lines)}')
    return '\n\n'.join(texts)


def options(r: argparse.ArgumentParser) -> None:
    "What this benchmark alone can be told."
    r.add_argument('--trained', type=Path, help='trained networks are kept here (default: ROOT/trained)')
    r.add_argument('--parts', nargs='+', default=list(PARTS), choices=list(PARTS))
    for name, value in CPU.items(): r.add_argument(f'--{name}', type=type(value))
    r.add_argument('--show-progress', action='store_true', help='progress bars while networks are trained')


def main() -> None: run_or_table(__doc__, PRESETS, RESULTS, run, table, options)


if __name__ == '__main__': main()
