"""How long does it take to make a network modular, and to cut a module out of it?

    python benchmarks/convert.py                    # every network, about two minutes on two cores
    python benchmarks/convert.py --networks simcnn torchvision/densenet121
    python benchmarks/convert.py --quick

Networks: the smallest member of every family of torchvision's classification networks that has
convolutions to mask, with 10 classes, and those of `mwt.networks` at full width, all with random
weights. Measured are `modularize` (which also looks for an image size that the network accepts)
and `extract` of two classes (which counts the FLOPs of the full network and checks the cut), with
the random gates of `latency.py`. Medians over rounds after one that warms up. Rows go to
results/convert.jsonl.
"""
from __future__ import annotations
from typing import Any
import torchvision
from torch import nn
from bench import arguments, keep, parse
from latency import CLASSES, random_parts
from mwt.methods.modular import modularize
from mwt.modules.extract import extract
from mwt.core.timing import time_in_turns
from mwt.networks import NETWORKS, create_model

FAMILIES = ('alexnet', 'vgg11', 'resnet18', 'resnext50_32x4d', 'wide_resnet50_2', 'squeezenet1_1',
            'densenet121', 'googlenet', 'inception_v3', 'shufflenet_v2_x0_5', 'mobilenet_v2',
            'mobilenet_v3_small', 'mnasnet0_5', 'efficientnet_b0', 'efficientnet_v2_s',
            'regnet_x_400mf', 'regnet_y_400mf', 'convnext_tiny')
SLOW = ('torchvision/googlenet', 'torchvision/inception')      # to initialize their way
NAMES = [*NETWORKS, *(f'torchvision/{name}' for name in FAMILIES)]


def make(name: str) -> nn.Module:
    "A network with random weights."
    if not name.startswith(SLOW): return create_model(name, len(CLASSES), seed=0)
    return torchvision.models.get_model(name.removeprefix('torchvision/'), weights=None,
                                        num_classes=len(CLASSES), init_weights=False)


def measure(name: str, a: Any) -> dict[str, Any]:
    "One network."
    net = make(name).to(a.device)
    model = modularize(net, len(CLASSES))
    parts = random_parts(model)
    work = {'modularize': lambda: modularize(net, len(CLASSES)),
            'extract': lambda: extract(model, parts, CLASSES[:2])}
    times = time_in_turns(work, a.device, rounds=1 if a.quick else 5, warmup=0 if a.quick else 1)
    seconds = [times[step]['seconds'] for step in work]
    return dict(network=name, parameters=sum(p.numel() for p in net.parameters()),
                input='x'.join(map(str, model.input_shape)),
                modularize=seconds[0], extract=seconds[1], total=sum(seconds),
                high=sum(times[step]['high'] for step in work))


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--networks', nargs='+', default=None, choices=NAMES, metavar='NAME',
                   help=f"of {', '.join(NAMES)}; left out: all, or two with --quick")
    a = parse(p)
    names = a.networks or (['simcnn', 'torchvision/shufflenet_v2_x0_5'] if a.quick else NAMES)
    keep('convert', [measure(name, a) for name in names], a)


if __name__ == '__main__': main()
