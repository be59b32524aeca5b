"Training repeats, chooses on validation data, never waits for the device, and leaves whole files."
from __future__ import annotations
import copy, functools, json, math, random, shutil, subprocess, sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
import numpy as np
import pytest
import torch
from helpers import ROOT, kernel_costs, same_state, same_tensors, state
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from mwt.core.checks import seeded
from mwt.core.files import load_tensors
from mwt.data.batches import Batches, ImageData, from_tensors
from mwt.data.sources import image_data
from mwt.measure import evaluate
from mwt.methods.base import METHODS
from mwt.methods.composable import ClassGates, Composable, draw_targets, module_masks, open_gates
from mwt.methods.modular import modularize
from mwt.methods.points import mask_points
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.networks import create_model
from mwt.runs.cli import main
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import fit
from mwt.train.history import History, TrainConfig, lr_factor, make_config
from mwt.train.trainer import Trainer, train_epoch, training_loss

PLAIN = 'plain'


@pytest.fixture(scope='module')
def data() -> ImageData:
    "256 digits to learn, 64 to choose by."
    digits = image_data('digits', batch_size=64, device='cpu')
    return ImageData(digits.train.sample(256), digits.valid.sample(64), digits.test)


def make_network(name: str, kind: str, seed: int, **settings: Any) -> nn.Module:
    net = create_model(name, 10, .1, 1, seed=seed)
    return net if kind == PLAIN else modularize(net, 10, kind, seed=seed, **settings)

made_once = functools.cache(make_network)           # `modularize` checks for a quarter of a second


def network(name: str = 'simcnn', kind: str = 'mwt', seed: int = 0, **settings: Any) -> nn.Module:
    "A small network for digits, plain or with the masks of a method."
    return copy.deepcopy(made_once(name, kind, seed, **settings))


def trained(kind: str, data: Any, epochs: int = 1, seed: int = 0,
            **options: Any) -> tuple[nn.Module, History]:
    "A network after `fit`, in silence."
    model = network(kind=kind)
    return model, fit(model, data, epochs, seed=seed, show_progress=False, **options)


every_kind = pytest.mark.parametrize('kind', [PLAIN, *METHODS])
# Of what no method has a part in, the others are slow.
KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in (PLAIN, 'composable')))
         for kind in (PLAIN, *METHODS)]
some_kinds = pytest.mark.parametrize('kind', KINDS)
every_method = pytest.mark.parametrize('method', METHODS)


# A seed repeats everything, and disturbs nothing

@some_kinds
@pytest.mark.parametrize('name', [pytest.param('simcnn', marks=pytest.mark.slow), 'rescnn'])
def test_seed_repeats_every_bit(name: str, kind: str, data: ImageData) -> None:
    runs = []
    for seed in (3, 3, 4):
        model = network(name, kind)
        runs.append((model, fit(model, data, 2, seed=seed, show_progress=False)))
        torch.randn(1), random.random(), np.random.rand()       # what happens between runs is no part of them
    (a, rows_a), (b, rows_b), (c, rows_c) = runs
    assert same_state(a, b) and rows_a == rows_b
    assert not same_state(a, c) and rows_a != rows_c


def test_initial_weights_follow_their_seed() -> None:
    first, again, other = [make_network('simcnn', 'mwt', seed) for seed in (1, 1, 2)]
    assert same_state(first, again) and not same_state(first, other)


def generators() -> tuple:
    "The states of the global random generators."
    numpy = [s.tolist() if isinstance(s, np.ndarray) else s for s in np.random.get_state()]
    return random.getstate(), numpy, torch.get_rng_state().tolist()


@every_kind
def test_global_generators_are_left_alone(kind: str, data: ImageData) -> None:
    before = generators()
    model = network('rescnn', kind)                         # with dropout
    fit(model, data, 1, show_progress=False)
    assert generators() == before
    with pytest.raises(FloatingPointError): fit(model, data, 1, lr=1e30, show_progress=False)
    assert generators() == before


def test_data_are_left_alone(data: ImageData) -> None:
    "Two fits of one data object see the same batches; what else iterates over it does not matter."
    before = data.train.seed(0).epoch
    a, _ = trained(PLAIN, data, seed=1)
    assert data.train.epoch == before
    next(iter(data.train))
    b, _ = trained(PLAIN, data, seed=1)
    assert same_state(a, b)


Seen = tuple[list[tuple[Tensor, Tensor]], list[tuple]]

