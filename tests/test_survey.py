"""Networks of torchvision and timm as they come: made modular, trained for a step, cut, loaded, or refused.

A handful of the survey in `benchmarks/families.py`, with its means: all of its networks take ten minutes.
timm is one of the requirements for development, so these tests are never skipped.
"""

from __future__ import annotations
import sys
from collections.abc import Callable
import pytest
import torch
from helpers import ROOT
from torch import nn
from torchvision import models
from mwt.methods.modular import modularize

sys.path.insert(0, str(ROOT / 'benchmarks'))
from families import make, survey

SMALL: dict[str, Callable[[], nn.Module]] = {  # families without a small member
    'swin': lambda: models.SwinTransformer([2, 2], 12, [1, 2], [2, 3], [4, 4], num_classes=10),
    'swin_v2': lambda: models.SwinTransformer(
        [2, 2], 12, [2], [2], [4, 4], num_classes=10,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2),
    'maxvit': lambda: models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.1, num_classes=10),
    'vit': lambda: models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10),
}
EXACT = {  # network -> pixels
    **dict.fromkeys(SMALL, 32),
    'torchvision/shufflenet_v2_x0_5': 32,
    'torchvision/squeezenet1_1': 32,
    'torchvision/mnasnet0_5': 32,
    'timm/lcnet_050': 32,
    'timm/convnext_atto': 32,
    'timm/ghostnet_100': 32,
}
# Small ones of the same families are in test_channels; GhostNet is the deepest here.
DEEP = {
    'torchvision/shufflenet_v2_x0_5', 'torchvision/squeezenet1_1', 'timm/convnext_atto', 'timm/ghostnet_100'}


def made(name: str) -> nn.Module:
    return SMALL[name]() if name in SMALL else make(name)


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * (n in DEEP)) for n in EXACT])
def test_exact_to_the_end(name: str) -> None:
    row = survey(name, EXACT[name], made)
    assert row['verdict'] == 'exact', row
    assert row['masked'] > 0 and row['kept'] < 1


@pytest.mark.parametrize('name, reason', [
    ('timm/mambaout_femto', 'split cuts it at constant places'),
    ('timm/hgnetv2_b0', 'behind add, which turns zeros into something else')])
def test_refused_at_once(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf'no layer is left to mask \(.*{reason}'):
        modularize(make(name), 10, example_input=torch.randn(2, 3, 32, 32))


def test_side_exits_stay_whole() -> None:
    model = modularize(make('torchvision/googlenet'), 10, example_input=torch.randn(2, 3, 32, 32))
    assert 'aux1.conv.conv runs in training only' in {i.reason for i in model.channels.infos}
