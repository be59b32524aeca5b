"A module out of a trained network (`narrow`), what it is compared with, and modular training that goes on."
from __future__ import annotations
import copy
from pathlib import Path
from typing import Any
import pytest
import torch
import torch.nn.functional as F
from helpers import same_state, state
from torch import Tensor, nn
from mwt.baselines.controls import random_kernels, thin_width, whole_network
from mwt.baselines.grad_splitter import ALPHA, Phase, Split, chosen_cycle, open_splitter, schedule, split
from mwt.baselines.ocap import kept_units, layers_of_its_own, least_keep, ocap
from mwt.baselines.recompose import against_the_rest, recompose, shown_twice
from mwt.core.errors import MwtError
from mwt.core.nets import evaluating
from mwt.core.signature import Signature
from mwt.data.batches import ImageData, from_tensors
from mwt.data.sources import image_data
from mwt.measure import count_flops, evaluate
from mwt.methods.modular import modularize
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import load_module, save_module
from mwt.modules.narrow import endless, narrow, one_set, renormalise_
from mwt.networks import create_model
from mwt.train.fit import fit

QUICK = dict(rounds=2, batches=2, show_progress=False)


@pytest.fixture(scope='module')
def digits() -> ImageData:
    return image_data('digits', batch_size=64, device='cpu')


@pytest.fixture(scope='module')
def net(digits: ImageData) -> nn.Module:
    "A plain network that has learned the digits a little."
    made = create_model('simcnn', 10, 0.1, 1, seed=0)
    fit(made, digits, epochs=2, lr=0.1, show_progress=False)
    made.zero_grad()
    return made


def untrained(data: ImageData, name: str = 'simcnn') -> nn.Module:
    "A network that knows its classes and nothing else; its norms have seen some noise."
    made = create_model(name, 10, 0.1, 1, seed=0)
    seen(made, 1, 8)
    made.signature = data.train.signature
    return made


def seen(net: nn.Module, channels: int, size: int) -> None:
    "Let norms see an image, as if the network had been trained."
    with torch.no_grad(): net(torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0)))


def few(n_classes: int, images: int = 4, missing: int | None = None) -> ImageData:
    "Noise, `images` of each class, none of one; classes `c0`, `c1`, ..."
    labels = torch.arange(n_classes).repeat_interleave(images)
    train = labels if missing is None else labels[labels != missing]
    pixels = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    classes = [f'c{i}' for i in range(n_classes)]
    data = from_tensors((pixels, labels), (pixels, labels), classes=classes, valid=.25, batch_size=4)
    if missing is None: return data
    keep = data.train.labels != missing
    train = data.train._replace(images=data.train.images[keep], labels=data.train.labels[keep])
    return ImageData(train, data.valid, data.test)


# narrow

def test_narrow_makes_an_ordinary_module_and_changes_nothing(
        net: nn.Module, digits: ImageData, tmp_path: Path) -> None:
    before, modes = state(net), [m.training for m in net.modules()]
    epoch = digits.train.epoch
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = narrow(net, digits, ['7', '3'], target_flops=0.3, **QUICK)
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(1)), 'the global generator is left alone'
    assert same_state(before, net) and modes == [m.training for m in net.modules()]
    assert digits.train.epoch == epoch and all(p.grad is None for p in net.parameters())
    assert module.classes == ['7', '3'] and module.takes_pixels and not module.training
    image = torch.zeros(1, *digits.shape)
    assert .15 < count_flops(module, image) / count_flops(net, image) <= .3
    stored = load_module(save_module(module, tmp_path/'m.safetensors'))
    x = torch.rand(3, *digits.shape)
    with torch.no_grad(): assert torch.equal(stored(x), module(x))
    again = narrow(net, digits, [7, 3], target_flops=0.3, **QUICK)
    assert same_state(module, again), 'the same seed, the same module; numbers name outputs'


