"""Is a module as fast as its FLOPs promise? The two-class part of a network against the full one.

    python benchmarks/latency.py                                # every network, batch 1 and 256, all modes
    python benchmarks/latency.py --networks simcnn --modes eager
    python benchmarks/latency.py --quick

Networks of `mwt.networks` at full width, with random weights and random gates: every class opens
each unit with probability 0.15, the kernel share that training aims at by default, drawn with a
seed, and at least one unit of each group. The gates of two classes overlap less than training
makes them, so the parts are rather large. Latency does not depend on the weights.

Modes: eager; eager with weights and images in channels-last order; compiled (`torch.compile`, one
shape, whole graph, channels-last); ONNX Runtime (`torch.onnx.export(..., dynamo=True)`, one
shape; the CUDA provider on CUDA, where a build without it is said to be skipped). Inputs and
outputs stay on the device.
Candidates: the module as cut, with norms folded (`fuse=True`), and with norms folded and kernels
rounded up to multiples of 8 and 16 (`round_to`). Each is held against the same full, plain
network with its norms, in the same mode; ONNX Runtime folds the full network's norms by itself,
the other modes do not. So that folding is not taken for cutting, the full network with folded
norms is a candidate too. `ratio` is the share of the latency over the share of the FLOPs, 1 where
time shrinks as FLOPs do. Rounding up raises the share of the FLOPs, so it pays where the share of
the latency falls or stays. Rows go to results/latency.jsonl.
"""
from __future__ import annotations
import copy, logging, warnings
from collections.abc import Callable, Mapping
from typing import Any
import numpy as np
import torch
from torch import Tensor, nn
from bench import arguments, keep, parse
from mwt.methods.modular import ModularModel, modularize, plain
from mwt.data.batches import Batches
from mwt.modules.parts import Parts
from mwt.modules.decompose import decompose
from mwt.modules.module import as_module
from mwt.modules.extract import extract
from mwt.modules.speed import fold_norms
from mwt.core.timing import time_in_turns
from mwt.measure import count_flops
from mwt.networks import create_model

CLASSES = [str(i) for i in range(10)]
VARIANTS: dict[str, dict[str, Any]] = {
    'as cut': {},
    'folded': dict(fuse=True),
    'folded, multiples of 8': dict(fuse=True, round_to=8),
    'folded, multiples of 16': dict(fuse=True, round_to=16)}


@torch.no_grad()
def random_parts(model: ModularModel, krr: float = .15, seed: int = 0) -> Parts:
    "Open units for each class with probability `krr`, at least one a group; take the model apart."
    gates = model.masks.gates
    generator, groups = torch.Generator().manual_seed(seed), gates.groups.cpu()
    draws = torch.rand(gates.gates.shape, generator=generator)
    opened = draws < krr
    for group in groups.unique():
        at = (groups == group).nonzero()[:, 0]
        opened[torch.arange(len(draws)), at[draws[:, at].argmin(1)]] = True
    gates.gates.copy_(opened)
    channels = model.input_shape[0]
    images = torch.zeros(len(draws), *model.input_shape, dtype=torch.uint8)
    batches = Batches(images, torch.arange(len(draws)), CLASSES,
                      mean=torch.full((channels,), .5), std=torch.full((channels,), .25))
    return decompose(model, batches, show_progress=False)        # class gates are read, no image is looked at


def networks_of(name: str, a: Any) -> dict[str, nn.Module]: # the full network first
    "The full network, and the variants of its two-class part."
    net = create_model(name, width=a.width, seed=0)
    model = modularize(net, len(CLASSES), example_input=torch.zeros(1, 3, 32, 32)).to(a.device).eval()
    parts, full = random_parts(model), plain(model).eval()
    variants = {variant: extract(model, parts, CLASSES[:2], **options)
                for variant, options in VARIANTS.items()}
    return {'full': full, 'full, folded': fold_norms(as_module(full, CLASSES, model.input_shape))} | variants


def eager(net: nn.Module, x: Tensor) -> Callable[[], Any]: return lambda: net(x)


def channels_last(
    net: nn.Module, # left as it is: a copy changes
    x: Tensor, # images
    change: Callable[[nn.Module], Callable] = lambda net: net, # of the copy
) -> Callable[[], Any]: # one run
    "Weights and images in channels-last order."
    net = change(copy.deepcopy(net).to(memory_format=torch.channels_last))
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: net(x)


