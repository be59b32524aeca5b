"What several test files need: where things are, real images, made images, comparisons."
from __future__ import annotations
import hashlib, shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from mwt.channels.costs import CostTable
from mwt.core.signature import weights_of

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
SAMPLE = ROOT/'tests'/'images'/'cifar10-sample.tar.xz'
CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def unpack_sample(folder: str | Path) -> Path:
    "2,000 real CIFAR-10 images, 150 + 50 a class, as `train|test/<class>/*.jpg`; returns `folder`."
    folder = Path(folder)
    shutil.unpack_archive(SAMPLE, folder)
    return folder


def picture(path: Path, seed: int = 0, channels: int = 3, size: tuple[int, int] = (8, 8)) -> None:
    "Write an image of noise; its size is (width, height)."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path)


def pictures(folder: Path, names: Iterable[str], **options: int) -> Path:
    "Write images of noise, each another; returns `folder`."
    for seed, name in enumerate(names): picture(folder/name, seed, **options)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    "Every file of a folder with a hash of its content; folders too."
    def content(p: Path) -> str:
        return hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else 'folder'
    return {p.relative_to(folder).as_posix(): content(p) for p in sorted(folder.rglob('*'))}


def state(model: nn.Module) -> dict[str, Tensor]:
    "A copy of the weights and buffers."
    return {k: v.clone() for k, v in weights_of(model).items()}


def same_state(a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]) -> bool:
    "The same names and the same bits, buffers too."
    a, b = (weights_of(x) if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def same_tensors(a: Iterable, b: Iterable) -> bool:
    "As many tensors, or tuples of tensors, and each the same to the last bit."
    a, b = list(a), list(b)
    if len(a) != len(b): return False
    return all(torch.equal(x, y) if isinstance(x, Tensor) else same_tensors(x, y) for x, y in zip(a, b))


def kernel_costs(kernels: Tensor) -> CostTable:
    "A table for a network of which kernels are counted: (units,) how many there are in each unit."
    writes = torch.cat([kernels.float(), torch.zeros(1)])[:, None]
    return CostTable(torch.zeros_like(writes), writes, torch.zeros(1), torch.ones(1), float(kernels.sum()))