def test_scores_are_squared_gradients_of_each_image(digits: ImageData) -> None:
    chosen = one_set(untrained(digits), digits, ['3', '7', '1'])
    images, labels = next(endless(chosen.batches, 1))
    images, labels = images[:3], labels[:3]
    chosen.observe(images, labels, decay=0.)
    masks, model = chosen.model.masks, chosen.model
    expected = torch.zeros(masks.n_units)
    for image, label in zip(images, labels):
        mask = torch.ones(1, masks.n_units + 1, requires_grad=True)
        masks.fixed = mask[0]
        loss = F.cross_entropy(model(image[None])[:, chosen.rows], label[None])
        expected += torch.autograd.grad(loss, mask)[0][0, :-1]**2 / 3
        masks.fixed = None
    torch.testing.assert_close(chosen.gates.scores[0], expected, rtol=1e-3, atol=1e-3 * expected.max().item())


def test_dead_kernels_go_first(digits: ImageData) -> None:
    net = untrained(digits)
    norm = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][4]
    dead = torch.arange(norm.num_features) % 2 == 0
    with torch.no_grad():
        norm.weight[dead] = 0
        norm.bias[dead] = 0
    chosen = one_set(net, digits, ['3', '7'], target_params=.4)
    chosen.close_(2, 1, show_progress=False)
    name = [i.name for i in chosen.model.channels.infos][4]
    assert not (chosen.kept()[name] & dead).any() and chosen.kept()[name].any()


@pytest.mark.parametrize('name', ['simcnn', 'resnet18'])
def test_all_gates_open_is_the_network(name: str, digits: ImageData) -> None:
    net = untrained(digits, name)
    module = whole_network(net, digits, ['3', '0'])
    pixels, images = (next(iter(b))[0] for b in (digits.test.pixels(), digits.test))
    with evaluating(net), torch.no_grad(): expected = net(images)[:, [3, 0]]
    with torch.no_grad(): torch.testing.assert_close(module(pixels), expected, rtol=1e-3, atol=1e-3)


def test_one_class_and_all_classes(digits: ImageData) -> None:
    net = untrained(digits)
    chosen = one_set(net, digits, ['4'])
    chosen.observe(*next(endless(chosen.batches, 1)), decay=0.)
    assert chosen.gates.scores.max() > 0, 'a single class is told from all outputs'
    module = narrow(net, digits, digits.classes, target_params=0.5, **QUICK)
    assert module.classes == digits.classes


def test_new_statistics_are_means_over_batches(digits: ImageData) -> None:
    chosen = one_set(untrained(digits), digits, ['3', '7'])
    module = chosen.module()
    seen: list[Tensor] = []
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    hook = norm.register_forward_pre_hook(lambda layer, args: seen.append(args[0].mean((0, 2, 3))))
    renormalise_(module, chosen.batches, 3)
    hook.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
    assert len(seen) == 3 and norm.momentum == .1 and not module.training


def test_outputs_follow_the_signature(digits: ImageData) -> None:
    "Data in another order, or without some of the network's classes."
    net = untrained(digits)
    other = digits.subset(['9', '3', '7'])
    chosen = one_set(net, other, ['7', '9'])
    assert chosen.rows == [7, 9] and chosen.batches.classes == ['7', '9']
    shuffled = digits.subset(list(reversed(digits.classes)))
    ours, theirs = (one_set(net, data, ['7', '3']) for data in (digits, shuffled))
    assert torch.equal(ours.batches.images.float().sum(), theirs.batches.images.float().sum())
    net.signature = None
    with pytest.raises(MwtError, match='answers for 10 classes, the data has 3'): one_set(net, other, ['7'])


def test_frozen_weights_stay_frozen(digits: ImageData) -> None:
    net = untrained(digits)
    first = next(net.parameters()).requires_grad_(False)
    module = narrow(net, digits, ['3', '7'], **QUICK)
    assert not first.requires_grad and not next(module.parameters()).requires_grad
    for p in net.parameters(): p.requires_grad_(False)
    frozen = narrow(net, digits, ['3', '7'], **QUICK)
    assert same_state(module, frozen), 'scores need no gradient of weights'
    with pytest.raises(MwtError, match='nothing to train'): narrow(net, digits, ['3', '7'], epochs=1, **QUICK)