def compiled(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    return channels_last(net, x, lambda net: torch.compile(net, dynamic=False, fullgraph=True))


def onnx(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    "A session of ONNX Runtime, with input and output bound to memory on the device."
    import onnxruntime
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    providers = ['CUDAExecutionProvider'] if x.is_cuda else ['CPUExecutionProvider']
    exported = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(exported, options, providers=providers)
    expected = net(x)
    found = torch.empty_like(expected)
    binding = session.io_binding()
    ends = ((binding.bind_input, session.get_inputs()[0], x),
            (binding.bind_output, session.get_outputs()[0], found))
    for bind, value, tensor in ends:
        bind(value.name, x.device.type, x.device.index or 0, np.float32, tuple(tensor.shape),
             tensor.data_ptr())
    session.run_with_iobinding(binding)
    largest = expected.abs().max().item()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * largest):
        raise RuntimeError('ONNX Runtime computes something else')
    def run() -> tuple[Tensor, Tensor]:
        session.run_with_iobinding(binding)
        return x, found                         # which the binding does not keep alive
    return run


MODES: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {
    'eager': eager, 'channels-last': channels_last, 'compiled': compiled, 'onnx': onnx}


def skipped(mode: str, device: torch.device) -> str: # why, or nothing
    "Can this mode run here?"
    if mode != 'onnx': return ''
    try: import onnx, onnxruntime, onnxscript
    except ImportError as e: return f'{e}; install onnx, onnxscript and onnxruntime'
    if device.type != 'cuda' or 'CUDAExecutionProvider' in onnxruntime.get_available_providers(): return ''
    return 'this onnxruntime has no CUDA provider; install onnxruntime-gpu'


def measure(name: str, nets: Mapping[str, nn.Module], mode: str, batch: int, a: Any) -> list[dict[str, Any]]:
    "One network in one mode: a row a candidate."
    x = torch.randn(batch, 3, 32, 32, device=a.device)
    rounds = a.rounds or (3 if a.quick else 30 if batch == 1 else 7)
    warmup = 3 if batch == 1 else 2
    torch.compiler.reset()
    with torch.no_grad():
        calls = {variant: MODES[mode](net, x) for variant, net in nets.items()}
        times = time_in_turns(calls, a.device, rounds=rounds, warmup=warmup)
    flops = {variant: count_flops(net, x) for variant, net in nets.items()}
    rows = []
    for variant, t in list(times.items())[1:]:
        share = flops[variant] / flops['full']
        rows.append(dict(network=name, batch=batch, mode=mode, variant=variant,
                         seconds_full=times['full']['seconds'], seconds=t['seconds'],
                         low=t['low'], high=t['high'], latency_share=t['ratio'],
                         flop_share=share, ratio=t['ratio'] / share))
    return rows


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--networks', nargs='+', default=None,
                   help='names of mwt.networks; left out: simcnn vgg16_bn resnet18 mobilenet')
    p.add_argument('--width', type=float, default=None,
                   help='of the networks; left out: 1, or 0.125 with --quick')
    p.add_argument('--batches', type=int, nargs='+', default=None,
                   help='images at a time; left out: 1 256, or 1 8 with --quick')
    p.add_argument('--modes', nargs='+', choices=list(MODES), default=None,
                   help='left out: all; with --quick, eager and onnx')
    p.add_argument('--rounds', type=int, default=0,
                   help='timed runs of each; 0: 30 for a single image, 7 for more')
    a = parse(p)
    names = a.networks or (['simcnn'] if a.quick else ['simcnn', 'vgg16_bn', 'resnet18', 'mobilenet'])
    a.width, batches = a.width or (.125 if a.quick else 1.), a.batches or ([1, 8] if a.quick else [1, 256])
    modes = a.modes or (['eager', 'onnx'] if a.quick else list(MODES))
    for mode in modes:
        if why := skipped(mode, a.device): print(f'{mode} is skipped: {why}', flush=True)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)        # the exporter's remarks
    rows = []
    for name in names:
        nets = networks_of(name, a)
        for mode in (m for m in modes if not skipped(m, a.device)):
            for batch in batches: rows += measure(name, nets, mode, batch, a)
            print(f'{name}, {mode}: done', flush=True)
    keep('latency', rows, a)


if __name__ == '__main__': main()
