"""What do the two losses of MwT cost? Forward and backward of `mask_losses`, against looking at all pairs.

    python benchmarks/losses.py             # batch 512, 4,800 kernels in 13 layers, 10 classes: some seconds
    python benchmarks/losses.py --quick     # a small batch

Three forms of the same two numbers, which are checked to agree in values and gradients before they are timed:
- pairs, indexed: for each layer the (batch x batch) table of cosine similarities, of which
  boolean indexing takes the pairs above the diagonal, and of these the pairs of one class and
  those of two; the way of the published method;
- pairs, weighted: the same table, multiplied by weights that are made once a batch; no indexing;
- class sums: `mwt.methods.losses.mask_losses`; no table.
Rows go to results/losses.jsonl; `ratio` is the time over that of the first form.
"""
from __future__ import annotations
from collections.abc import Callable
from itertools import accumulate
import torch
from torch import Tensor
from torch.nn import functional as F
from bench import arguments, keep, parse
from mwt.core.checks import seeded
from mwt.core.timing import time_in_turns
from mwt.methods.losses import mask_losses

SIMCNN = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)       # kernels of its 13 layers
ALPHA, BETA = 0.5, 1.5      # weights of the two losses (paper)
Losses = tuple[Tensor, Tensor]


def indexed(masks: list[Tensor], labels: Tensor, n_classes: int) -> Losses:
    "All pairs; boolean indexing picks them."
    upper = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
    same = (labels[:, None] == labels)[upper]
    cohesion, coupling = [], []
    for mask in masks:
        unit = F.normalize(mask, dim=1)
        alike = (unit @ unit.T)[upper]
        cohesion.append(1 - alike[same].mean())
        coupling.append(alike[~same].mean())
    return torch.stack(cohesion).mean(), torch.stack(coupling).mean()


def weighted(masks: list[Tensor], labels: Tensor, n_classes: int) -> Losses:
    "All pairs; weights pick them."
    upper = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
    same = labels[:, None] == labels
    same, other = (w / w.sum() for w in ((same & upper).float(), (~same & upper).float()))
    total = torch.zeros_like(same)
    for mask in masks:
        unit = F.normalize(mask, dim=1)
        total = total + unit @ unit.T
    return 1 - (total * same).sum() / len(masks), (total * other).sum() / len(masks)


FORMS: dict[str, Callable[..., Losses]] = {
    'pairs, indexed': indexed, 'pairs, weighted': weighted, 'class sums': mask_losses}


def split(kernels: int) -> list[int]:
    "So many kernels, in 13 layers like SimCNN's."
    edges = [0, *(round(n * kernels / sum(SIMCNN)) for n in accumulate(SIMCNN))]
    return [b - a for a, b in zip(edges, edges[1:])]


def step(
    form: Callable[..., Losses], # one of `FORMS`
    masks: list[Tensor], # a layer each: (samples, kernels)
    labels: Tensor, # of the samples
    n_classes: int, # that there are
) -> tuple[Tensor, ...]: # cohesion, coupling, a gradient for each layer
    "Both losses and the gradient of what training adds to the cross-entropy."
    cohesion, coupling = form(masks, labels, n_classes)
    return cohesion, coupling, *torch.autograd.grad(ALPHA * cohesion + BETA * coupling, masks)


def check(masks: list[Tensor], labels: Tensor, n_classes: int) -> None:
    "All forms agree: losses to 1e-4, gradients to 1e-4 of their largest value."
    first, *others = (step(form, masks, labels, n_classes) for form in FORMS.values())
    for name, found in zip(list(FORMS)[1:], others):
        for a, b in zip(found, first):
            largest = b.abs().max() if b.ndim else 1
            assert (a - b).abs().max() <= 1e-4 * largest, f'{name} differs from {list(FORMS)[0]}'


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--batch', type=int, default=None, help='samples; left out: 512, or 64 with --quick')
    p.add_argument('--kernels', type=int, default=None,
                   help='of all layers; left out: 4800, or 480 with --quick')
    p.add_argument('--classes', type=int, default=10)
    a = parse(p)
    batch, kernels = a.batch or (64 if a.quick else 512), a.kernels or (480 if a.quick else 4800)
    with seeded(0):         # masks as a generator makes them: about a third of the kernels off
        masks = [torch.rand(batch, k).sub(.3).relu().to(a.device).requires_grad_() for k in split(kernels)]
        labels = torch.randint(a.classes, (batch,)).to(a.device)
    check(masks, labels, a.classes)
    forms = {name: lambda form=form: step(form, masks, labels, a.classes) for name, form in FORMS.items()}
    found = time_in_turns(forms, a.device, rounds=5 if a.quick else 25)
    about = dict(batch=batch, kernels=kernels, layers=len(SIMCNN), classes=a.classes)
    rows = [dict(form=name) | about | times | dict(faster=1 / times['ratio'])
            for name, times in found.items()]
    keep('losses', rows, a)


if __name__ == '__main__': main()