@pytest.mark.slow
def test_narrow_takes_modular_models(digits: ImageData) -> None:
    net = untrained(digits)
    modular, plain = (narrow(m, digits, ['3', '7'], **QUICK) for m in (modularize(net, 10, 'mwt'), net))
    assert same_state(modular, plain)


def test_narrow_hands_on_to_fine_tuning(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    "The rows of the old head are kept, and no new one is put behind them."
    given: dict[str, Any] = {}
    monkeypatch.setattr('mwt.modules.narrow.fine_tune', lambda module, data, **options: given.update(options))
    narrow(untrained(digits), digits, ['3', '7'], epochs=2, lr=.02, seed=4, **QUICK)
    assert given == dict(epochs=2, lr=.02, seed=4, new_head=False, show_progress=False)


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(classes=['three']), "'three'"), (dict(classes=[]), 'no class chosen'), (dict(classes=[10]), '10'),
    (dict(classes=['3', '3']), 'chosen twice'), (dict(rounds=0), 'rounds'), (dict(batches=0), 'batches'),
    (dict(target_flops=0), 'target_flops'), (dict(target_flops=1.1), 'target_flops'),
    (dict(target_flops=1e-4), 'the smallest possible is'),
    (dict(target_flop=.1), "did you mean 'target_flops'"),
    (dict(target_flops=.1, target_params=.1), 'cannot both be met'), (dict(separation=1.), 'no setting'),
    (dict(target_flops={'3': .1}), 'target_flops'), (dict(epochs=-1), 'epochs'), (dict(lr=0), 'lr'),
    (dict(seed=-1), 'seed')]

@pytest.mark.parametrize('given, said', WRONG, ids=[str(g) for g, _ in WRONG])
def test_narrow_refuses_before_the_work(given: dict, said: str, digits: ImageData,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any) -> None: raise AssertionError('it has begun')
    monkeypatch.setattr('mwt.modules.narrow.OneSet.observe', work)
    with pytest.raises(MwtError, match=said):
        narrow(untrained(digits), digits, **dict(classes=['3', '7'], show_progress=False) | given)


def test_a_class_without_images_is_named(digits: ImageData) -> None:
    net, data = create_model('simcnn', 3, 0.1, 1, seed=0), few(3, missing=1)
    with pytest.raises(MwtError, match="'c1' has no samples"): narrow(net, data, ['c0', 'c1'], **QUICK)
    with pytest.raises(MwtError, match='narrow needs images of it'):
        narrow(untrained(digits), digits.subset(['3', '7']), ['3', '8'], **QUICK)


@pytest.mark.parametrize('make', [narrow, whole_network, random_kernels, ocap, recompose])
def test_a_network_that_was_never_trained_is_refused(make: Any, digits: ImageData) -> None:
    fresh = create_model('simcnn', 10, 0.1, 1, seed=0)
    with pytest.raises(MwtError, match='never trained: the running statistics of all its norms'):
        make(fresh, digits) if make is recompose else make(fresh, digits, ['3', '7'])


# Controls

@pytest.mark.slow
def test_random_kernels_are_as_many_and_others(digits: ImageData) -> None:
    net = untrained(digits)
    one, other = (random_kernels(net, digits, ['3', '7'], seed=s, target_params=.3) for s in (0, 1))
    assert not same_state(one, other)
    sizes = [sum(p.numel() for p in m.parameters()) / one.full['params'] for m in (one, other)]
    assert all(.2 < size <= .3 for size in sizes)


@pytest.mark.slow
def test_a_thin_network_is_the_widest_that_fits() -> None:
    most = .2 * count_flops(create_model('simcnn', 2, 1.), torch.zeros(1, 3, 8, 8))
    width = thin_width('simcnn', 2, (3, 8, 8), most)
    costs = [count_flops(create_model('simcnn', 2, w), torch.zeros(1, 3, 8, 8)) for w in (width, width + .02)]
    assert costs[0] <= most < costs[1]


