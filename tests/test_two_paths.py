"A full model that keeps every kernel, target sets inside it, and gates that know what a unit costs."
from __future__ import annotations
import copy
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any
import pytest
import torch
from helpers import same_state
from torch import nn
from mwt.data.batches import ImageData, from_tensors
from mwt.measure import count_flops, count_params, evaluate
from mwt.methods.composable import Composable, module_masks
from mwt.methods.modular import ModularModel, modularize, plain
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.networks import create_model
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import fit

CLASSES = list('abcd')


@pytest.fixture(scope='module')
def data() -> ImageData:
    "Stripes that slope four ways."
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing='ij')
    stripes = torch.stack([x, y, x + y, x - y]) % 4 < 2
    images = (stripes[labels, None] * 120 + torch.randint(80, (96, 3, 16, 16), generator=generator)).byte()
    split = images, labels
    return from_tensors(split, split, split, CLASSES, 16, augment=None, device='cpu')


def network(name: str = 'resnet18', seed: int = 0) -> nn.Module:
    return create_model(name, 4, 0.125, seed=seed)


def made_anew(data: ImageData, name: str, seed: int, settings: dict[str, Any]) -> ModularModel:
    example = torch.zeros(1, *data.shape)
    return modularize(network(name, seed), 4, example_input=example, **settings)


MADE: dict[str, ModularModel] = {}

def made(data: ImageData, name: str = 'resnet18', seed: int = 0, **settings: Any) -> ModularModel:
    "A fresh model; what was asked for before is a copy."
    key = repr((data.shape, name, seed, settings))
    if key not in MADE: MADE[key] = made_anew(data, name, seed, settings)
    return copy.deepcopy(MADE[key])


@pytest.fixture(scope='module')
def trained(data: ImageData) -> Callable[[], ModularModel]:
    model = made(data, target_flops=.3)         # a tenth of it is what cannot be cut
    fit(model, data, 24, show_progress=False)
    return lambda: copy.deepcopy(model)


def test_the_full_model_keeps_every_kernel(trained: Callable, data: ImageData) -> None:
    model = trained().eval()
    images, _ = data.test.take(16)
    with torch.no_grad(): assert torch.equal(model(images), plain(model)(images))
    assert model.masks.gates.krr < 0.5 and evaluate(model, data.test) > 0.9


def test_target_sets_have_statistics_of_their_own(trained: Callable) -> None:
    model = trained()
    paths = model.masks.statistics.paths
    assert len(paths) == 3 * sum(isinstance(m, nn.BatchNorm2d) for m in model.net.modules())
    net = plain(model)
    means = [path for path in paths if path.endswith('running_mean')]
    own = [model.masks.statistics.get_buffer(path) for path in means]
    assert not any(torch.equal(a, net.get_buffer(path)) for a, path in zip(own, means))


@pytest.mark.parametrize('fuse', [False, True])
def test_modules_are_exact_and_take_the_statistics_of_sets(
    fuse: bool, trained: Callable, data: ImageData
) -> None:
    model = trained().eval()
    parts = decompose(model, data.train, show_progress=False)
    module = extract(model, parts, ['b', 'd'], fuse)        # which compares it with the masked model
    assert evaluate(module, data.test, ['b', 'd']) > 0.9
    images, _ = data.test.take(16)
    sets = torch.tensor([[False, True, False, True]]).expand(16, -1)
    with torch.no_grad(): masked = model(images, sets)[:, [1, 3]]
    shown, _ = data.test.pixels().take(16)
    with torch.no_grad(): assert torch.allclose(module(shown), masked, atol=1e-4)


def test_everyone_is_a_module_too(trained: Callable, data: ImageData) -> None:
    model = trained()
    whole = extract(model, decompose(model, data.train, show_progress=False), CLASSES)
    assert count_params(whole) < 0.8 * count_params(plain(model))


def test_a_stopped_run_ends_at_the_same_bits(data: ImageData, tmp_path: Path) -> None:
    whole, stopped = made(data, 'simcnn'), made(data, 'simcnn')
    fit(whole, data, 4, show_progress=False)
    resume = tmp_path/'run.safetensors'

    class Stop(Exception): pass
    loss, calls = Composable.training_loss, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 15: raise Stop
        return loss(*args)

    Composable.training_loss = stopping
    try:
        with pytest.raises(Stop): fit(stopped, data, 4, resume=resume, show_progress=False)
    finally: Composable.training_loss = loss
    again = made(data, 'simcnn', seed=1)
    fit(again, data, 4, resume=resume, show_progress=False)
    assert same_state(whole, again)


def test_files(trained: Callable, data: ImageData, tmp_path: Path) -> None:
    model, other = trained().eval(), made(data, seed=1, target_flops=.3).eval()
    load_checkpoint(other, save_checkpoint(model, tmp_path/'model.safetensors'))
    images, labels = data.test.take(16)
    targets = torch.eye(4, dtype=torch.bool)[labels]
    with torch.no_grad():
        assert torch.equal(model(images), other(images))
        assert torch.equal(model(images, targets), other(images, targets))
    with pytest.raises(ValueError, match='another network'):
        load_checkpoint(made(data, dense=False), tmp_path/'model.safetensors')