def seen(model: nn.Module, data: ImageData, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Seen:
    "The batches and the learning rates of a fit."
    batches, rates, step = [], [], torch.optim.SGD.step

    def loss(model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Any:
        batches.append((images.clone(), labels.clone()))
        return training_loss(model, images, labels, progress)

    def spy(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        group = self.param_groups[0]
        rates.append(tuple(group[k] for k in ('lr', 'momentum', 'weight_decay', 'nesterov')))
        return step(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr('mwt.train.trainer.training_loss', loss)
        m.setattr(torch.optim.SGD, 'step', spy)
        fit(model, data, show_progress=False, **options)
    return batches, rates


@every_method
def test_plain_and_modular_get_the_same_recipe(method: str, data: ImageData,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    a, rates_a = seen(network('rescnn', PLAIN), data, monkeypatch, epochs=2, seed=5)
    b, rates_b = seen(network('rescnn', method), data, monkeypatch, epochs=2, seed=5)
    n = len(data.train)
    assert len(a) == len(b) == 2 * n
    assert rates_a == rates_b
    assert same_tensors(a, b)
    assert not any(torch.equal(a[i][0], a[n + i][0]) for i in range(n)), 'each epoch has an order of its own'


def test_no_penalty_means_plain_cross_entropy(data: ImageData) -> None:
    model = network(alpha=0, beta=0).eval()
    images, labels = next(iter(data.train))
    loss, logged = training_loss(model, images, labels)
    assert torch.equal(loss.detach(), logged['cross_entropy'])
    assert torch.equal(loss, F.cross_entropy(model(images), labels))


def test_penalties_are_weighted(data: ImageData) -> None:
    images, labels = next(iter(data.train))
    loss, logged = training_loss(network(alpha=.3, beta=.7).eval(), images, labels)
    penalties = .3 * logged['cohesion_loss'] + .7 * logged['coupling_loss']
    assert torch.allclose(loss, logged['cross_entropy'] + penalties)


# What a model answers

class Counting(nn.Module):
    "A network that answers the trainer's questions and is no class of this library."
    def __init__(self) -> None:
        super().__init__()
        self.net = create_model('simcnn', 10, .1, 1, seed=0)
        self.asked: Counter[str] = Counter()
        self.steps: list[tuple[float, int]] = []

    def forward(self, x: Tensor) -> Tensor: return self.net(x)

    def training_loss(self, images: Tensor, labels: Tensor,
                      progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked['training_loss'] += 1
        loss = 2 * F.cross_entropy(self(images), labels)
        return loss, dict(half=loss.detach() / 2)

    def after_backward(self, labels: Tensor, progress: float, step: int) -> None:
        assert all(p.grad is not None for p in self.parameters())
        self.steps.append((progress, step))

    def ready(self, progress: float) -> bool: return progress >= .5

    def smaller(self) -> None: self.asked['smaller'] += 1

    def about(self) -> dict[str, Any]: return dict(classes=['?'] * 10, note='mine')


def test_any_model_that_answers_is_asked(data: ImageData, tmp_path: Path) -> None:
    model, path = Counting(), tmp_path/'model.safetensors'
    history = fit(model, data, 4, checkpoint=path, show_progress=False)
    total = 4 * len(data.train)
    assert model.asked == dict(training_loss=total, smaller=1)
    assert model.steps == [(n / total, n) for n in range(1, total + 1)]
    assert history.rows[0]['loss'] == pytest.approx(2 * history.rows[0]['half'])
    assert history.best_epoch >= 2, 'an epoch before the model was ready'
    assert model.signature.classes == data.classes
    assert load_checkpoint(Counting(), path)['note'] == 'mine'


# The learning rate

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.floats(0, 1))
def test_learning_rate_rises_then_falls_to_nothing(total: int, warmup: float) -> None:
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    top = factors.index(max(factors))
    assert factors[:top + 1] == sorted(factors[:top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert abs(top - warmup * total) <= 1
    if (1 - warmup) * total >= 1: assert lr_factor(total, total, warmup) < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400))
def test_without_warmup_it_is_half_a_cosine(total: int) -> None:
    for step in range(total):
        assert lr_factor(step, total, 0) == pytest.approx((1 + math.cos(math.pi * step / total)) / 2)


def test_every_step_follows_the_schedule(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dict(lr=.2, warmup=.25, momentum=.8, weight_decay=1e-3)
    _, rates = seen(network(kind=PLAIN), data, monkeypatch, epochs=3, **recipe)
    total = 3 * len(data.train)
    assert rates == [(pytest.approx(.2 * lr_factor(s, total, .25)), .8, 1e-3, True) for s in range(total)]
    _, rates = seen(network(kind=PLAIN), data, monkeypatch, epochs=1, momentum=0.)
    assert not rates[0][-1], 'Nesterov needs a momentum'


def test_defaults_are_the_papers() -> None:
    c = TrainConfig()
    assert (c.lr, c.momentum, c.weight_decay) == (.05, .9, 0.)
    assert make_config(c, lr=.1) == TrainConfig(lr=.1) and c.lr == .05


# The best epoch

def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> list[dict[str, Tensor]]:
    "Let validation say these accuracies; the weights it saw are put into the list."
    states, said = [], iter(accuracies)

    def say(model: nn.Module, batches: Batches) -> float:
        states.append(state(model))
        return next(said)

    monkeypatch.setattr('mwt.train.fit.evaluate', say)
    return states


SCRIPTS = [([.1, .5, .3], 2), ([.9, .5, .3], 1), ([.1, .2, .3], 3), ([.4, .4, .4], 1), ([0., 0., 0.], 1)]

@pytest.mark.parametrize('accuracies, best', SCRIPTS)
def test_best_epoch_is_chosen_on_validation(accuracies: list[float], best: int, data: ImageData,
                                            monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, path = network(), tmp_path/'model.safetensors'
    states = scripted(monkeypatch, accuracies)
    history = fit(model, data, 3, checkpoint=path, show_progress=False)
    assert history.best_epoch == best
    assert history.series('valid_accuracy') == accuracies
    assert same_state(model, states[best - 1])
    loaded = network(seed=9)
    about = load_checkpoint(loaded, path)
    assert same_state(loaded, model)
    assert (about['epoch'], about['valid_accuracy']) == (best, accuracies[best - 1])
    assert list(tmp_path.iterdir()) == [path]


def test_reported_accuracy_is_that_of_the_kept_weights(data: ImageData) -> None:
    model, history = trained(PLAIN, data, 3)
    accuracies = history.series('valid_accuracy')
    assert evaluate(model, data.valid) == max(accuracies) == accuracies[history.best_epoch - 1]


def test_test_split_is_never_read(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    read, iterate = [], Batches.__iter__

    def watched(batches: Batches) -> Any:
        read.append(batches.n)
        return iterate(batches)

    monkeypatch.setattr(Batches, '__iter__', watched)
    assert data.test.n not in (data.train.n, data.valid.n)
    trained('mwt', data, 2)
    assert read == 2 * [data.train.n, data.valid.n]


LOGGED = dict(mwt=['cohesion_loss', 'coupling_loss'], composable=['krr'], plain=[])     # in this order

@every_kind
def test_history_is_whole(kind: str, data: ImageData) -> None:
    _, history = trained(kind, data, 3)
    assert history.series('epoch') == [1, 2, 3] and 1 <= history.best_epoch <= 3
    assert len(history.table()) == 3
    names = list(history.rows[0])
    assert names[:3] == ['epoch', 'cross_entropy', 'train_accuracy']
    assert names[-2:] == ['loss', 'valid_accuracy']
    if kind in LOGGED: assert names[3:-2] == LOGGED[kind]
    for row in history.rows:
        assert list(row) == names
        assert all(math.isfinite(v) for v in row.values())
        assert all(0 <= row[k] <= 1 for k in ('train_accuracy', 'valid_accuracy'))


def test_logged_losses_make_up_the_loss(data: ImageData) -> None:
    def rows(kind: str) -> list[dict[str, float]]: return trained(kind, data, 3)[1].rows
    for row in rows(PLAIN): assert row['loss'] == row['cross_entropy']
    for row in rows('mwt'):
        penalties = .5 * row['cohesion_loss'] + 1.5 * row['coupling_loss']
        assert row['loss'] == pytest.approx(row['cross_entropy'] + penalties, rel=1e-5)
    for row in rows('composable'):                          # in two roles once gates are frozen
        assert 1 - 1e-6 <= row['loss'] / row['cross_entropy'] <= 2 + 1e-6


def test_it_learns(data: ImageData) -> None:
    _, plain = trained(PLAIN, data, 10, seed=1)
    assert plain.series('train_accuracy')[-1] > .4
    losses = trained('mwt', data, 6, seed=1)[1].series('loss')
    assert losses[-1] < losses[0]


# A step asks nothing of the device, and does not grow with samples or classes

WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', 'item', '_unique2',
         'unique_dim', 'unique_consecutive', 'bincount'}


def indexes_by_mask(name: str, args: tuple) -> bool:
    "Is this operation indexing by booleans?"
    if not name.startswith('index'): return False
    indices = [i for a in args if isinstance(a, (list, tuple)) for i in a]
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)


class Watch(TorchDispatchMode):
    "Counts operations; on a GPU, those in `WAITS` and indexing by a mask would hold the step up."
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or indexes_by_mask(name, args):
            raise AssertionError(f'{name} makes the step wait for the device')
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))


# How many epochs the run has; its second one is watched.
EPOCHS = pytest.mark.parametrize('epochs', [20, 1.5], ids=['early', 'when ready'])

def step_calls(model: nn.Module, batches: Batches, epochs: float = 20, amp: bool = False) -> Counter[str]:
    "The operations of an epoch, the second of a run."
    run = Trainer(model, TrainConfig(amp=amp), int(epochs * len(batches)))
    train_epoch(run, batches)
    run.may_shrink = True
    run.step(*next(iter(batches)))          # a smaller network takes over here, if at all
    with Watch() as watch: means = train_epoch(run, batches)
    assert all(isinstance(v, Tensor) and v.ndim == 0 and not v.requires_grad for v in means.values())
    return watch.calls


def random_batches(samples: int, n_classes: int, batch_size: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 1, 8, 8), dtype=torch.uint8, generator=generator)
    split = images, torch.arange(samples) % n_classes
    names = [str(i) for i in range(n_classes)]
    return from_tensors(split, split, split, names, batch_size, device='cpu').train


@EPOCHS
@every_kind
@pytest.mark.parametrize('name', ['simcnn', pytest.param('resnet18', marks=pytest.mark.slow)])
def test_step_never_waits(name: str, kind: str, epochs: float, data: ImageData) -> None:
    assert sum(step_calls(network(name, kind), data.train, epochs).values()) > 100


@EPOCHS
@pytest.mark.parametrize('settings', [dict(dense=True), dict(target_flops=.2)], ids=lambda s: min(s))
def test_step_of_other_settings_never_waits(settings: dict, epochs: float, data: ImageData) -> None:
    net = create_model('simcnn', width=.1, in_channels=1, seed=0)
    model = modularize(net, 10, example_input=torch.zeros(1, 1, 8, 8), **settings)
    assert sum(step_calls(model, data.train.sample(256), epochs).values()) > 100


@every_kind
def test_step_in_bfloat16_never_waits(kind: str, data: ImageData) -> None:
    assert sum(step_calls(network('simcnn', kind), data.train.sample(256), 1.5, amp=True).values()) > 100


def test_watch_sees_what_it_should() -> None:
    x = torch.arange(4.)
    waits = [lambda: x.sum().item(), lambda: bool(x.sum() > 1), lambda: x[x > 1], lambda: float(x[0]),
             lambda: x.unique(), lambda: x.nonzero()]
    for wait in waits:
        with pytest.raises(AssertionError, match='wait'), Watch(): wait()


@every_method
def test_step_does_not_grow_with_samples_or_classes(method: str) -> None:
    "As many operations for 8 images of 2 classes as for 64 of 32: no loop runs over either."
    def calls(n_classes: int, batch_size: int) -> Counter[str]:
        with seeded(0): model = modularize(create_model('simcnn', n_classes, .1, 1), n_classes, method)
        return step_calls(model, random_batches(2 * batch_size, n_classes, batch_size))
    assert calls(2, 8) == calls(2, 64) == calls(32, 64)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')

@needs_gpu
@EPOCHS
@every_kind
def test_step_never_waits_on_a_gpu(kind: str, epochs: float, data: ImageData) -> None:
    model = network('resnet18', kind).to('cuda', memory_format=torch.channels_last)
    batches = list(data.train.to('cuda'))                   # the epoch's order comes from the host, once
    run = Trainer(model, TrainConfig(amp=True), int(epochs * len(batches)))
    train_epoch(run, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: train_epoch(run, batches)
    finally: torch.cuda.set_sync_debug_mode('default')


@needs_gpu
def test_gpu_learns_too(data: ImageData) -> None:
    model, history = trained(PLAIN, data, 10, seed=1, device='cuda')
    assert history.series('train_accuracy')[-1] > .4
    assert next(model.parameters()).is_cuda


# A smaller network takes over

ORDERS = [('simcnn', torch.channels_last), ('resnet18', torch.contiguous_format)]

@pytest.mark.parametrize('name, order', ORDERS)
def test_momentum_goes_along(name: str, order: torch.memory_format, data: ImageData) -> None:
    "Also where weights lie in another order in memory: the fused optimizer goes by memory."
    model, batches = network(name, 'composable', dense=False), list(data.train)
    model = model.to(memory_format=order).train()
    run = Trainer(model, TrainConfig(), 4 * len(batches), format=order)      # gates close until then
    for batch in batches: run.step(*batch)
    before = {k: m.clone() for k, m in run.momentum().items()}
    assert run.net is model
    run.shrink_(batches[0][0])
    assert run.net is not model and run.origins
    for name, p in run.net.named_parameters():
        momentum = run.optimizer.state[p]['momentum_buffer']
        assert torch.equal(momentum.flatten(), before[name].flatten()[run.origins[name]]), name
        assert momentum.stride() == p.stride(), name


@pytest.mark.parametrize('dense', [False, True])
@pytest.mark.parametrize('name', [              # without dropout, whose draws would differ
    pytest.param('simcnn', marks=pytest.mark.slow), 'resnet18'])
def test_smaller_network_learns_what_the_whole_one_would(name: str, dense: bool, data: ImageData) -> None:
    "In double precision, where rounding has no time to grow."
    weights = []
    for may_shrink in (True, False):
        batches = list(data.train.seed(0))
        model = network(name, 'composable', dense=dense, closed_by=.6).double()
        model = model.to(memory_format=torch.channels_last).train()
        with seeded(0):
            run = Trainer(model, TrainConfig(), 2 * len(batches), format=torch.channels_last)
            run.may_shrink = may_shrink
            for images, labels in 2 * batches: run.step(images.double(), labels)
        run.write_back()
        assert (run.net is not model) == may_shrink
        weights.append((run.origins, state(model)))
    (origins, small), (_, whole) = weights
    if dense:       # a closed kernel's statistics stand still in one and not in the other, and mean nothing
        origins = {name: torch.arange(t.numel()) for name, t in whole.items() if 'statistics' not in name}
    for name, at in origins.items():
        assert torch.allclose(small[name].flatten()[at], whole[name].flatten()[at], atol=1e-9), name


# Class gates

def test_gates_close_to_the_target_and_are_frozen(data: ImageData) -> None:
    model = network(kind='composable', target_krr=.2)
    history = fit(model, data, 12, show_progress=False)
    krr = history.series('krr')
    assert krr[0] > 2 * krr[3] and krr[-1] == krr[-2] == krr[6], 'six of twelve epochs'
    assert module_masks(model.masks.gates.gates)[:, :-1].mean() == pytest.approx(.2, abs=.02)
    assert history.best_epoch > 5, 'an epoch before the gates were frozen'


def test_gates_are_open_or_closed_and_leave_no_layer_empty(data: ImageData) -> None:
    model, _ = trained('composable', data, 3)
    gates = model.masks.gates
    assert set(gates.gates.unique().tolist()) == {0., 1.}
    kernels = (gates.gates * gates.kernels).sum()
    assert gates.krr.item() == pytest.approx((kernels / (10 * gates.kernels.sum())).item())
    for group in gates.groups.unique():
        assert gates.gates[:, gates.groups == group].any(1).all(), 'a class without a kernel of some layer'


def test_what_trains_is_what_is_cut(data: ImageData) -> None:
    "With targets the model answers as the module for them does."
    model, _ = trained('composable', data, 3)
    parts = decompose(model.eval(), data.train, show_progress=False)
    images, pixels = (next(iter(split))[0] for split in (data.valid, data.valid.pixels()))
    for rows in ([1, 7], list(range(10))):
        targets = torch.zeros(len(images), 10, dtype=torch.bool)
        targets[:, rows] = True
        module = extract(model, parts, rows)
        with torch.no_grad(): expected = model(images, targets)[:, rows]
        assert torch.allclose(module(pixels), expected, atol=1e-4)


def test_the_full_model_without_a_path_of_its_own(data: ImageData) -> None:
    model, everyone = network(kind='composable', dense=False), torch.ones(1, 10, dtype=torch.bool)
    fit(model, data, 1, show_progress=False)
    images, _ = next(iter(data.valid))
    assert torch.allclose(model.eval()(images), model(images, everyone.expand(len(images), -1)))


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'composable'])
def test_masks_of_images_take_no_targets(method: str, data: ImageData) -> None:
    images, _ = next(iter(data.valid))
    with pytest.raises(ValueError, match='targets: .* made of each image'):
        network(kind=method)(images, torch.ones(len(images), 10, dtype=torch.bool))


def test_samples_of_a_batch_do_not_see_each_others_targets() -> None:
    model, images = network(kind='composable').eval(), torch.randn(2, 1, 8, 8)
    model.masks.gates.gates.bernoulli_(.5, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(10, dtype=torch.bool)[[3, 8]]
    with torch.no_grad():
        both = model(images, targets)
        alone = torch.cat([model(images[i:i + 1], targets[i:i + 1]) for i in range(2)])
    assert torch.allclose(both, alone, atol=1e-5)


class Sizes(TorchDispatchMode):
    "Notes every operation and the largest tensor that one made."
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor): self.largest = max(self.largest, t.numel())
        return out


def gate_step(n_classes: int, units: int, batch: int) -> Sizes:
    "What a step costs the gates."
    kernels = torch.ones(units, dtype=torch.long)
    gates = ClassGates(n_classes, kernels, torch.arange(units) % 20, kernel_costs(kernels)).train()
    model = SimpleNamespace(masks=SimpleNamespace(gates=gates))
    labels = torch.randint(n_classes, (batch,))
    with Sizes() as sizes:
        gates(draw_targets(labels, n_classes, .3)).square().mean().backward()
        Composable(dense=False).after_backward(model, labels, .2)
    return sizes


def test_gates_scale_with_classes() -> None:
    "1,000 classes and 2,500 kernels: no loop but a bisection, no tensor of batch x classes x kernels."
    small, large = gate_step(10, 500, 16), gate_step(1000, 2500, 64)
    assert large.calls < 1.3 * small.calls
    assert large.largest <= 1000 * (2500 + 1)               # one column counts the samples


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_target_sets(n_classes: int, batch: int, full: float, seed: int) -> None:
    with seeded(seed):
        labels = torch.randint(n_classes, (batch,))
        targets = draw_targets(labels, n_classes, full)
    assert targets.shape == (batch, n_classes)
    assert targets[torch.arange(batch), labels].all() and targets.sum(1).min() >= 2
    if full == 1: assert targets.all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(2, 60), st.floats(.02, 1), st.integers(0, 99))
def test_open_gates_keep_to_the_fraction(n_classes: int, units: int, fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_classes, units, generator=generator)
    kernels = torch.randint(1, 5, (units,), generator=generator)
    groups = torch.arange(units) % 3
    costs = kernel_costs(kernels)
    gates = open_gates(scores, costs, groups, fraction)
    must = 2 * 3 * kernels.max() / kernels.sum()            # at least one of each group
    assert costs.fraction(module_masks(gates)).mean() <= max(fraction, must) + 1e-6
    assert all(gates[:, groups == g].any(1).all() for g in groups.unique())
    if fraction == 1: assert gates.all()


# What training leaves behind

def nothing_is_recorded(model: nn.Module) -> bool:
    "Does no mask point hold on to a step, or to masks that were given by hand?"
    return all(p.masks is None and p.outputs is None and p.fixed is None for p in mask_points(model).values())


@every_method
def test_no_masks_are_kept(method: str, data: ImageData) -> None:
    model, _ = trained(method, data)
    evaluate(model, data.valid)
    assert nothing_is_recorded(model)
    twin = copy.deepcopy(model)
    assert same_state(twin, model) and twin is not model
    assert evaluate(twin, data.valid) == evaluate(model, data.valid)


@every_method
def test_no_masks_are_kept_after_an_error(method: str) -> None:
    model = network(kind=method)
    wrong = torch.zeros(2, 3, 8, 8)
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(RuntimeError, match='channels'): training_loss(model, wrong, labels)
    assert nothing_is_recorded(model)
    copy.deepcopy(model)


@every_kind
def test_bfloat16(kind: str, data: ImageData) -> None:
    model, (images, labels) = network('resnet18', kind).train(), next(iter(data.train))
    with torch.autocast('cpu', torch.bfloat16): loss, logged = training_loss(model, images, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(v.isfinite() for v in logged.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    full, _ = training_loss(network('resnet18', kind).train(), images, labels)
    assert torch.allclose(loss, full, rtol=.1)


@some_kinds                     # and every method in test_methods
def test_checkpoint_round_trip(kind: str, data: ImageData, tmp_path: Path) -> None:
    model, path = network('rescnn', kind), tmp_path/'deep'/'er'/'model.safetensors'
    fit(model, data, 1, checkpoint=path, show_progress=False)
    loaded = network('rescnn', kind, seed=7)
    about = load_checkpoint(loaded, path)
    assert same_state(loaded, model) and about['epoch'] == 1
    x = next(iter(data.valid))[0]
    with torch.no_grad(): assert torch.equal(model.eval()(x), loaded.eval()(x))
    if kind == PLAIN: return
    assert loaded.classes == model.classes == data.classes and about['method'] == kind
    if kind == 'composable': assert loaded.masks.gates.gates.mean() < .2


def test_checkpoint_keeps_class_names(tmp_path: Path) -> None:
    a, b = network(), network(seed=1)
    a.classes = [f'digit {i}' for i in range(10)]
    load_checkpoint(b, save_checkpoint(a, tmp_path/'model.safetensors', dict(note='ä')))
    assert b.classes == a.classes


class Shuffled(nn.Module):
    "A network whose layers are registered in another order than they run in."
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.body = nn.Conv2d(6, 8, 3, padding=1)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


RUNNING_ORDER = dict(mwt=['body'], composable=['stem', 'body'])

@every_kind
def test_layers_registered_in_another_order(kind: str, data: ImageData) -> None:
    model = Shuffled()
    if kind != PLAIN: model = modularize(model, 10, kind, example_input=torch.zeros(1, 1, 8, 8))
    fit(model, data, 1, show_progress=False)
    if kind in RUNNING_ORDER: assert list(model.kernels) == RUNNING_ORDER[kind]


# Runs that are resumed

def stop_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    "Training stops at the end of an epoch, before it is kept."
    left = iter(range(1, 100))

    def judge(*args: Any) -> float:
        if next(left) == epoch: raise InterruptedError('stop')
        return evaluate(*args)

    monkeypatch.setattr('mwt.train.fit.evaluate', judge)


@pytest.fixture(scope='module')
def whole_run(data: ImageData) -> Callable[[str], tuple[nn.Module, History]]:
    "A run of six epochs that nobody stopped, made once for each kind."
    return functools.cache(lambda kind: trained(kind, data, 6, seed=3))


# Kernels close; what is closed stays so, while gates learn; they are frozen from the next step on; they are
# frozen. Every method does so once in test_methods.
@pytest.mark.parametrize('kind, epoch', [(PLAIN, 4), *(('composable', epoch) for epoch in (2, 3, 4, 6))])
def test_a_stopped_run_ends_as_if_it_had_not_been(kind: str, epoch: int, data: ImageData, whole_run: Callable,
                                                  monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path/'run.safetensors'
    whole, expected = whole_run(kind)
    stop_in(epoch, monkeypatch)
    with pytest.raises(InterruptedError): trained(kind, data, 6, seed=3, resume=path)
    assert load_tensors(path, 'run')[1]['done'] == (epoch - 1) * len(data.train)
    monkeypatch.undo()
    again = network(seed=5, kind=kind)
    history = fit(again, data, 6, seed=3, resume=path, show_progress=False)
    assert history == expected and same_state(again, whole) and not path.exists()


@pytest.fixture
def stopped(data: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    "The file of a run of three epochs that was stopped in the second."
    path = tmp_path/'run.safetensors'
    stop_in(2, monkeypatch)
    with pytest.raises(InterruptedError): trained('composable', data, 3, resume=path)
    monkeypatch.undo()
    return path


@pytest.mark.parametrize('wrong', [dict(lr=.1), dict(seed=1), dict(weight_decay=.1), dict(epochs=4)], ids=str)
def test_run_of_other_settings_is_refused(wrong: dict, stopped: Path, data: ImageData) -> None:
    kept = stopped.read_bytes()
    with pytest.raises(ValueError, match=f'{[*wrong][0]}.* give the same settings'):
        trained('composable', data, **dict(epochs=3, resume=stopped) | wrong)
    assert stopped.read_bytes() == kept


def test_run_of_another_network_is_refused(stopped: Path, data: ImageData) -> None:
    kept = stopped.read_bytes()
    for kind in (PLAIN, 'mwt'):
        with pytest.raises(ValueError, match='method'): trained(kind, data, 3, resume=stopped)
    other = network('rescnn', 'composable')
    with pytest.raises(ValueError, match='another network: net'):
        fit(other, data, 3, resume=stopped, show_progress=False)
    assert stopped.read_bytes() == kept


def test_damaged_run_is_refused(stopped: Path, data: ImageData) -> None:
    kept = stopped.read_bytes()
    for damage, word in ((kept[:100], 'truncated'), (kept[:-1] + bytes([kept[-1] ^ 1]), 'damaged')):
        stopped.write_bytes(damage)
        with pytest.raises(ValueError, match=word): trained('composable', data, 3, resume=stopped)


@pytest.mark.slow
def test_compiled_training_learns_the_same(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, quick = [], nn.Module.compile

    def traced(net: nn.Module) -> None:
        compiled.append(net)
        quick(net, backend='aot_eager')         # traced as always, without the wait for a C++ compiler

    def losses(compile: bool) -> list[float]:
        return trained('composable', data, 2, lr=1e-3, compile=compile)[1].series('loss')

    monkeypatch.setattr(nn.Module, 'compile', traced)
    assert losses(True) == pytest.approx(losses(False), rel=1e-3)
    assert len(compiled) == 2                   # the network, and the one without closed kernels


def test_unknown_compile_is_refused(data: ImageData) -> None:
    with pytest.raises(ValueError, match="unknown compile 'never'"): fit(network(), data, 1, compile='never')


# Files of version 0.1.0

OLD = {'composable': 'resnet18', 'mwt': 'simcnn'}           # method -> network
old_file = pytest.mark.parametrize('method', OLD)

def old(method: str) -> tuple[nn.Module, Path]:
    "A network like the one in the files, and where they are."
    net = create_model(OLD[method], 10, .0625, 1, seed=0)
    settings: dict[str, Any] = {}
    if method == 'composable': settings = dict(dense=False, target_krr=.15, close_from=.1, target_by=1.)
    return modularize(net, 10, method, seed=0, **settings), ROOT/'tests'/'fixtures'/'0.1.0'/method


@old_file
def test_old_checkpoint_answers_the_same(method: str) -> None:
    model, folder = old(method)
    load_checkpoint(model, folder/'model.safetensors')
    expected = json.loads((folder/'answers.json').read_text())
    x = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    with torch.no_grad(): assert torch.allclose(model.eval()(x), torch.tensor(expected['full']), atol=1e-5)


def test_old_checkpoint_for_a_network_of_todays_settings() -> None:
    _, folder = old('composable')
    model = modularize(create_model(OLD['composable'], 10, .0625, 1, seed=0), 10)
    says = 'it was made with target_krr=0.15, close_from=0.1, target_by=1.0, dense=False'
    with pytest.raises(ValueError, match=says):
        load_checkpoint(model, folder/'model.safetensors')


@old_file
def test_old_run_is_resumed(method: str, tmp_path: Path) -> None:
    model, folder = old(method)
    path = tmp_path/'resume.safetensors'
    shutil.copy(folder/'resume.safetensors', path)
    first = load_tensors(path, 'run')[1]['history']['rows']
    digits = image_data('digits', batch_size=128, device='cpu')
    history = fit(model, digits, 3, resume=path, show_progress=False)
    assert history.rows[:len(first)] == first and history.series('epoch') == [1, 2, 3]
    assert not path.exists()


@old_file
def test_old_run_of_other_settings_is_refused(method: str, tmp_path: Path) -> None:
    _, folder = old(method)
    path = tmp_path/'resume.safetensors'
    shutil.copy(folder/'resume.safetensors', path)
    net = create_model(OLD[method], 10, .0625, 1, seed=0)
    settings = dict(skip_first=True, dense=False) if method == 'composable' else dict(skip_first=False)
    other = modularize(net, 10, method, seed=0, **settings)
    with pytest.raises(ValueError, match='holds a run with method .*skip_first'):
        fit(other, image_data('digits', batch_size=128, device='cpu'), 3, resume=path, show_progress=False)


# Data loaders

@pytest.fixture(scope='module')
def loaders(data: ImageData) -> tuple[DataLoader, DataLoader]:
    "The same digits as `DataLoader`s, for training and validation."
    train, valid = [TensorDataset(*split.take(split.n)) for split in (data.train, data.valid)]
    return DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(valid, 64)


@some_kinds
def test_loaders_are_learned_and_seeded(kind: str, loaders: tuple[DataLoader, DataLoader]) -> None:
    (a, rows), (b, again), (c, _) = (trained(kind, loaders, 2, seed, device='cpu') for seed in (0, 0, 1))
    assert same_state(a, b) and rows == again
    assert not same_state(a, c)
    assert rows.series('valid_accuracy')[rows.best_epoch - 1] == evaluate(a, as_valid(loaders))


def as_valid(loaders: tuple[DataLoader, DataLoader]) -> Any:
    from mwt.data.loaders import as_batches
    return as_batches(loaders[1], classes=10, device='cpu')


def test_batches_given_by_hand_train_like_image_data(data: ImageData) -> None:
    "A list of batches is what `image_data` would give, if it gave the same ones each epoch."
    batches = list(data.train.seed(0))
    a, rows = trained('composable', (batches, list(data.valid)), 1, device='cpu')
    b, expected = trained('composable', data, 1)
    assert same_state(a, b) and rows == expected


def test_a_stopped_run_with_loaders_goes_on_at_its_epoch(loaders: tuple[DataLoader, DataLoader],
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         tmp_path: Path) -> None:
    path = tmp_path/'run.safetensors'
    whole, expected = trained('composable', loaders, 4, device='cpu')
    stop_in(3, monkeypatch)
    with pytest.raises(InterruptedError): trained('composable', loaders, 4, resume=path, device='cpu')
    monkeypatch.undo()
    assert load_tensors(path, 'run')[1]['done'] == 2 * len(loaders[0])
    again, history = trained('composable', loaders, 4, resume=path, device='cpu')
    assert history == expected and same_state(again, whole)     # these loaders draw from the global generator


def test_loader_of_another_number_of_classes(loaders: tuple[DataLoader, DataLoader]) -> None:
    narrow = create_model('simcnn', 7, .1, 1, seed=0)
    with pytest.raises(ValueError, match='label'): fit(narrow, loaders, 1, device='cpu', show_progress=False)


# Processes that are killed

KILLED = """
import os, signal, sys, time
import mwt.runs.commands            # before the fork: PyTorch takes seconds
from mwt.runs.cli import main

def train(words, kill_at):
    "In a process of its own; killed before it puts its n-th file, written beside its place, into it."
    if process := os.fork(): return process
    done, replace = 0, os.replace
    def counting(source, target):
        nonlocal done
        done += 1
        if done == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = counting
    try: main(words)
    finally: os._exit(1)

first, second, middle, *words = sys.argv[1:]
outs = (first, 1), (second, 2), (middle, 0)
processes = [train([*words, '--out', out], kill_at) for out, kill_at in outs]
ends = [os.waitpid(p, 0)[1] for p in processes[:2]]
limit = time.monotonic() + 240
checkpoint = os.path.join(middle, 'model.safetensors')
while not os.path.exists(checkpoint) and time.monotonic() < limit: time.sleep(.01)
time.sleep(.3)
os.kill(processes[2], signal.SIGKILL)
ends.append(os.waitpid(processes[2], 0)[1])
assert all(os.WIFSIGNALED(e) for e in ends), ends
"""
WORDS = ['train', '--data', 'digits', '--width', '0.1', '--batch-size', '256', '--seed', '1',
         '--device', 'cpu']


@pytest.fixture(scope='module')
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "Folders of runs that were killed, at three moments."
    folder = tmp_path_factory.mktemp('killed')
    outs = {when: folder/when for when in ('first', 'second', 'middle')}
    cmd = [sys.executable, '-c', KILLED, *map(str, outs.values()), *WORDS, '--epochs', '100000']
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return outs


@pytest.mark.parametrize('when, checkpoint', [('first', False), ('second', False), ('middle', True)])
def test_killed_run_leaves_whole_files(when: str, checkpoint: bool, killed: dict[str, Path]) -> None:
    "No checkpoint or a whole one, and the folder does not pass for a run."
    out = killed[when]
    if when != 'middle': assert any(p.name[0] == '.' for p in out.iterdir()), 'killed at another moment'
    assert (out/'model.safetensors').exists() == checkpoint and not (out/'run.json').exists()
    if checkpoint: assert load_checkpoint(network(kind='composable'), out/'model.safetensors')['epoch'] >= 1


@pytest.mark.parametrize('when, way', [
    ('first', ''), pytest.param('second', 'go on with it by --resume', marks=pytest.mark.slow),
    ('middle', 'go on with it by --resume')])
def test_killed_run_says_how_to_go_on(when: str, way: str, killed: dict[str, Path],
                                      capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = tmp_path/'run'
    shutil.copytree(killed[when], out)
    assert main(['decompose', '--out', str(out)]) == 2
    assert 'holds no run' in capsys.readouterr().err
    again = [*WORDS, '--epochs', '1', '--out', str(out)]
    assert main(again) == (2 if way else 0), 'where nothing was written, the same command starts'
    assert way in capsys.readouterr().err
    assert main([*again, '--overwrite']) == 0 and main(['decompose', '--out', str(out)]) == 0
    files = {p.name for p in out.iterdir() if p.name[0] != '.'}
    assert files == {'run.json', 'history.json', 'model.safetensors', 'parts.safetensors'}