# OCAP

def test_ocap_keeps_what_the_rule_says() -> None:
    "Against the rule as it is written: strictly above the score at place floor(C (1 - keep)), for any image."
    outputs = torch.randn(5, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    scores = F.leaky_relu(outputs, .14).flatten(2).norm(dim=2)
    for keep in (.03, .12, .33, .71):
        threshold = scores.sort(1).values[:, int(20 * (1 - keep))]
        assert torch.equal(least_keep(outputs) < keep, (scores > threshold[:, None]).any(0)), keep


def test_ocap_leaves_first_layers_and_streams_whole(digits: ImageData) -> None:
    chosen = one_set(untrained(digits, 'resnet18'), digits, ['3', '7'])
    names = [i.name for i in chosen.model.channels.infos if i.kind == 'Conv2d']
    inner = layers_of_its_own(chosen, skip=3)
    assert inner and not set(inner) & set(names[:3]) and all('conv2' not in name for name in inner)
    found = torch.full((chosen.gates.n_units,), .5)
    kept = kept_units(found, inner, .1)
    found[:2] = -1
    assert kept_units(found, inner, 0.)[:2].all(), 'what always stays needs no keep'
    assert all(kept[units].sum() == 1 for units in inner.values()), 'an empty layer keeps its channel 0'
    net = untrained(digits)
    module = ocap(net, digits, ['3', '7'], images=2)
    widths = [m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d)]
    whole = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert widths[:3] == whole[:3] and all(w < h for w, h in zip(widths[3:], whole[3:]))


@pytest.mark.parametrize('given, said', [
    (dict(keep=1.1), 'keep must be'), (dict(images=0), 'images must be'), (dict(skip=-1), 'skip must be'),
    (dict(target_flops=2), 'target_flops must be')])
def test_ocap_refuses_before_the_work(given: dict[str, Any], said: str, digits: ImageData) -> None:
    with pytest.raises(MwtError, match=said): ocap(untrained(digits), digits, ['3', '7'], **given)


# Magnitude

@pytest.mark.slow
def test_magnitude_prunes_with_torch_pruning(digits: ImageData) -> None:
    pytest.importorskip('torch_pruning')
    from mwt.baselines.magnitude import magnitude
    net, image = untrained(digits), torch.zeros(1, *digits.shape)
    before = state(net)
    module = magnitude(net, digits, ['7', '3'], target_flops=.7)
    assert .6 < count_flops(module, image) / module.full['flops'] <= .71 and same_state(before, net)
    assert module.classes == ['7', '3'] and module(image).shape == (1, 2)
    with pytest.raises(MwtError, match='target_flops and target_params only'):
        magnitude(net, digits, ['3', '7'], target_krr=.5)


def test_a_missing_package_is_named(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    from mwt.baselines.magnitude import magnitude
    monkeypatch.setitem(__import__('sys').modules, 'torch_pruning', None)
    with pytest.raises(ModuleNotFoundError, match='pip install torch-pruning') as caught:
        magnitude(untrained(digits), digits, ['3', '7'])
    assert isinstance(caught.value, MwtError)


# GradSplitter

@pytest.fixture(scope='module')
def ten(net: nn.Module) -> tuple[nn.Module, ImageData, Split]:
    "The trained network, noise in its place of images, and what it was split into."
    net, data = copy.deepcopy(net), few(10)
    net.signature = None
    before = state(net)
    short = dict(cycles=1, heads_first=1, gate_epochs=1, head_epochs=1, gate_lr_factor=300.)
    found = split(net, data, **short, show_progress=False)
    assert same_state(before, net)
    return net, data, found


def test_splitting_moves_gates_and_heads_alone(ten: tuple) -> None:
    net, data, found = ten
    weights = {k: v for k, v in found.model.plain().state_dict().items()}
    assert all(torch.equal(v, weights[k]) for k, v in state(net).items()), 'norms and weights are frozen'
    assert 0 < found.history[-1]['opened'] < 1
    assert found.splitter.gates.gates.mean() == pytest.approx(found.history[-1]['opened'], abs=1e-6)


def test_modules_side_by_side_answer_as_in_training(ten: tuple) -> None:
    net, data, found = ten
    with torch.no_grad(): found.splitter.gates.values[:, ::2] = 1.       # no layer without kernels
    images, pixels = (next(iter(b))[0] for b in (data.test, data.test.pixels()))
    with torch.no_grad():
        expected = found.splitter(images)[:, [2, 0]]
        answers = found.module(['c2', 'c0'])(pixels)
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-4)


