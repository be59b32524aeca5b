"""What does taking a network apart cost? The memory of `decompose`, and the time of exact cohesion.

    python benchmarks/decompose.py              # about two minutes on two cores
    python benchmarks/decompose.py --quick

Memory: `decompose` of a thin SimCNN (method mwt) over n and 10 n random images, median of three
runs, each in a process of its own. What is measured is how far the peak rises above its state
before the call: of the process's resident memory (ru_maxrss) on the CPU, of allocated memory on
CUDA. The images, made before, do not count. Beside it stand the bytes that all samples' masks, as
floats, would need.

Cohesion: `mwt.modules.modularity.mean_jaccard` of 5,000 samples x 4,800 kernels, against one pass
per shift: the masks beside the masks rolled by 1, 2, ... samples. It is given in two forms, with
integers as the published method computes it, and with booleans. A pass per shift takes long, so
evenly spread shifts are timed and their median is multiplied by the number of all shifts. On a
small case, all shifts are run and all forms are checked to agree.
Rows go to results/decompose.jsonl.
"""
from __future__ import annotations
import json, resource, statistics, subprocess, sys
from pathlib import Path
from typing import Any
import torch
from torch import Tensor
from bench import arguments, keep, parse
from mwt.methods.modular import modularize
from mwt.core.checks import seeded
from mwt.data.batches import Batches
from mwt.modules.decompose import decompose
from mwt.modules.modularity import mean_jaccard
from mwt.core.timing import time_in_turns
from mwt.networks import create_model

CLASSES = [str(i) for i in range(10)]
UNIT = 1 if sys.platform == 'darwin' else 1024      # of ru_maxrss, in bytes


def peak(device: torch.device) -> int:
    "Bytes, at most, so far."
    if device.type == 'cuda': return torch.cuda.max_memory_allocated(device)
    return UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rise(samples: int, device: torch.device, width: float, kept: int) -> dict[str, Any]:
    "Take a network apart in this process, and say how far the peak rose."
    images = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(samples, device=device) % len(CLASSES)
    batches = Batches(images, labels, CLASSES, mean=torch.full((3,), .5), std=torch.full((3,), .25))
    net = create_model('simcnn', width=width, seed=0)
    model = modularize(net, len(CLASSES), 'mwt', torch.zeros(1, 3, 32, 32)).to(device)
    before = peak(device)
    decompose(model, batches, samples=kept, show_progress=False)
    return dict(samples=samples, kernels=sum(model.kernels.values()), rise=peak(device) - before,
                images=images.nbytes)


def memory(a: Any) -> list[dict[str, Any]]:
    "n samples and ten times as many, in turns; every run in a new process."
    found: dict[int, list[dict[str, Any]]] = {a.samples: [], 10 * a.samples: []}
    for _ in range(1 if a.quick else 3):
        for samples, runs in found.items():
            words = [sys.executable, str(Path(__file__).resolve()),
                     '--device', str(a.device), '--threads', str(a.threads),
                     '--width', str(a.width), '--kept', str(a.kept), '--rise', str(samples)]
            said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(said.splitlines()[-1]))
    rows = []
    for runs in found.values():
        rises = [run['rise'] for run in runs]
        spread = dict(rise=statistics.median(rises), low=min(rises), high=max(rises))
        rows.append(dict(figure='memory', form='decompose') | runs[0] | spread)
    return [r | dict(all_masks=4 * r['samples'] * r['kernels'], ratio=r['rise'] / rows[0]['rise'])
            for r in rows]


def shift_integer(masks: Tensor, shift: int) -> Tensor:
    "Mean Jaccard index of each sample and the one so many places on; masks are integers, 0 or 1."
    other = masks.roll(-shift, 0)
    return ((masks * other).sum(1) / (masks + other > 0).int().sum(1)).mean()


def shift_boolean(masks: Tensor, shift: int) -> Tensor:
    "The same for booleans, which are a quarter of the bytes."
    other = masks.roll(-shift, 0)
    return ((masks & other).sum(1) / (masks | other).sum(1)).mean()


FORMS = {'one pass a shift, integers': (shift_integer, torch.int32),
         'one pass a shift, booleans': (shift_boolean, torch.bool)}


def check(device: torch.device) -> None:
    "A small case, with all its shifts."
    masks = torch.rand(60, 40, device=device) < .5
    for name, (shift, dtype) in FORMS.items():
        slow = torch.stack([shift(masks.to(dtype), s) for s in range(1, len(masks))]).double().mean()
        assert abs(slow.item() - mean_jaccard(masks)) < 1e-6, f'{name} differs from mean_jaccard'


def time_cohesion(a: Any) -> list[dict[str, Any]]:
    "One product in blocks, against all shifts."
    n, kernels = (500, 480) if a.quick else (5000, 4800)
    with seeded(0):
        check(a.device)
        masks = (torch.rand(n, kernels) < .5).to(a.device)
    about = dict(figure='cohesion', samples=n, kernels=kernels)
    product = {'product': lambda: mean_jaccard(masks)}
    rounds = 3 if a.quick else 5
    [fast] = time_in_turns(product, a.device, rounds=rounds, warmup=1).values()
    shifts = torch.linspace(1, n - 1, 5 if a.quick else 15).long().tolist()
    rows = [dict(form='mean_jaccard', **about, shifts_timed=0, seconds=fast['seconds'], faster=1.)]
    for name, (shift, dtype) in FORMS.items():
        given, left = masks.to(dtype), iter([shifts[0], *shifts])       # the first warms up
        one_shift = {name: lambda: shift(given, next(left))}
        [one] = time_in_turns(one_shift, a.device, rounds=len(shifts), warmup=1).values()
        seconds = one['seconds'] * (n - 1)
        rows.append(dict(form=name, **about, shifts_timed=len(shifts), seconds=seconds,
                         faster=seconds / fast['seconds']))
    return rows


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--samples', type=int, default=None, help='n; left out: 2500, or 500 with --quick')
    p.add_argument('--width', type=float, default=.125, help='of the SimCNN')
    p.add_argument('--kept', type=int, default=None,
                   help='masks a class that decompose keeps for cohesion; left out: its default, '
                        'or 20 with --quick')
    p.add_argument('--rise', type=int, default=None,
                   help='only take a network apart with so many images, and print how far the '
                        'peak rose')
    a = parse(p)
    a.samples, a.kept = a.samples or (500 if a.quick else 2500), a.kept or (20 if a.quick else 200)
    if a.rise: return print(json.dumps(rise(a.rise, a.device, a.width, a.kept)))
    rows = [*memory(a), *time_cohesion(a)]
    keys = list(dict.fromkeys(k for row in rows for k in row))
    keep('decompose', [{k: row.get(k) for k in keys} for row in rows], a)


if __name__ == '__main__': main()
