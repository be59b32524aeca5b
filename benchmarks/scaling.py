"""How does the cost of a training step grow? Plain, composable and mwt, against classes, kernels,
batch and depth.

    python benchmarks/scaling.py            # thin on a CPU, three minutes on two cores; full on CUDA
    python benchmarks/scaling.py --quick

A step is that of `fit`: forward, loss, backward, optimizer, and what the method learns from the
gradients; on random images that are on the device already. Composable is caught while its gates
close, when it has most to do besides computing; gates are set anew in every step here, in
training in every eighth. At every point the three are timed in turns; `ratio` is the step over
plain's at that point. `growth` is the step over the same method's at the axis' first point, timed
in turns too, eight steps at a time, on the axis of classes.

Beside each time stands what there is to do:
- `flops`: of forward and backward, counted by PyTorch;
- `params`, `saved`: bytes of the parameters, and of all other tensors that forward keeps for
  backward, each storage once;
- `bytes`: what must move at least: parameters 8 times (read forward and backward; gradients
  written, then read by the optimizer; momentum and parameters read and written), kept tensors
  twice (written, read);
- `peak`: bytes allocated at most during the step (CUDA only);
and what the machine can do, measured in the same run: `peak_flops` of a large matrix product or
convolution in the step's dtype, whichever is faster, `bandwidth` of a large copy (bytes read and
written). `limit` is the longer of the two times that follow, in seconds.
Rows go to results/scaling.jsonl.
"""
from __future__ import annotations
from collections.abc import Callable, Iterator
from typing import Any
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from bench import arguments, keep, parse
from mwt.core.nets import memory_format
from mwt.methods.modular import ModularModel, modularize
from mwt.core.checks import seeded
from mwt.methods.composable import SET_EVERY
from mwt.core.timing import time_in_turns
from mwt.networks import conv_block, create_model, init_convs
from mwt.train.history import TrainConfig
from mwt.train.trainer import training_loss

METHODS = ('plain', 'composable', 'mwt')
PROGRESS = 0.3      # of the run: composable's gates are closing, most samples have sets of their own
SIZES: dict[str, dict[str, Any]] = {
    'quick': dict(width=.1, batch=16, channels=8, blocks=4, rounds=3, product=512, copy=2**22,
                  axes=dict(classes=(10, 100), width=(.1, .2), batch=(16, 32), depth=(4, 8))),
    'cpu': dict(width=.25, batch=128, channels=32, blocks=8, rounds=9, product=2048, copy=2**26,
                axes=dict(classes=(10, 100, 1000), width=(.125, .25, .375, .5),
                          batch=(32, 64, 128, 256), depth=(4, 8, 16, 32))),
    'cuda': dict(width=1., batch=512, channels=256, blocks=16, rounds=25, product=8192, copy=2**30,
                 axes=dict(classes=(10, 100, 1000), width=(.25, .5, 1., 2.),
                           batch=(128, 256, 512, 1024, 2048), depth=(8, 16, 32, 64)))}


class Chain(nn.Sequential):
    "Convolutions of one size in a row, at half the image's resolution."
    def __init__(self, num_classes: int, channels: int, blocks: int) -> None:
        super().__init__(conv_block(3, channels, stride=2),
                         *(conv_block(channels, channels) for _ in range(blocks - 1)),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        init_convs(self)


class Step:
    "A network with everything that a training step needs; call it to make one."
    def __init__(self, method: str, size: dict[str, Any], device: torch.device, amp: bool) -> None:
        with seeded(0):
            net = (Chain(size['classes'], size['channels'], size['depth']) if 'depth' in size else
                   create_model('simcnn', size['classes'], size['width']))
            images = torch.randn(size['batch'], 3, 32, 32)
            self.labels = torch.randint(size['classes'], (size['batch'],)).to(device)
        model = net if method == 'plain' else modularize(net, size['classes'], method, images[:1])
        self.kernels = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
        format = memory_format(model.to(device), images.to(device))
        self.model, self.amp = model.to(memory_format=format).train(), amp
        self.images = images.to(device, memory_format=format)
        config, self.done = TrainConfig(), 0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=config.momentum,
                                         nesterov=True, fused=True)

    def backward(self) -> None:
        "Forward, loss and backward."
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.amp):
            loss, _ = training_loss(self.model, self.images, self.labels, PROGRESS)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        if isinstance(self.model, ModularModel):
            self.model.method.after_backward(self.model, self.labels, PROGRESS, self.done)


def storage(t: Tensor) -> tuple[int, int]: return t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()


def work(step: Step) -> dict[str, float]:
    "What there is to do in a step: FLOPs, bytes."
    weights = dict(storage(t) for t in step.model.state_dict().values())
    alive, found = [], {}
    def pack(t: Tensor) -> Tensor:
        alive.append(t)             # so that no later tensor takes its place
        if t.untyped_storage().nbytes(): found.update([storage(t)])
        return t
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with FlopCounterMode(display=False) as counter, hooks: step.backward()
    params = sum(p.nbytes for p in step.model.parameters())
    saved = sum(n for at, n in found.items() if at not in weights)
    return dict(flops=counter.get_total_flops(), params=params, saved=saved, bytes=8 * params + 2 * saved)