def test_a_step_of_splitting(ten: tuple) -> None:
    "The loss is that of the paper, and gradients of gates are clipped, whatever the gates are."
    net, data, _ = ten
    splitter, _ = open_splitter(net, data)
    images, labels = next(iter(data.train))
    loss = F.cross_entropy(splitter(images), labels) + ALPHA * splitter.opened
    [grad] = torch.autograd.grad(loss, splitter.gates.values)
    assert grad.abs().max() <= 1 + ALPHA and splitter.opened == 1
    lone = torch.stack([splitter.heads[c](net.eval()(images))[:, 0] for c in range(10)], 1)
    torch.testing.assert_close(splitter(images), lone)
    epochs = sum(phase.epochs for cycle in schedule(20, 5, 5, 2) for phase in cycle)
    assert epochs == 145 and schedule(1, 5, 5, 2)[0][0] == Phase(5, .01, False)
    rows = [dict(accuracy=.8, opened=.1), dict(accuracy=.9, opened=.3), dict(accuracy=.9, opened=.2)]
    assert chosen_cycle(rows, .85) == 2 and chosen_cycle(rows, .95) == 1


def test_more_than_ten_classes_are_refused() -> None:
    with pytest.raises(MwtError, match='at most 10 classes; the data has 11'):
        split(create_model('simcnn', 11, 0.1, 1), few(11))


# Recomposition

def test_masks_that_are_pulled_together_need_less_together(digits: ImageData) -> None:
    "Equal in size for two classes, the union of all shrinks to one mask; the network stays as it is."
    net = untrained(digits)
    before, sizes = state(net), []
    for shared in (0., .5, 1.):
        parts = recompose(net, digits, shared, 2, 2, show_progress=False, target_krr=.4)
        gates = parts.whole.gates.gates
        sizes.append(gates.amax(0).mean().item())
        two = parts.module(['7', '3'])
        assert torch.equal(parts.whole.gates.gates, gates) and two.classes == ['7', '3']
        if shared == 1: assert (gates == gates[0]).all()
    assert same_state(before, net) and sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2]
    stored = [parts.module(c) for c in (['7', '3'], ['3', '7'])]
    x = torch.rand(2, *digits.shape)
    with torch.no_grad(): torch.testing.assert_close(stored[0](x), stored[1](x).flip(1))


def test_each_module_says_yes_to_its_class_and_no_to_others() -> None:
    labels = torch.arange(5).repeat(40)
    owners, wanted = shown_twice(labels, 5)
    own, other = owners.split(200)
    assert torch.equal(own, labels) and (other != labels).all() and other.unique().tolist() == list(range(5))
    assert wanted.tolist() == [1.] * 200 + [0.] * 200
    logits = torch.randn(200, 5)
    torch.testing.assert_close(against_the_rest(logits, own).sigmoid(), logits.softmax(1)[range(200), own])


@pytest.mark.parametrize('given, said', [
    (dict(shared=-.1), 'shared must be'), (dict(shared=1.1), 'shared must be'), (dict(rounds=0), 'rounds'),
    (dict(batches=0), 'batches'), (dict(target_flops=0), 'target_flops'), (dict(seed=-1), 'seed'),
    (dict(data=['3', '7']), 'images of all classes'), (dict(data='reversed'), 'in the same order')])
