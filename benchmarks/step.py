"""What does a step of modular training cost, against a step of plain training?

    python benchmarks/step.py       # full width; batches of 32 on a CPU (minutes), of 512 on CUDA
    python benchmarks/step.py --networks resnet18 --profile
    python benchmarks/step.py --quick

A step is `Trainer.step`, what `fit` runs: forward, loss, backward, optimizer, and what the method
learns from the gradients; on random images that are on the device already. Candidates, timed in
turns:

- plain: held against by all others
- mwt: masks from generators, cohesion and coupling
- composable, learning: gates close, scores are taken in and gates set anew, here in every step, in
  training in every eighth
- composable, settled: what no class opens stays closed; target sets run through a network without it
- union, settled: the same with `dense=False`, where closed kernels are gone altogether and each image
  trains two roles

`composable, run` is the mean over a run: 5 % of the steps are plain, 15 % learn, the others are
settled. Gates of the settled candidates are random, with so much in common between classes that
all ten keep about a quarter of the operations, as after training (`open`: their share of the kernels). With
--compile the networks are compiled first. --profile prints what the time of each candidate goes
to. Rows go to results/step.jsonl.
"""
from __future__ import annotations
from collections.abc import Callable
from typing import Any
import torch
from torch.profiler import ProfilerActivity, profile
from bench import arguments, keep, parse
from mwt.core.nets import memory_format
from mwt.methods.modular import ModularModel, modularize
from mwt.core.checks import seeded
from mwt.methods.composable import PRICE, module_masks, open_gates
from mwt.core.timing import time_in_turns
from mwt.networks import NETWORKS, create_model
from mwt.train.history import TrainConfig
from mwt.train.trainer import Trainer

N_CLASSES, STEPS = 10, 10**9            # of a run that is caught in the middle
CANDIDATES: dict[str, tuple[str | None, float, dict[str, Any]]] = { # method, progress, settings
    'plain': (None, .3, {}),
    'mwt': ('mwt', .3, {}),
    'composable, learning': ('composable', .2, {}),
    'composable, settled': ('composable', .7, {}),
    'union, settled': ('composable', .7, dict(dense=False))}
PARTS = {'plain': .05, 'composable, learning': .15, 'composable, settled': .8}     # of a run


@torch.no_grad()
def close_gates(model: ModularModel) -> float: # share of the kernels that some class opens
    "Random gates with the target's share open."
    gates = model.masks.gates
    shared = torch.randn(gates.n_units)
    own = torch.randn(N_CLASSES, gates.n_units)
    scores = torch.exp(2 * shared + .7 * own).to(gates.scores)
    scores = scores / gates.costs.price(module_masks(gates.gates)).mean(0)**PRICE
    gates.gates.copy_(open_gates(scores, gates.costs, gates.groups, model.method.goals(model)[0]))
    return ((gates.gates.amax(0) * gates.kernels).sum() / gates.kernels.sum()).item()


def runs(
    name: str, # of the network
    a: Any, # the options
) -> tuple[dict[str, Callable[[], Any]], float]: # steps; share of kernels open when settled
    "Runs of one network, each caught in the middle."
    with seeded(0): images, labels = torch.randn(a.batch, 3, 32, 32), torch.randint(N_CLASSES, (a.batch,))
    images, labels, found, opened = images.to(a.device), labels.to(a.device), {}, 1.
    for candidate, (method, progress, settings) in CANDIDATES.items():
        with seeded(0):
            model = create_model(name, N_CLASSES, a.width, seed=0)
            if method: model = modularize(model, N_CLASSES, method, images[:1].cpu(), **settings)
            if 'settled' in candidate: opened = close_gates(model)
        format = memory_format(model.to(a.device), images)
        model.to(memory_format=format).train()
        run = Trainer(model, TrainConfig(lr=1e-4, amp=a.amp), STEPS, a.compile, format)
        def step(run: Trainer = run, done: int = int(progress * STEPS)) -> None:
            run.done = done
            run.step(images, labels)
        found[candidate] = step
    return found, opened


def measure(name: str, a: Any) -> list[dict[str, Any]]:
    "A row a candidate."
    steps, opened = runs(name, a)
    times = time_in_turns(steps, a.device, a.rounds, warmup=2 if a.quick else 3)
    times['composable, run'] = {k: sum(part * times[name][k] for name, part in PARTS.items())
                                for k in times['plain']}
    if a.profile:
        for candidate, step in steps.items():
            print(f'{name}, {candidate}', shares(step, a), sep='\n', flush=True)
    rows = []
    for candidate, t in times.items():
        share = opened if 'settled' in candidate else None
        rows.append(dict(network=name, width=a.width, batch=a.batch, amp=a.amp, compiled=a.compile,
                         candidate=candidate, **t, open=share))
    return rows


def shares(step: Callable[[], Any], a: Any) -> str:
    "What a step's time goes to."
    activities = [ProfilerActivity.CPU]
    if a.device.type == 'cuda': activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as prof:
        for _ in range(3): step()
    return prof.key_averages().table(sort_by=f'self_{a.device.type}_time_total', row_limit=15,
                                     max_name_column_width=50)


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=None,
                   help='left out: simcnn vgg16_bn resnet18 mobilenet')
    p.add_argument('--width', type=float, default=None, help='of the networks; left out: 1, with --quick 0.1')
    p.add_argument('--batch', type=int, default=None,
                   help='images in a batch; left out: 32 on a CPU, 512 on CUDA, with --quick 8')
    p.add_argument('--amp', choices=('auto', 'yes', 'no'), default='auto',
                   help='bfloat16; auto: as fit, on CUDA only')
    p.add_argument('--compile', action='store_true', help='torch.compile')
    p.add_argument('--profile', action='store_true', help="print what each step's time goes to")
    a = parse(p)
    a.amp = a.device.type == 'cuda' if a.amp == 'auto' else a.amp == 'yes'
    usual = ['simcnn', 'mobilenet'] if a.quick else ['simcnn', 'vgg16_bn', 'resnet18', 'mobilenet']
    names = a.networks or usual
    a.width = a.width or (.1 if a.quick else 1.)
    a.batch = a.batch or (8 if a.quick else 512 if a.device.type == 'cuda' else 32)
    a.rounds = 2 if a.quick else 50 if a.device.type == 'cuda' else 7
    keep('step', [row for name in names for row in measure(name, a)], a)


if __name__ == '__main__': main()