def peak(step: Step) -> int | None:
    "Bytes that are allocated at most during a step; other networks' are not there."
    device = step.images.device
    if device.type != 'cuda': return None
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def machine(
    device: torch.device, # what is measured
    dtype: torch.dtype, # of the numbers
    product: int, # rows and columns of the matrices that are multiplied
    copy: int, # bytes that are copied
) -> dict[str, float]: # upper quartiles
    "FLOP/s of a matrix product or of a convolution with as many, the faster; bytes/s of a copy."
    a, b = (torch.randn(product, product, device=device, dtype=dtype) for _ in range(2))
    n = -(-product**3 // (9 * 256**2 * 32**2))
    images = torch.randn(n, 256, 32, 32, device=device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    kernels = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    source, target = (torch.zeros(copy, dtype=torch.uint8, device=device) for _ in range(2))
    calls = {'product': lambda: torch.mm(a, b),
             'convolution': lambda: F.conv2d(images, kernels, padding=1),
             'copy': lambda: target.copy_(source)}
    found = time_in_turns(calls, device, rounds=9)
    flops = (2 * product**3 / found['product']['low'],
             2 * len(images) * 9 * 256**2 * 32**2 / found['convolution']['low'])
    return dict(peak_flops=max(flops), bandwidth=2 * copy / found['copy']['low'])


def points(sizes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    "Along each axis, everything else at its usual size."
    usual = dict(classes=10, width=sizes['width'], batch=sizes['batch'])
    chain = dict(classes=10, batch=sizes['batch'], channels=sizes['channels'])
    for axis, values in sizes['axes'].items():
        others = chain if axis == 'depth' else usual
        for value in values: yield axis, others | {axis: value}


def measure(
    axis: str, # what varies
    size: dict[str, Any], # the point
    make: Callable[..., Step], # from a method and a size
    facts: dict[str, float], # what the machine can do
    rounds: int, # that count
) -> list[dict[str, Any]]: # rows
    "Three rows: each method at one point."
    about = {}
    for method in METHODS:          # one after the other, so that the peak is that of one network
        step = make(method, size)
        about[method] = dict(kernels=step.kernels, peak=peak(step)) | work(step)
        del step
    steps = {method: make(method, size) for method in METHODS}
    rows = []
    for method, times in time_in_turns(steps, steps['plain'].images.device, rounds, warmup=2).items():
        todo, seconds = about[method], times['seconds']
        limit = max(todo['flops'] / facts['peak_flops'], todo['bytes'] / facts['bandwidth'])
        reached = dict(achieved=todo['flops'] / seconds, limit=limit, of_limit=limit / seconds)
        rows.append(dict(axis=axis, value=size[axis], method=method) | times | todo | facts | reached |
                    {k: size.get(k) for k in ('classes', 'width', 'batch', 'depth')})
    return rows


def growth(
    sizes: dict[str, Any], # one of `SIZES`
    make: Callable[..., Step], # from a method and a size
    device: torch.device, # where the steps run
) -> dict[tuple[str, int], float]: # by method and number of classes
    "Each method's step with more classes over its step with the fewest, in turns."
    along, found = [size for axis, size in points(sizes) if axis == 'classes'], {}
    def several(step: Step) -> Callable[[], None]:
        def run() -> None:
            for step.done in range(SET_EVERY): step()
        return run
    for method in METHODS:
        steps = {size['classes']: several(make(method, size)) for size in along}
        timed = time_in_turns(steps, device, sizes['rounds'], warmup=1)
        found |= {(method, n): times['ratio'] for n, times in timed.items()}
    return found


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--amp', choices=('auto', 'yes', 'no'), default='auto',
                   help='bfloat16; auto: as fit, on CUDA only')
    a = parse(p)
    sizes = SIZES['quick' if a.quick else a.device.type]
    amp = a.device.type == 'cuda' if a.amp == 'auto' else a.amp == 'yes'
    dtype = torch.bfloat16 if amp else torch.float32
    found = machine(a.device, dtype, sizes['product'], sizes['copy'])
    facts = dict(dtype=str(dtype).removeprefix('torch.'), **found)
    make = lambda method, size: Step(method, size, a.device, amp)
    rows = [row for axis, size in points(sizes) for row in measure(axis, size, make, facts, sizes['rounds'])]
    grown = growth(sizes, make, a.device)
    for row in rows:
        row['growth'] = None
        if row['axis'] == 'classes': row['growth'] = grown.get((row['method'], row['classes']))
    keep('scaling', rows, a)


if __name__ == '__main__': main()
