"What the tests of bad input share: a scene of data, model, parts and module, and ways to compare files."
from __future__ import annotations
import hashlib, math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from mwt.data.batches import ImageData, from_tensors
from mwt.data.sources import image_data
from mwt.methods.modular import modularize
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.networks import create_model
from mwt.train.fit import fit

NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
nan, inf = math.nan, math.inf


def named(images: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> ImageData:
    "The digits with names that can be mistyped, and with changed images."
    digits = image_data('digits', batch_size=64, device='cpu')
    splits = {name: (images(b.images), b.labels) for name, b in digits.splits().items()}
    return from_tensors(**splits, classes=NAMES, batch_size=64, device='cpu')


def fresh(name: str = 'simcnn', width: float = .1, **changes: Any) -> nn.Module:
    "A small network that has learned nothing."
    return create_model(name, **(dict(num_classes=10, width=width, in_channels=1, seed=0) | changes))


@pytest.fixture(scope='module')
def scene() -> SimpleNamespace:
    "Data, a modular model trained a little, its parts and a module; not to be changed."
    torch.manual_seed(0)
    data = named()
    colour = named(lambda x: x.expand(-1, 3, -1, -1).contiguous())
    model = modularize(fresh(), 10)
    fit(model, data, 2, show_progress=False)
    parts = decompose(model, data.train, show_progress=False)
    module = extract(model, parts, ['one', 'two'])
    return SimpleNamespace(data=data, colour=colour, model=model, parts=parts, module=module)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    "An error that comes after the first step comes too late."
    def late(*args: Any, **kwargs: Any) -> None: raise AssertionError('training began')
    monkeypatch.setattr('mwt.train.fit.train_epoch', late)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    "A copy of the weights."
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def tree(folder: Path) -> dict[str, str]:
    "Every file of a folder with a hash of its content; folders too."
    def content(p: Path) -> str:
        return hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else 'folder'
    return {p.relative_to(folder).as_posix(): content(p) for p in sorted(folder.rglob('*'))}


def picture(path: Path, seed: int = 0, channels: int = 3) -> None:
    "Write an image of noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path)
