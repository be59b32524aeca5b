"""The whole way, timed: train a modular ResNet18, take it apart, cut it up, evaluate everything.

    python benchmarks/end_to_end.py --data FOLDER       # full width on CUDA; thin, minutes on a CPU
    python benchmarks/end_to_end.py --data FOLDER --epochs 60 --target-krr 0.1
    python benchmarks/end_to_end.py --data FOLDER --quick

FOLDER holds train/<class>/* and test/<class>/*; CIFAR-10 for the figures that are kept. Decoding
the images (once, kept) and starting Python are not counted; all else is: moving data and network
to the device, converting, training, decomposing, extracting one module a class, and evaluating
the full model and the ten modules. How good the modules are is seen on all pairs of classes:
`accuracy_2` is the mean over them; that time stands apart (`seconds_pairs`). Rows go to
results/end_to_end.jsonl.
"""
from __future__ import annotations
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any
import torch
from bench import arguments, keep, parse
from mwt.methods.modular import ModularModel, modularize, plain
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.core.timing import wait_for
from mwt.measure import count_params, evaluate
from mwt.networks import create_model
from mwt.train.fit import fit


def timed(times: dict[str, float], name: str, device: torch.device, work: Callable[[], Any]) -> Any:
    "Do it, and write down how long it took."
    wait_for(device)
    start = time.perf_counter()
    found = work()
    wait_for(device)
    times[name] = time.perf_counter() - start
    return found


def main() -> None:
    p = arguments(__doc__)
    p.add_argument('--data', type=Path, required=True,
                   help='a folder of images with train/<class>/* and test/<class>/*')
    p.add_argument('--root', default='data', help='decoded images are kept here')
    p.add_argument('--network', default='resnet18', help='of mwt.networks')
    p.add_argument('--method', default='composable', help='composable, mwt')
    p.add_argument('--width', type=float, default=None,
                   help='left out: 1 on CUDA, else 0.125; with --quick 0.05')
    p.add_argument('--epochs', type=int, default=None, help='left out: 40 on CUDA, else 4; with --quick 2')
    p.add_argument('--batch', type=int, default=None, help='left out: 512 on CUDA, else 64; with --quick 16')
    p.add_argument('--target-krr', type=float, default=None, help="composable; left out: the method's own")
    p.add_argument('--lr', type=float, default=None,
                   help='peak learning rate; left out: 0.4 on CUDA, else 0.05')
    p.add_argument('--seed', type=int, default=0, help='of everything')
    a = parse(p)
    cuda = a.device.type == 'cuda'
    width, epochs, batch = (.05, 2, 16) if a.quick else (1., 40, 512) if cuda else (.125, 4, 64)
    width = a.width or width
    epochs = a.epochs or epochs
    batch = a.batch or batch
    lr = a.lr or (.4 if cuda else .05)
    settings = {} if a.target_krr is None else dict(target_krr=a.target_krr)
    image_data(a.data, root=a.root, batch_size=batch, device='cpu')         # decoded and kept, or read
    times: dict[str, float] = {}
    def load() -> ImageData:
        return image_data(a.data, root=a.root, batch_size=batch, device=a.device, seed=a.seed)
    data = timed(times, 'data', a.device, load)
    net = create_model(a.network, data.n_classes, width, data.channels, seed=a.seed)
    def convert() -> ModularModel:
        return modularize(net, data.n_classes, a.method, torch.zeros(1, *data.shape), **settings)
    model = timed(times, 'modularize', a.device, convert)
    recipe = dict(lr=lr, weight_decay=5e-4, warmup=.15, seed=a.seed, amp=cuda or None)
    timed(times, 'train', a.device, lambda: fit(model, data, epochs, **recipe))
    parts = timed(times, 'decompose', a.device, lambda: decompose(model, data.train))
    modules = timed(times, 'extract', a.device, lambda: [extract(model, parts, [c]) for c in data.classes])
    full = timed(times, 'evaluate', a.device, lambda: [evaluate(m, data.test) for m in [model, *modules]])[0]
    pairs = list(combinations(range(data.n_classes), 2))[:3 if a.quick else None]
    def two() -> list[float]: return [evaluate(extract(model, parts, pair), data.test) for pair in pairs]
    accuracies = timed(times, 'pairs', a.device, two)
    whole = extract(model, parts, data.classes)
    size = count_params(plain(model))
    row = dict(network=a.network, width=width, method=a.method, epochs=epochs, batch=batch,
               seed=a.seed, lr=lr, accuracy=full, krr=parts.kept.double().mean().item(),
               accuracy_2=sum(accuracies) / len(pairs), accuracy_10=evaluate(whole, data.test),
               params_1=sum(map(count_params, modules)) / len(modules) / size,
               params_10=count_params(whole) / size, **{f'seconds_{k}': v for k, v in times.items()},
               seconds=sum(v for k, v in times.items() if k != 'pairs'))
    keep('end_to_end', [row], a)


if __name__ == '__main__': main()
