"""Which networks can be made modular, and are they exact to the end?

    python benchmarks/families.py                       # every family, about ten minutes on two cores
    python benchmarks/families.py --networks timm/efficientnet_b0 torchvision/googlenet
    python benchmarks/families.py --quick

One small network of each convolutional family of timm, at 64 pixels, and of each classification
family of torchvision, as they come (GoogLeNet and Inception with their side exits), with 10
classes and random weights that matter. Each is made modular, takes a step of training, is cut for
two classes with random masks, compared with the masked model in float64, saved and loaded.

Verdicts: `exact` to the end; `refused` by `modularize`, with what it says; `late`, an error or a
difference in a later step. Masked is the fraction of all kernels that can be removed. Rows go to
results/families.jsonl.
"""

from __future__ import annotations
import time
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
import torch
import torchvision
from torch import Tensor, nn
from bench import arguments, keep, parse
from latency import CLASSES, random_parts
from mwt.core.signature import normalise
from mwt.methods.modular import ModularModel, fixed_masks, modularize
from mwt.modules.extract import extract
from mwt.modules.module import load_module, save_module
from mwt.modules.parts import union_masks

SIDE = 64  # pixels
SIDES = {
    'torchvision/inception_v3': 299,
    'timm/inception_v3': 96,
    'timm/inception_v4': 96,
    'timm/inception_resnet_v2': 96,
    'timm/legacy_xception': 96,
    'timm/efficientformer_l1': 224,
}
TIMM = (
    'resnet10t',
    'resnetv2_18',
    'seresnet18',
    'skresnet18',
    'resnest14d',
    'res2net50_14w_8s',
    'eca_resnext26ts',
    'regnety_002',
    'nf_regnet_b0',
    'densenet121',
    'dla46_c',
    'dpn48b',
    'hrnet_w18_small',
    'ese_vovnet19b_slim',
    'cspresnet50',
    'cs3darknet_s',
    'vgg11_bn',
    'inception_v3',
    'legacy_xception',
    'xception41',
    'selecsls42b',
    'tresnet_m',
    'rexnet_100',
    'hardcorenas_a',
    'lcnet_050',
    'fbnetv3_b',
    'mobilenetv2_100',
    'mobilenetv3_small_050',
    'mobilenetv4_conv_small',
    'efficientnet_b0',
    'mixnet_s',
    'tinynet_e',
    'ghostnet_100',
    'repghostnet_050',
    'mobileone_s0',
    'repvgg_a0',
    'repvit_m0_9',
    'fasternet_t0',
    'starnet_s1',
    'hgnetv2_b0',
    'convnext_atto',
    'inception_next_atto',
    'convmixer_768_32',
    'mambaout_femto',
    'edgenext_xx_small',
    'mobilevit_xxs',
    'mobilevitv2_050',
    'levit_128s',
    'efficientformer_l1',
    'efficientvit_b0',
    'efficientvit_m0',
    'fastvit_t8',
    'poolformer_s12',
    'rdnet_tiny',
    'swiftformer_xs',
    'shvit_s1',
)
TORCHVISION = (
    'alexnet',
    'vgg11',
    'vgg11_bn',
    'resnet18',
    'resnext50_32x4d',
    'wide_resnet50_2',
    'squeezenet1_1',
    'densenet121',
    'googlenet',
    'inception_v3',
    'shufflenet_v2_x0_5',
    'mobilenet_v2',
    'mobilenet_v3_small',
    'mnasnet0_5',
    'efficientnet_b0',
    'efficientnet_v2_s',
    'regnet_x_400mf',
    'regnet_y_400mf',
    'convnext_tiny',
    'maxvit_t',
    'swin_t',
    'swin_v2_t',
    'vit_b_16',
)
NAMES = [*(f'timm/{n}' for n in TIMM), *(f'torchvision/{n}' for n in TORCHVISION)]
QUICK = ('timm/lcnet_050', 'torchvision/shufflenet_v2_x0_5')
FIXED = {
    'timm/levit_128s': dict(img_size=SIDE),
    'timm/efficientvit_m0': dict(img_size=SIDE),
    'torchvision/maxvit_t': dict(input_size=(224, 224)),
}
SIDES |= {'torchvision/maxvit_t': 224, 'torchvision/vit_b_16': 224, 'timm/efficientvit_m0': 64}


def make(name: str) -> nn.Module:
    "A network as its library makes it, with random weights."
    library, _, family = name.partition('/')
    settings = FIXED.get(name, {})
    if library == 'torchvision':
        if family in ('googlenet', 'inception_v3'):
            settings = dict(init_weights=False)
        if family == 'maxvit_t':
            settings = {}
        return torchvision.models.get_model(family, weights=None, num_classes=len(CLASSES), **settings)
    import timm

    return timm.create_model(family, num_classes=len(CLASSES), **settings)