def test_a_network_without_norms(data: ImageData) -> None:
    class Bare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    model = modularize(Bare(), 4, dense=True, example_input=torch.zeros(1, *data.shape))
    fit(model, data, 2, show_progress=False)
    assert not model.masks.statistics.paths
    extract(model, decompose(model, data.train, show_progress=False), ['a', 'c'])


# Gates that know the cost

def kept(model: ModularModel, data: ImageData, what: str) -> dict[tuple[str, str], float]:
    "The fraction of the cost that the module of each pair of classes really keeps."
    parts = decompose(model, data.train, show_progress=False)
    found = {}
    for pair in combinations(CLASSES, 2):
        module = extract(model, parts, pair)
        if what == 'flops': cost = count_flops(module, torch.zeros(1, *data.shape)) / module.full['flops']
        elif what == 'params': cost = count_params(module) / module.full['params']
        else: cost = parts.kept[[CLASSES.index(c) for c in pair]].any(0).double().mean().item()
        found[pair] = cost
    return found


@pytest.mark.parametrize('name, what, target, dense', [
    ('simcnn', 'flops', .2, True), ('resnet18', 'params', .15, False), ('resnet18', 'krr', .3, False),
    pytest.param('mobilenet', 'flops', .3, True, marks=pytest.mark.slow)])
def test_two_classes_keep_what_was_asked_for(
    name: str, what: str, target: float, dense: bool, data: ImageData
) -> None:
    model = made(data, name, dense=dense, **{f'target_{what}': target})
    fit(model, data, 3, show_progress=False)
    found = torch.tensor(list(kept(model, data, what).values()))
    assert target * .9 < found.mean() <= target * 1.001, f'{found.mean():.3f} on average'
    gates = model.masks.gates
    predicted = gates.costs.fraction(module_masks(gates.gates))
    assert torch.allclose(predicted, found.float(), rtol=1e-2)              # a head of two rows costs less


def test_a_target_for_each_class(data: ImageData, tmp_path: Path) -> None:
    targets = dict(a=.5, b=.2, c=.2, d=.2)
    model = made(data, 'simcnn', target_flops=targets, closed_by=.9)
    fit(model, data, 24, show_progress=False)
    found = kept(model, data, 'flops')
    means = {c: sum(cost for pair, cost in found.items() if c in pair) / 3 for c in CLASSES}
    assert abs(means['a'] - .35) < .04 and all(abs(means[c] - .25) < .04 for c in 'bcd'), means
    again = made(data, 'simcnn', seed=1, target_flops=targets, closed_by=.9)
    load_checkpoint(again, save_checkpoint(model, tmp_path/'model.safetensors'))
    assert torch.equal(again.masks.gates.balance, model.masks.gates.balance)
    assert again.method == model.method


def test_classes_by_number_and_unknown_ones(data: ImageData) -> None:
    assert made(data, target_flops={0: .4, 1: .2, 2: .2, 3: .3}).method.target_flops['0'] == .4
    with pytest.raises(ValueError, match="target_flops: no fraction for 'd'; give one for each of"):
        fit(made(data, target_flops=dict(a=.4, b=.2, c=.2)), data, 1, show_progress=False)
    with pytest.raises(ValueError, match="target_flops: no class 'e'"):
        fit(made(data, target_flops=dict.fromkeys('abcde', .3)), data, 1, show_progress=False)


def test_measured_time(tmp_path: Path) -> None:
    "The table goes into files: what another machine measures takes no part in a run that is resumed."
    def layers() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4))

    example = torch.zeros(1, 3, 24, 24)
    model, other = [modularize(layers(), 4, target_latency=.7, example_input=example) for _ in range(2)]
    costs = model.masks.gates.costs
    load_checkpoint(other, save_checkpoint(model, tmp_path/'model.safetensors'))
    assert torch.equal(other.masks.gates.costs.each, costs.each)
    half = torch.ones(1, len(costs.reads))
    half[:, :-1:2] = 0
    assert costs.rest >= 0 and 0 < costs.fraction(half) <= 1         # how much less is the machine's to say
    with pytest.raises(ValueError, match='the smallest possible is'):
        modularize(layers(), 4, target_latency=1e-6, example_input=example)


@pytest.mark.parametrize('settings, says', [
    (dict(target_flops=0.2, target_params=0.1), 'cannot both be met'),
    (dict(target_flops=1e-4), 'the smallest possible is 0.0'),
    (dict(target_params=0), 'target_params must be a number above 0'),
    (dict(target_flops=dict(a=1.5)), r"target_flops\['a'\] must be a number above 0 and at most 1"),
    (dict(target_flops={}), 'must have a fraction for each class'),
    (dict(set_fraction=0), 'set_fraction must be a number above 0'),
    (dict(distill=1.5), 'distill must be a number'),
    (dict(dense='yes'), 'dense must be True or False')])
def test_bad_settings(settings: dict, says: str, data: ImageData) -> None:
    with pytest.raises((ValueError, TypeError), match=says): made(data, **settings)
