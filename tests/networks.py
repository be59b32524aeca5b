"What several tests need: the six networks, random weights that matter, random parts."
from __future__ import annotations
from collections.abc import Callable
from functools import partial
import torch
from shallow import MAKERS
from torch import nn
from mwt.methods.modular import ModularModel, fixed_masks
from mwt.modules.parts import Parts
from mwt.networks import create_model

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{n: partial(create_model, n, width=0.125) for n in ('simcnn', 'rescnn', 'vgg16_bn', 'resnet18')},
    **{f'torchvision/{n}': MAKERS[n] for n in ('vgg11_bn', 'shufflenet_v2_x0_5')}}


@torch.no_grad()
def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    "Give norms and biases values that a trained network could have; fresh ones (0, 1) would hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, .1, generator=generator)
            layer.running_var.uniform_(.5, 1.5, generator=generator)
            layer.weight.uniform_(.8, 1.6, generator=generator)
            layer.bias.normal_(0, .3, generator=generator)
        elif isinstance(layer, nn.Linear):
            layer.weight.normal_(0, 0.8 * layer.in_features**-.5, generator=generator)
            layer.bias.normal_(0, .1, generator=generator)
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:   # no norm brings its output to size
            layer.weight.normal_(0, (2 / layer.weight[0].numel())**.5, generator=generator)
            layer.bias.uniform_(0, .2, generator=generator)
    return net


@torch.no_grad()
def calibrate(model: ModularModel, masks: dict[str, torch.Tensor]) -> None:
    "Give the norms the statistics of the network with these kernels, so that signals keep their usual size."
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d): norm.momentum = 1.0
    x = torch.randn(16, *model.input_shape, generator=torch.Generator().manual_seed(2))
    with fixed_masks(model, masks): model.train()(x.to(next(model.parameters())))
    model.eval()


def random_parts(model: ModularModel, fraction: float | None, seed: int = 0) -> Parts:
    "Parts that keep a random fraction of each layer's kernels, at least one; `None` keeps exactly one."
    generator = torch.Generator().manual_seed(seed)
    n = model.n_classes

    def rows(kernels: int) -> torch.Tensor:
        rows = torch.rand(n, kernels, generator=generator) < (fraction or 0)
        one = int(torch.randint(kernels, (1,), generator=generator))        # the same for all classes
        rows[:, one] = True
        return rows

    if not hasattr(model.masks, 'units_of'): kept = torch.cat([rows(k) for k in model.kernels.values()], 1)
    else:                               # coupled kernels share a mask: draw one for each group of units
        groups = model.masks.gates.groups
        units = torch.ones(n, len(groups) + 1, dtype=torch.bool)
        for group in groups.unique():
            at = (groups == group).nonzero()[:, 0]
            units[:, at] = rows(len(at))
        kept = torch.cat([units[:, model.masks.units_of(name)] for name in model.kernels], 1)
    classes = [f'class {i}' for i in range(n)]
    thresholds = torch.full((n, len(model.kernels)), .9)
    return Parts(classes, model.kernels, kept.double(), kept, thresholds, torch.ones(n), samples=2)