@torch.no_grad()
def enlivened(net: nn.Module, seed: int = 0) -> nn.Module:  # the same network
    "Give norms and biases values as training would; fresh ones, 0 and 1, hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None:
            layer.weight.uniform_(0.8, 1.6, generator=generator)
            layer.bias.normal_(0, 0.3, generator=generator)
        elif getattr(layer, 'bias', None) is not None and isinstance(layer.bias, nn.Parameter):
            layer.bias.uniform_(-0.1, 0.2, generator=generator)
    for name, p in net.named_parameters():
        if name.endswith(('gamma', 'layer_scale', 'ls1', 'ls2')):
            p.fill_(0.5)
    return net


def step(model: ModularModel, x: Tensor) -> None:
    "A step of training."
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.arange(len(x))
    model.train()
    loss, _ = model.training_loss(x, labels)
    loss.backward()
    model.after_backward(labels)
    optimizer.step()
    if not loss.isfinite():
        raise ValueError(f'the loss is {loss}')
    model.eval()


@torch.no_grad()
def calibrate(model: ModularModel, masks: dict[str, Tensor], x: Tensor) -> None:
    "Statistics of the masked network, so that signals keep their size down to the answer."
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    moments = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with fixed_masks(model, masks):
        model.train()(x)
    for norm, momentum in zip(norms, moments):
        norm.momentum = momentum
    model.eval()


def compare(model: ModularModel, x: Tensor) -> tuple[float, float]:  # difference, parameters kept
    "Cut two classes out in float64, save and load; the largest difference over the size of the answers."
    model, x = model.double().eval(), x.double()
    parts = random_parts(model, 0.5)
    masks = union_masks(parts, [2, 7])
    calibrate(model, masks, x)
    module = extract(model, parts, [2, 7])
    with TemporaryDirectory() as folder:
        loaded = load_module(save_module(module, f'{folder}/module.safetensors'))
    pixels = x.sigmoid()
    images = normalise(pixels, module.pixel_mean, module.pixel_std)
    with torch.no_grad(), fixed_masks(model, masks):
        expected = model(images)[:, [2, 7]]
    with torch.no_grad():
        answers = [m(pixels) for m in (module, loaded)]
    if expected.std(0).max() < 1e-9 * expected.abs().max():
        raise ValueError('the comparison is empty')
    errors = [((a - expected).abs().max() / expected.abs().max()).item() for a in answers]
    kept = sum(p.numel() for p in module.parameters())
    return max(errors), kept / sum(p.numel() for p in model.plain().parameters())


def survey(
    name: str,  # of the network, in its row
    side: int,  # of the images, pixels
    make: Callable[[str], nn.Module] = make,  # the network by its name; it has 10 classes
) -> dict[str, Any]:
    "A row for one network."
    torch.manual_seed(0)
    row = dict(network=name, side=side, verdict='refused', masked=0.0, kept=1.0, error=0.0, said='')
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    try:
        model = modularize(enlivened(make(name)), len(CLASSES), example_input=x)
        row['verdict'] = 'late'
        row['masked'] = removable(model)
        step(model, x)
        row['error'], row['kept'] = compare(model, x)
        if row['error'] < 1e-9:
            row['verdict'] = 'exact'
    except Exception as e:
        row['said'] = f'{type(e).__name__}: {e}'.replace('\n', ' ')[:400]
    row['seconds'] = time.perf_counter() - start
    return row


def removable(model: ModularModel) -> float:
    "The fraction of a network's kernels that masks can remove."
    infos = model.channels.infos
    left = sum(int((~model.channels.stays[model.channels.layers[i.name].writes]).sum()) for i in infos)
    return left / sum(i.kernels for i in infos)


def main() -> None:
    p = arguments(__doc__)
    p.add_argument(
        '--networks',
        nargs='+',
        default=None,
        metavar='NAME',
        choices=NAMES,
        help='timm/NAME or torchvision/NAME; left out: all, or two with --quick',
    )
    a = parse(p)
    warnings.filterwarnings('ignore')
    rows = []
    for name in a.networks or (QUICK if a.quick else NAMES):
        rows.append(survey(name, SIDES.get(name, SIDE)))
        print(*rows[-1].values(), flush=True)
    keep('families', rows, a)
    for library in ('timm', 'torchvision'):
        of = [r['verdict'] for r in rows if r['network'].startswith(library)]
        print(f'{library}:', ', '.join(f'{of.count(v)} {v}' for v in ('exact', 'refused', 'late')))


if __name__ == '__main__':
    main()
