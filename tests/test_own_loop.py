"The loops that the chapter on `fit` shows to readers train to the same weights as `fit`."
from __future__ import annotations
import json, re
from collections.abc import Callable
from typing import Any
import pytest
import torch
from helpers import NBS
from torch import nn
from mwt.core.signature import weights_of
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.measure import evaluate
from mwt.methods.base import METHODS
from mwt.methods.modular import modularize
from mwt.networks import create_model
from mwt.train.fit import fit
from mwt.train.history import lr_factor

CHAPTER = NBS/'07_train'/'04_fit.ipynb'
EPOCHS = 2

# Until the gates are frozen `fit` trains the whole network, as these loops do.
SETTINGS: dict[str, dict[str, Any]] = dict(composable=dict(closed_by=1.))


@pytest.fixture(scope='module')
def data() -> ImageData:
    digits = image_data('digits', batch_size=64, device='cpu')
    return ImageData(digits.train.sample(384), digits.valid.sample(64), digits.test.sample(64))


def modular(method: str) -> nn.Module:
    "A thin network, whose memory order in training is the usual one."
    net = create_model('resnet18', width=.0625, in_channels=1, seed=0)
    return modularize(net, 10, method, seed=0, **SETTINGS.get(method, {}))


def code_of(pattern: str) -> str:
    "The code of a cell, or of a block inside prose, of the chapter."
    cells = json.loads(CHAPTER.read_text(encoding='utf-8'))['cells']
    found = [code for c in cells for code in blocks(c['cell_type'], ''.join(c['source']))]
    [code] = [code for code in found if re.search(pattern, code, re.M)]
    return code


def blocks(kind: str, source: str) -> list[str]:
    if kind == 'code': return [source]
    return re.findall(r'^```python\n(.*?)^```', source, re.M | re.S)


def names(code: str, **known: Any) -> dict[str, Any]:
    "What the code defines."
    place = dict(torch=torch, nn=nn, Tensor=torch.Tensor, ImageData=ImageData, lr_factor=lr_factor) | known
    exec(compile(code, CHAPTER.name, 'exec'), place)
    return place


def differences(a: nn.Module, b: nn.Module) -> float:
    "The largest difference of a weight or buffer."
    theirs = weights_of(b)
    return max((t.double() - theirs[name].double()).abs().max().item() for name, t in weights_of(a).items())


@pytest.mark.parametrize('method', [
    pytest.param(method, marks=[pytest.mark.slow] * (method == 'moda')) for method in METHODS])
def test_plain_loop(method: str, data: ImageData) -> None:
    mine, theirs = modular(method), modular(method)
    loop: Callable = names(code_of('^def train_myself'))['train_myself']
    with torch.random.fork_rng(devices=[]): loop(mine, data, EPOCHS)
    history = fit(theirs, data, EPOCHS, show_progress=False)
    if history.best_epoch == EPOCHS: assert differences(mine, theirs) <= 1e-5
    assert evaluate(mine, data.valid) == pytest.approx(history.series('valid_accuracy')[-1], abs=1e-6)


@pytest.mark.filterwarnings('ignore')                       # of Lightning, about its own dependencies
def test_lightning(data: ImageData, tmp_path: Any) -> None:
    lightning = pytest.importorskip('lightning')
    mine, theirs = modular('composable'), modular('composable')
    code = code_of('^import lightning$').split('\nlightning.seed_everything')[0]
    layer = names(code)['Modular'](mine, EPOCHS * len(data.train))
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator='cpu', devices=1,
                                default_root_dir=tmp_path, **silent)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer.fit(layer, data.train.seed(0))
    history = fit(theirs, data, EPOCHS, show_progress=False)
    assert trainer.global_step == EPOCHS * len(data.train)
    assert history.best_epoch == EPOCHS, 'until gates are frozen the latest epoch is kept'
    assert differences(mine, theirs) <= 1e-4
    assert evaluate(mine, data.valid) == history.series('valid_accuracy')[-1]
