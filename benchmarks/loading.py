"""How many images a second arrive at the device?

Decoded, cropped, mirrored, normalised, in batches of floats.

    python benchmarks/loading.py --data FOLDER              # a few minutes on two cores
    python benchmarks/loading.py --data FOLDER --quick      # seconds, to see that it works

FOLDER holds images of one size as train/<class>/*; CIFAR-10 for the figures that are kept. Candidates:

- torchvision, in memory: a Dataset over a uint8 array that gives PIL images, as
  torchvision.datasets.CIFAR10 does; the others are held against it
- torchvision, files: torchvision.datasets.ImageFolder
- mwt, resident: Batches of one tensor on the device
- mwt, streaming: Batches of files

Torchvision's transforms are v2: RandomCrop with 4 pixels of padding, RandomHorizontalFlip,
ToImage, ToDtype, Normalize. All but the resident one read ahead by the same number of worker
processes, with pinned memory on CUDA. Torchvision's workers live on from epoch to epoch; those of
mwt are started for each. Every round is one epoch of all images for each.
"""
from __future__ import annotations
import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
import bench                                # makes the package importable from a plain checkout
import numpy as np
import torch
from mwt.data.augment import Augment
from mwt.data.batches import Batches
from mwt.data.folders import cached_images, list_images
from mwt.data.streams import image_files
from mwt.core.timing import time_in_turns
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

PAD = 4


class InMemory(Dataset):
    "Images of one array, as PIL images; like `torchvision.datasets.CIFAR10`, without its download."
    def __init__(self,
        images: np.ndarray, # (images, height, width, 3) uint8
        labels: list[int], # one for each
        transform: Callable, # of an image
    ) -> None: self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int: return len(self.images)
    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def loader_of(data: Dataset, a: argparse.Namespace) -> DataLoader:
    "What people write."
    return DataLoader(data, a.batch, shuffle=True, drop_last=True, num_workers=a.workers,
                      pin_memory=a.device.type == 'cuda', persistent_workers=a.workers > 0)


def epoch(batches: Iterable, a: argparse.Namespace) -> Callable[[], None]:
    "One epoch, each batch on the device as floats."
    def run() -> None:
        for images, labels in batches:
            images, labels = images.to(a.device, non_blocking=True), labels.to(a.device, non_blocking=True)
        assert images.device.type == labels.device.type == a.device.type
        assert images.dtype == torch.float32
        assert len(images) == a.batch
    return run


def candidates(
    a: argparse.Namespace, # the options
) -> tuple[dict[str, Callable[[], None]], int]: # what is timed, by name; images in an epoch
    "Four ways to the same batches, up to the random numbers."
    classes, listing = list_images(a.data)
    if 'train' not in listing: raise SystemExit(f'{a.data} has no train/<class>/*; put the images there')
    files = listing['train']
    n = min(a.images or len(files), len(files)) // a.batch * a.batch
    if not n: raise SystemExit(f'{a.data} has fewer than {a.batch} images; take a smaller --batch')
    rows = np.arange(n) * len(files) // n
    labels = torch.tensor([f.label for f in files])[rows]
    images = cached_images(a.data, files, a.root)[rows]
    ours = lambda images: Batches(images.to(a.device), labels, classes, a.batch, shuffle=True,
                                  augment=Augment(pad=PAD))
    resident = ours(images)
    streaming = ours(image_files([a.data/files[i].path for i in rows], workers=a.workers))
    transform = v2.Compose([v2.RandomCrop(images.shape[-2:], padding=PAD),
                            v2.RandomHorizontalFlip(),
                            v2.ToImage(),
                            v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(resident.mean.tolist(), resident.std.tolist())])
    arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    in_memory = InMemory(arrays, labels.tolist(), transform)
    in_files = Subset(ImageFolder(str(a.data/'train'), transform), rows.tolist())
    loaders = {'torchvision, in memory': loader_of(in_memory, a),
               'torchvision, files': loader_of(in_files, a),
               'mwt, resident': resident, 'mwt, streaming': streaming}
    return {name: epoch(loader, a) for name, loader in loaders.items()}, n


def main() -> None:
    p = bench.arguments(__doc__)
    p.add_argument('--data', type=Path, required=True, help='a folder of images with train/<class>/*')
    p.add_argument('--root', default='data', help='decoded images are kept here')
    p.add_argument('--batch', type=int, default=None,
                   help='images in a batch; left out: 128, with --quick 32')
    p.add_argument('--workers', type=int, default=2, help='processes that read ahead')
    p.add_argument('--images', type=int, default=None,
                   help='how many, spread evenly; left out: all, with --quick 320')
    p.add_argument('--rounds', type=int, default=None, help='that count; left out: 5, with --quick 2')
    a = bench.parse(p)
    short = dict(batch=32, images=320, rounds=2) if a.quick else dict(batch=128, images=0, rounds=5)
    for k, v in short.items(): setattr(a, k, v if getattr(a, k) is None else getattr(a, k))
    work, n = candidates(a)
    times = time_in_turns(work, a.device, a.rounds, warmup=1)
    rows = []
    for name, t in times.items():
        workers = 0 if name == 'mwt, resident' else a.workers
        rows.append(dict(loader=name, images=n, batch=a.batch, workers=workers,
                         seconds=t['seconds'], low=t['low'], high=t['high'],
                         images_per_second=n / t['seconds'], speedup=1 / t['ratio']))
    bench.keep('loading', rows, a)


if __name__ == '__main__': main()
