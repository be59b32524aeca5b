"What several tests need: the six networks, random weights that matter, random parts."
from __future__ import annotations
from collections.abc import Callable
import torch
import torchvision
from torch import nn
from mwt.convert import ModularModel, fixed_masks
from mwt.decompose import Parts
from mwt.models import create_model

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: create_model(name, width=0.25) for name in ('simcnn', 'rescnn', 'vgg16_bn', 'resnet18')},
    'torchvision/vgg11_bn': lambda: torchvision.models.vgg11_bn(weights=None, num_classes=10),
    'torchvision/resnet18': lambda: torchvision.models.resnet18(weights=None, num_classes=10)}


@torch.no_grad()
def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    "Give norms and biases values that a trained network could have; fresh ones (0 and 1) would hide mistakes."
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
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:        # no norm will bring its output to size
            layer.weight.normal_(0, (2 / layer.weight[0].numel())**.5, generator=generator)
            layer.bias.uniform_(0, .2, generator=generator)
    return net


@torch.no_grad()
def calibrate(model: ModularModel, masks: dict[str, torch.Tensor]) -> None:
    "Give the norms the statistics of the network with these kernels, so that signals reach the end at their usual size."
    norms, generator = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], torch.Generator().manual_seed(2)
    for norm in norms: norm.momentum = 1.0
    with fixed_masks(model, masks): model.train()(torch.randn(16, *model.input_shape, generator=generator).to(next(model.parameters())))
    model.eval()


def random_parts(model: ModularModel, share: float | None, seed: int = 0) -> Parts:
    "Modules that keep a random share of the kernels of each layer, at least one; `None` keeps exactly one."
    generator, sizes = torch.Generator().manual_seed(seed), model.kernels
    def rows(kernels: int) -> torch.Tensor:
        rows = torch.rand(model.n_classes, kernels, generator=generator) < (share or 0)
        one = torch.randint(kernels, (1,), generator=generator).expand(model.n_classes)     # the same for all classes
        rows[torch.arange(model.n_classes), one] = True
        return rows
    if model.gates is None: modules = torch.cat([rows(k) for k in sizes.values()], 1)
    else:                               # kernels that hang together share a mask: draw one for each group of units
        units = torch.ones(model.n_classes, model.gates.n_units + 1, dtype=torch.bool)
        for group in model.gates.groups.unique():
            at = (model.gates.groups == group).nonzero()[:, 0]
            units[:, at] = rows(len(at))
        modules = torch.cat([units[:, model.unit[model.channels.layers[name].writes]] for name in sizes], 1)
    return Parts([f'class {i}' for i in range(model.n_classes)], sizes, modules.double(), modules,
                 torch.full((model.n_classes, len(sizes)), .9), torch.ones(model.n_classes), 2)
