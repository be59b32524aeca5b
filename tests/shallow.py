"The families of torchvision with the blocks they are made of, but few of them."
from __future__ import annotations
from collections.abc import Callable
from functools import partial
import torch
from torch import nn
from torchvision import models
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet, resnet, vgg

N = 10                  # classes
SIDES = {'alexnet': 64, 'inception_v3': 75}         # pixels; 32 for all others
FAMILIES = [
    'alexnet', 'vgg11', 'vgg11_bn', 'resnet18', 'resnext50_32x4d', 'wide_resnet50_2', 'squeezenet1_1',
    'densenet121', 'googlenet', 'inception_v3', 'shufflenet_v2_x0_5', 'mobilenet_v2', 'mobilenet_v3_small',
    'mnasnet0_5', 'efficientnet_b0', 'efficientnet_v2_s', 'regnet_x_400mf', 'regnet_y_400mf', 'convnext_tiny']


def images(name: str) -> torch.Tensor: # (4, 3, side, side)
    "Random images of a size that a family takes."
    side = SIDES.get(name, 32)
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def skipping(net: nn.Module, *blocks: str) -> nn.Module: # the same network
    "Leave out blocks whose outputs have the shape of their inputs."
    for block in blocks: net.set_submodule(block, nn.Identity())
    return net


def narrow_head(make: Callable[[], nn.Module]) -> nn.Module:
    "A network whose classifier has 64 neurons twice in place of 4,096."
    with torch.device('meta'):
        net = make()
        old = [layer for layer in net.classifier if isinstance(layer, nn.Linear)]
        new = iter([nn.Linear(old[0].in_features, 64), nn.Linear(64, 64), nn.Linear(64, N)])
        layers = [next(new) if isinstance(layer, nn.Linear) else layer for layer in net.classifier]
        net.classifier = nn.Sequential(*layers)
    net = net.to_empty(device='cpu')
    for layer in net.modules():
        if hasattr(layer, 'reset_parameters'): layer.reset_parameters()
    return net


def small_vgg(norm: bool) -> nn.Module:
    features = vgg.make_layers([16, 'M', 24, 24, 'M', 512], batch_norm=norm)
    return vgg.VGG(features, num_classes=N, init_weights=False)


def small_resnet(block: type[nn.Module] = resnet.Bottleneck, **settings: int) -> nn.Module:
    net = resnet.ResNet(block, [1, 2, 1, 1], num_classes=N, **settings)
    net.layer4, net.fc = nn.Identity(), nn.Linear(net.fc.in_features // 2, N)       # half of all channels
    return net


def small_mobilenet_v3() -> nn.Module:
    settings, _ = mobilenetv3._mobilenet_v3_conf('mobilenet_v3_small')
    return mobilenetv3.MobileNetV3(settings[:5], 64, num_classes=N)


def small_mnasnet() -> nn.Module:
    net = models.MNASNet(0.5, num_classes=N)
    for i in range(8, 14): net.layers[i] = net.layers[i][:2]
    return net


def small_efficientnet() -> nn.Module:
    Block = efficientnet.MBConvConfig
    settings = [Block(1, 3, 1, 32, 16, 1), Block(6, 3, 2, 16, 24, 2), Block(6, 5, 2, 24, 40, 1)]
    return efficientnet.EfficientNet(settings, 0.2, num_classes=N)


def small_efficientnet_v2() -> nn.Module:
    Fused, Block = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    settings = [Fused(1, 3, 1, 24, 24, 1), Fused(4, 3, 2, 24, 48, 2), Block(4, 3, 2, 48, 64, 2)]
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    return efficientnet.EfficientNet(settings, 0.2, num_classes=N, norm_layer=norm, last_channel=128)


def small_regnet(**settings: float) -> nn.Module:
    sizes = regnet.BlockParams.from_init_params(6, w_0=24, w_a=24.48, w_m=2.54, group_width=8, **settings)
    return regnet.RegNet(sizes, num_classes=N)


def small_convnext() -> nn.Module:
    Block = convnext.CNBlockConfig
    return convnext.ConvNeXt([Block(16, 32, 1), Block(32, 64, 2), Block(64, None, 1)], num_classes=N)


def small_googlenet() -> nn.Module:
    net = models.GoogLeNet(num_classes=N, aux_logits=False, init_weights=False)
    return skipping(net, 'inception4b', 'inception4c', 'inception5a')


def small_inception() -> nn.Module:
    net = models.Inception3(num_classes=N, aux_logits=False, init_weights=False)
    return skipping(net, 'Mixed_5d', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e', 'Mixed_7c')


MAKERS: dict[str, Callable[[], nn.Module]] = {
    'alexnet': lambda: narrow_head(partial(models.alexnet, num_classes=N)),
    'vgg11': lambda: narrow_head(partial(small_vgg, norm=False)),
    'vgg11_bn': lambda: narrow_head(partial(small_vgg, norm=True)),
    'resnet18': partial(small_resnet, resnet.BasicBlock),
    'resnext50_32x4d': partial(small_resnet, groups=8, width_per_group=8),
    'wide_resnet50_2': partial(small_resnet, width_per_group=48),
    'squeezenet1_1': partial(models.squeezenet1_1, num_classes=N),
    'densenet121': partial(models.DenseNet, 8, (2, 2, 1, 1), 16, num_classes=N),
    'googlenet': small_googlenet,
    'inception_v3': small_inception,
    'shufflenet_v2_x0_5': partial(models.ShuffleNetV2, [2, 2, 2], [24, 48, 96, 192, 128], num_classes=N),
    'mobilenet_v2': partial(models.MobileNetV2, N, inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]]),
    'mobilenet_v3_small': small_mobilenet_v3,
    'mnasnet0_5': small_mnasnet,
    'efficientnet_b0': small_efficientnet,
    'efficientnet_v2_s': small_efficientnet_v2,
    'regnet_x_400mf': small_regnet,
    'regnet_y_400mf': partial(small_regnet, se_ratio=0.25),
    'convnext_tiny': small_convnext}


def full_depth(name: str) -> nn.Module:
    "A family as torchvision makes it (but for the widest classifiers)."
    settings = dict(aux_logits=False, init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    make = partial(models.get_model, name, weights=None, num_classes=N, **settings)
    return narrow_head(make) if name.startswith(('alexnet', 'vgg')) else make()