def test_recompose_refuses_before_the_work(given: dict[str, Any], said: str, digits: ImageData) -> None:
    settings = dict(given)
    classes = settings.pop('data', digits.classes)
    if classes == 'reversed': classes = digits.classes[::-1]
    with pytest.raises(MwtError, match=said): recompose(untrained(digits), digits.subset(classes), **settings)


# Composable training that begins with trained weights

@pytest.mark.slow
def test_modular_training_goes_on_from_trained_weights(net: nn.Module, digits: ImageData) -> None:
    model = modularize(net, 10)
    assert evaluate(model, digits.test) == evaluate(net, digits.test)
    assert model.classes == digits.classes
    fresh = modularize(create_model('simcnn', 10, 0.1, 1, seed=0), 10)
    start = net.state_dict()['head.weight'].clone()
    for m in (model, fresh): fit(m, digits, epochs=1, lr=0.05, show_progress=False)
    assert torch.equal(net.state_dict()['head.weight'], start)
    assert evaluate(model, digits.test) > evaluate(fresh, digits.test)
    module = extract(model, decompose(model, digits.train, show_progress=False), ['3', '7'])
    assert module.classes == ['3', '7']


def test_frozen_layers_stay_in_modular_training(digits: ImageData) -> None:
    net = untrained(digits)
    for p in net.features[0].parameters(): p.requires_grad_(False)
    model = modularize(net, 10)
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    fit(model, digits.subset(digits.classes), epochs=1, show_progress=False)
    after = dict(model.plain().named_parameters())
    assert frozen and all(torch.equal(after[n], p) != (n not in frozen) for n, p in net.named_parameters())
    assert {n for n, p in after.items() if not p.requires_grad} == frozen
    module = extract(model, decompose(model, digits.train, show_progress=False), ['3', '7'])
    assert {n for n, p in module.named_parameters() if not p.requires_grad}


def test_a_head_in_another_order_or_with_more_outputs(digits: ImageData) -> None:
    net = untrained(digits)
    reordered = digits.subset(list(reversed(digits.classes)))
    model = modularize(net, 10)
    fit(model, reordered, epochs=1, show_progress=False)
    assert model.classes == digits.classes, 'outputs keep their names, the data is brought into their order'
    more = create_model('simcnn', 12, 0.1, 1, seed=0)
    with pytest.raises(MwtError, match='answers for 12 classes, but n_classes is 10'): modularize(more, 10)
    with pytest.raises(MwtError, match='answers for 12 classes'):
        fit(modularize(more, 12), digits, epochs=1, show_progress=False)
    more.signature = Signature([*digits.classes, 'x', 'y'])
    with pytest.raises(MwtError, match="'x', 'y'"):
        fit(modularize(more, 12), digits, epochs=1, show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['narrow', 'composable'])
def test_a_torchvision_network_with_a_head_of_its_own(way: str) -> None:
    "ResNet18 for images of 64 pixels, trained elsewhere: a plain network without a signature."
    torchvision = pytest.importorskip('torchvision')
    net = torchvision.models.resnet18(num_classes=3)
    seen(net, 3, 64)
    pixels = torch.randint(0, 256, (24, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(24) % 3
    data = from_tensors((pixels, labels), (pixels, labels), classes=['a', 'b', 'c'], valid=.25, batch_size=6)
    if way == 'narrow': module = narrow(net, data, ['c', 'a'], **QUICK)
    else:
        model = modularize(net, 3, example_input=torch.zeros(2, 3, 64, 64))
        fit(model, data, epochs=3, lr=0.01, show_progress=False)
        module = extract(model, decompose(model, data.train, show_progress=False), ['c', 'a'])
    image = torch.rand(1, 3, 64, 64)
    assert module.input_shape == (3, 64, 64) and module(image).shape == (1, 2)
    assert count_flops(module, image) < .4 * module.full['flops']
