"Training repeats, chooses on validation data, never waits for the device, and leaves whole files however it ends."
from __future__ import annotations
import copy, math, random, subprocess, sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
import mwt.training
from mwt.runs.cli import main
from mwt.methods.modular import modularize
from mwt.core.files import load_tensors
from mwt.core.display import progress
from mwt.core.checks import seeded
from mwt.data.batches import Batches, ImageData, from_tensors
from mwt.data.sources import image_data
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.methods.composable import ClassGates, Composable, draw_targets, open_gates
from mwt.measure import evaluate
from mwt.networks import create_model
from mwt.train.history import TrainConfig, lr_factor, make_config
from mwt.train.trainer import Trainer, train_epoch, training_loss
from mwt.train.fit import fit
from mwt.train.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope='module')
def data() -> ImageData:
    "400 digits to learn, 137 to choose by."
    digits = image_data('digits', batch_size=64, device='cpu')
    return ImageData(digits.train.sample(400), digits.valid, digits.test)


def network(name: str = 'simcnn', modular: bool | str = 'mwt', seed: int = 0, **settings: Any) -> nn.Module:
    net = create_model(name, 10, .1, 1, seed=seed)
    if not modular: return net
    return modularize(net, 10, modular, seed=seed, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    "The same bits everywhere, buffers too."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


every_kind = pytest.mark.parametrize('modular', [False, 'mwt', 'composable'], ids=['plain', 'mwt', 'composable'])


# A seed repeats everything, and disturbs nothing

@every_kind
@pytest.mark.parametrize('name', ['simcnn', 'rescnn'])
def test_seed_repeats_every_bit(name: str, modular: bool | str, data: ImageData) -> None:
    runs = []
    for seed in (3, 3, 4):
        model = network(name, modular)
        runs.append((model, fit(model, data, 2, seed=seed, show_progress=False)))
        torch.randn(1), random.random(), np.random.rand()       # what happens between runs is no part of them
    (a, rows_a), (b, rows_b), (c, rows_c) = runs
    assert same(a, b) and rows_a == rows_b
    assert not same(a, c) and rows_a != rows_c


def test_initial_weights_follow_their_seed() -> None:
    assert same(network(seed=1), network(seed=1)) and not same(network(seed=1), network(seed=2))


def generators() -> tuple:
    return random.getstate(), [s.tolist() if isinstance(s, np.ndarray) else s for s in np.random.get_state()], torch.get_rng_state().tolist()


@every_kind
def test_global_generators_are_left_alone(modular: bool | str, data: ImageData) -> None:
    before = generators()
    model = network('rescnn', modular)                          # with dropout
    fit(model, data, 1, show_progress=False)
    assert generators() == before
    with pytest.raises(FloatingPointError): fit(model, data, 1, lr=1e30, show_progress=False)
    assert generators() == before


def test_data_are_left_alone(data: ImageData) -> None:
    "Two fits of one data object see the same batches; what else iterates over it does not matter."
    a, b = network(modular=False), network(modular=False)
    fit(a, data, 1, show_progress=False)
    assert data.train.epoch == 0
    next(iter(data.train))
    fit(b, data, 1, show_progress=False)
    assert same(a, b)


def seen(model: nn.Module, data: ImageData, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list, list]:
    "The batches and the learning rates of a fit."
    batches, rates, step = [], [], torch.optim.SGD.step
    def loss(model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Any:
        batches.append((images.clone(), labels.clone()))
        return training_loss(model, images, labels, progress)
    def spy(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        rates.append(tuple(self.param_groups[0][k] for k in ('lr', 'momentum', 'weight_decay', 'nesterov')))
        return step(self, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(mwt.training, 'training_loss', loss)
        m.setattr(torch.optim.SGD, 'step', spy)
        fit(model, data, show_progress=False, **options)
    return batches, rates


@pytest.mark.parametrize('method', ['mwt', 'composable'])
def test_plain_and_modular_get_the_same_recipe(method: str, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    (a, rates_a), (b, rates_b) = [seen(network('rescnn', modular), data, monkeypatch, epochs=2, seed=5) for modular in (False, method)]
    assert len(a) == len(b) == 2 * len(data.train) and rates_a == rates_b
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))
    assert not any(torch.equal(a[i][0], a[len(data.train) + i][0]) for i in range(len(data.train))), 'each epoch has an order of its own'


def test_no_penalty_means_plain_cross_entropy(data: ImageData) -> None:
    model, (images, labels) = network(alpha=0, beta=0).eval(), next(iter(data.train))
    loss, parts = training_loss(model, images, labels)
    assert torch.equal(loss.detach(), parts['cross_entropy']) and torch.equal(loss, nn.functional.cross_entropy(model(images), labels))
    weighted = network(alpha=.3, beta=.7).eval()
    loss, p = training_loss(weighted, images, labels)
    assert torch.allclose(loss, p['cross_entropy'] + .3 * p['cohesion_loss'] + .7 * p['coupling_loss'])


# The learning rate

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.floats(0, 1))
def test_learning_rate_rises_then_falls_to_nothing(total: int, warmup: float) -> None:
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    top = factors.index(max(factors))
    assert factors[:top + 1] == sorted(factors[:top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert abs(top - warmup * total) <= 1
    if (1 - warmup) * total >= 1: assert lr_factor(total, total, warmup) < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400))
def test_without_warmup_it_is_half_a_cosine(total: int) -> None:
    for step in range(total): assert lr_factor(step, total, 0) == pytest.approx((1 + math.cos(math.pi * step / total)) / 2)


def test_every_step_follows_the_schedule(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rates = seen(network(modular=False), data, monkeypatch, epochs=3, lr=.2, warmup=.25, momentum=.8, weight_decay=1e-3)
    total = 3 * len(data.train)
    assert rates == [(pytest.approx(.2 * lr_factor(s, total, .25)), .8, 1e-3, True) for s in range(total)]
    _, rates = seen(network(modular=False), data, monkeypatch, epochs=1, momentum=0.)
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
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(said)
    monkeypatch.setattr(mwt.training, 'evaluate', say)
    return states


@pytest.mark.parametrize('accuracies, best', [([.1, .5, .3], 2), ([.9, .5, .3], 1), ([.1, .2, .3], 3), ([.4, .4, .4], 1), ([0., 0., 0.], 1)])
def test_best_epoch_is_chosen_on_validation(accuracies: list[float], best: int, data: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, path = network(), tmp_path/'model.safetensors'
    states = scripted(monkeypatch, accuracies)
    history = fit(model, data, 3, checkpoint=path, show_progress=False)
    assert history.best_epoch == best and history.series('valid_accuracy') == accuracies
    kept = model.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in states[best - 1].items())
    about = load_checkpoint(loaded := network(seed=9), path)
    assert same(loaded, model) and (about['epoch'], about['valid_accuracy']) == (best, accuracies[best - 1])
    assert list(tmp_path.iterdir()) == [path]


def test_reported_accuracy_is_that_of_the_kept_weights(data: ImageData) -> None:
    model = network(modular=False)
    history = fit(model, data, 3, show_progress=False)
    assert evaluate(model, data.valid) == max(history.series('valid_accuracy')) == history.series('valid_accuracy')[history.best_epoch - 1]


class Untouchable(Batches):
    "Images that nobody may look at."
    def _refuse(self, *args: Any) -> Any: raise AssertionError('the test part was read')
    __iter__ = _batch = _plan = normalise = plain = subset = sample = _refuse


def test_test_part_is_never_read(data: ImageData) -> None:
    t = data.test
    forbidden = Untouchable(torch.zeros_like(t.images), t.labels, t.classes, mean=t.mean, std=t.std)
    a, b = network(), network()
    fit(a, ImageData(data.train, data.valid, forbidden), 1, show_progress=False)
    fit(b, data, 1, show_progress=False)
    assert same(a, b)


@every_kind
def test_history_is_whole(modular: bool | str, data: ImageData) -> None:
    history = fit(network(modular=modular), data, 3, show_progress=False)
    columns = ['epoch', 'cross_entropy', 'train_accuracy', *dict(mwt=['cohesion_loss', 'coupling_loss'], composable=['krr']).get(modular, []), 'loss', 'valid_accuracy']
    assert [list(row) for row in history.rows] == [columns] * 3 and history.series('epoch') == [1, 2, 3]
    for row in history.rows:
        assert all(math.isfinite(v) for v in row.values()) and 0 <= row['train_accuracy'] <= 1 and 0 <= row['valid_accuracy'] <= 1
        if modular == 'mwt': assert row['loss'] == pytest.approx(row['cross_entropy'] + .5 * row['cohesion_loss'] + 1.5 * row['coupling_loss'], rel=1e-5)
        else: assert row['cross_entropy'] <= row['loss'] * (1 + 1e-6) and row['loss'] <= 2 * row['cross_entropy'] * (1 + 1e-6)     # in two roles once gates stand still
        if modular is False: assert row['loss'] == row['cross_entropy']
    assert len(history.table()) == 3 and 1 <= history.best_epoch <= 3


def test_it_learns(data: ImageData) -> None:
    plain, modular = network(modular=False), network()
    assert fit(plain, data, 10, seed=1, show_progress=False).series('train_accuracy')[-1] > .4
    history = fit(modular, data, 6, seed=1, show_progress=False)
    assert history.rows[-1]['loss'] < history.rows[0]['loss']


# A step asks nothing of the device, and does not grow with samples or classes

WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', 'item', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount'}


class Watch(TorchDispatchMode):
    "Counts operations; on a GPU, those in `WAITS` and indexing by a mask would hold the step up."
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith('index') and any(isinstance(i, Tensor) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a)
        if name in WAITS or masked: raise AssertionError(f'{name} makes the step wait for the device')
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))


EPOCHS = pytest.mark.parametrize('epochs', [10, 1.5], ids=['gates learn', 'gates stand still'])      # of the run; its second one is watched

def step_calls(model: nn.Module, batches: Batches, epochs: float = 10) -> Counter[str]:
    "The operations of an epoch, the second of a run."
    run, bar = Trainer(model, TrainConfig(amp=True), int(epochs * len(batches))), progress(range(100), show_progress=False)
    train_epoch(run, batches, bar)
    with Watch() as watch: means = train_epoch(run, batches, bar)
    assert all(isinstance(v, Tensor) and v.ndim == 0 and not v.requires_grad for v in means.values())
    return watch.calls


def random_batches(samples: int, n_classes: int, batch_size: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(samples) % n_classes
    names, part = [str(i) for i in range(n_classes)], (images, labels)
    return from_tensors(part, part, part, names, batch_size, device='cpu').train


@EPOCHS
@every_kind
@pytest.mark.parametrize('name', ['simcnn', 'resnet18'])
def test_step_never_waits(name: str, modular: bool | str, epochs: float, data: ImageData) -> None:
    assert sum(step_calls(network(name, modular), data.train, epochs).values()) > 100


def test_watch_sees_what_it_should() -> None:
    x = torch.arange(4.)
    for wait in (lambda: x.sum().item(), lambda: bool(x.sum() > 1), lambda: x[x > 1], lambda: float(x[0]), lambda: x.unique(), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match='wait'), Watch(): wait()


@pytest.mark.parametrize('method', ['mwt', 'composable'])
def test_step_does_not_grow_with_samples_or_classes(method: str) -> None:
    "As many operations for 8 images of 2 classes as for 64 of 32: no loop runs over either."
    def calls(n_classes: int, batch_size: int) -> Counter[str]:
        with seeded(0): model = modularize(create_model('simcnn', n_classes, .1, 1), n_classes, method)
        return step_calls(model, random_batches(2 * batch_size, n_classes, batch_size))
    assert calls(2, 8) == calls(2, 64) == calls(32, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@EPOCHS
@every_kind
def test_step_never_waits_on_a_gpu(modular: bool | str, epochs: float, data: ImageData) -> None:
    model, batches = network('resnet18', modular).to('cuda', memory_format=torch.channels_last), data.train.to('cuda')
    run, bar = Trainer(model, TrainConfig(amp=True), int(epochs * len(batches))), progress(range(100), show_progress=False)
    train_epoch(run, batches, bar)
    plan = batches._plan(1)                 # the epoch's order comes from the host, once
    batches._plan = lambda epoch: plan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: train_epoch(run, batches, bar)
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_gpu_learns_too(data: ImageData) -> None:
    model = network(modular=False)
    assert fit(model, data, 10, seed=1, show_progress=False).series('train_accuracy')[-1] > .4
    assert next(model.parameters()).is_cuda


# Class gates

def test_gates_close_to_the_target_and_stand_still(data: ImageData) -> None:
    model = network(modular='composable', target_krr=.2)
    history = fit(model, data, 8, show_progress=False)
    krr = history.series('krr')
    assert krr[0] > .5 and krr == sorted(krr, reverse=True) and krr[-1] == krr[-2] == pytest.approx(.2, abs=.02)
    assert history.best_epoch > 4, 'an epoch before the gates came to rest'
    gates, kernels = model.gates.gates, model.gates.kernels
    assert set(gates.unique().tolist()) == {0., 1.} and model.gates.krr == pytest.approx((gates * kernels).sum().item() / (10 * kernels.sum().item()))
    for group in model.gates.groups.unique(): assert gates[:, model.gates.groups == group].any(1).all(), 'a class without a kernel of some layer'


def test_what_trains_is_what_is_cut(data: ImageData) -> None:
    "The full model is the module of all classes, and with targets the model answers as the module for them does."
    model = network(modular='composable')
    fit(model, data, 3, show_progress=False)
    parts, (images, _) = decompose(model.eval(), data.train, show_progress=False), next(iter(data.valid))
    for rows in ([1, 7], list(range(10))):
        targets = torch.zeros(len(images), 10, dtype=torch.bool)
        targets[:, rows] = True
        with torch.no_grad(): assert torch.allclose(extract(model, parts, rows)(images), model(images, targets)[:, rows], atol=1e-4)
    assert torch.allclose(model(images), model(images, torch.ones(len(images), 10, dtype=torch.bool)))
    with pytest.raises(ValueError, match='masks of method MwT are made of each image'): network()(images, targets)


def test_samples_of_a_batch_do_not_see_each_others_targets() -> None:
    model, images = network(modular='composable').eval(), torch.randn(2, 1, 8, 8)
    model.gates.gates.bernoulli_(.5, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(10, dtype=torch.bool)[[3, 8]]
    with torch.no_grad(): both, alone = model(images, targets), torch.cat([model(images[i:i + 1], targets[i:i + 1]) for i in range(2)])
    assert torch.allclose(both, alone, atol=1e-5)


class Sizes(TorchDispatchMode):
    "Notes every operation and the largest tensor that one made."
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor): self.largest = max(self.largest, t.numel())
        return out


def test_gates_scale_with_classes() -> None:
    "1,000 classes and 5,000 kernels: no loop, and no tensor of batch x classes x kernels."
    def step(n_classes: int, units: int, batch: int) -> Sizes:
        method, kernels = Composable(), torch.ones(units, dtype=torch.long)
        gates, labels = ClassGates(n_classes, kernels, torch.arange(units) % 20).train(), torch.randint(n_classes, (batch,))
        with Sizes() as sizes:
            gates(draw_targets(labels, n_classes, .3)).square().mean().backward()
            method.after_backward(SimpleNamespace(gates=gates), labels, .3)
        return sizes
    small, large = step(10, 500, 16), step(1000, 5000, 64)
    assert small.calls == large.calls and large.largest <= 1000 * (5000 + 1)         # one column counts the samples


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_target_sets(n_classes: int, batch: int, full: float, seed: int) -> None:
    with seeded(seed): labels, targets = (y := torch.randint(n_classes, (batch,))), draw_targets(y, n_classes, full)
    assert targets.shape == (batch, n_classes) and targets[torch.arange(batch), labels].all() and targets.sum(1).min() >= 2
    if full == 1: assert targets.all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(2, 60), st.floats(.02, 1), st.integers(0, 99))
def test_open_gates_keep_to_the_share(n_classes: int, units: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, kernels = torch.rand(n_classes, units, generator=generator), torch.randint(1, 5, (units,), generator=generator)
    groups = torch.arange(units) % 3
    gates = open_gates(scores, kernels, groups, share)
    must = n_classes * 3 * kernels.max()                                       # at least one of each group
    assert (gates * kernels).sum() <= share * n_classes * kernels.sum() + must
    assert all(gates[:, groups == g].any(1).all() for g in groups.unique())
    if share == 1: assert gates.all()


# What training leaves behind

def test_no_masks_are_kept(data: ImageData) -> None:
    model = network()
    fit(model, data, 1, show_progress=False)
    evaluate(model, data.valid)
    assert all(layer.record is None and layer.fixed is None for layer in model.points.values())
    twin = copy.deepcopy(model)
    assert same(twin, model) and twin is not model and evaluate(twin, data.valid) == evaluate(model, data.valid)


def test_no_masks_are_kept_after_an_error(data: ImageData) -> None:
    model = network()
    with pytest.raises(RuntimeError): training_loss(model, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    assert all(layer.record is None for layer in model.points.values())
    copy.deepcopy(model)


@every_kind
def test_bfloat16(modular: bool | str, data: ImageData) -> None:
    model, (images, labels) = network('resnet18', modular).train(), next(iter(data.train))
    with torch.autocast('cpu', torch.bfloat16): loss, parts = training_loss(model, images, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and all(v.isfinite() for v in parts.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    full, _ = training_loss(network('resnet18', modular).train(), images, labels)
    assert torch.allclose(loss, full, rtol=.1)


@every_kind
def test_checkpoint_round_trip(modular: bool | str, data: ImageData, tmp_path: Path) -> None:
    model, path = network('rescnn', modular), tmp_path/'deep'/'er'/'model.safetensors'
    fit(model, data, 1, checkpoint=path, show_progress=False)
    about = load_checkpoint(loaded := network('rescnn', modular, seed=7), path)
    assert same(loaded, model) and about['epoch'] == 1
    x = next(iter(data.valid))[0]
    with torch.no_grad(): assert torch.equal(model.eval()(x), loaded.eval()(x))
    if modular: assert loaded.classes == model.classes == data.classes and about['method'] == modular
    if modular == 'composable': assert loaded.gates.gates.mean() < .2 and torch.equal(loaded.gates.gates, model.gates.gates)


def test_checkpoint_keeps_class_names(data: ImageData, tmp_path: Path) -> None:
    a, b = network(), network(seed=1)
    a.classes = [f'digit {i}' for i in range(10)]
    load_checkpoint(b, save_checkpoint(a, tmp_path/'model.safetensors', dict(note='ä')))
    assert b.classes == a.classes


class Shuffled(nn.Module):
    "A network whose layers are registered in another order than they run in."
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.stem = nn.Linear(8, 10), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor: return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


@every_kind
def test_layers_registered_in_another_order(modular: bool | str, data: ImageData) -> None:
    model = modularize(Shuffled(), 10, modular, example_input=torch.zeros(1, 1, 8, 8)) if modular else Shuffled()
    fit(model, data, 1, show_progress=False)
    if modular: assert list(model.kernels) == dict(mwt=['body'], composable=['stem', 'body'])[modular]


# Runs that are taken up again

def stop_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    "Training stops at the end of an epoch, before it is kept."
    left = iter(range(1, 100))
    def judge(*args: Any) -> float:
        if next(left) == epoch: raise InterruptedError('stop')
        return evaluate(*args)
    monkeypatch.setattr(mwt.training, 'evaluate', judge)


@pytest.mark.parametrize('epoch', [2, 4, 6])        # gates learn; they stand still from the next step on; on the network without closed kernels
@every_kind
def test_a_stopped_run_ends_as_if_it_had_not_been(modular: bool | str, epoch: int, data: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, path = network(modular=modular), tmp_path/'run.safetensors'
    expected = fit(whole, data, 6, seed=3, show_progress=False)
    stop_in(epoch, monkeypatch)
    with pytest.raises(InterruptedError): fit(network(modular=modular), data, 6, seed=3, resume=path, show_progress=False)
    assert load_tensors(path, 'run')[1]['done'] == (epoch - 1) * len(data.train)
    monkeypatch.undo()
    history = fit(again := network(seed=5, modular=modular), data, 6, seed=3, resume=path, show_progress=False)
    assert history == expected and same(again, whole) and not path.exists()


def test_run_of_another_kind_is_refused(data: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path/'run.safetensors'
    stop_in(2, monkeypatch)
    with pytest.raises(InterruptedError): fit(network(modular='composable'), data, 3, resume=path, show_progress=False)
    monkeypatch.undo()
    kept = path.read_bytes()
    for wrong in (dict(lr=.1), dict(seed=1), dict(weight_decay=.1), dict(epochs=4)):
        with pytest.raises(ValueError, match=f'{[*wrong][0]}.* give the same settings'): fit(network(modular='composable'), data, **dict(epochs=3, resume=path, show_progress=False) | wrong)
    with pytest.raises(ValueError, match='method'): fit(network(modular=False), data, 3, resume=path, show_progress=False)
    with pytest.raises(ValueError, match='another network: net'): fit(network('rescnn', 'composable'), data, 3, resume=path, show_progress=False)
    assert path.read_bytes() == kept
    for damage, word in ((kept[:100], 'truncated'), (kept[:-1] + bytes([kept[-1] ^ 1]), 'damaged')):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=word): fit(network(modular='composable'), data, 3, resume=path, show_progress=False)


def test_compiled_training_learns_the_same(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, quick = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile', lambda net: (compiled.append(net), quick(net, backend='aot_eager')))      # traced as always, without the wait for a C++ compiler
    def losses(compile: bool) -> list[float]: return fit(network(modular='composable'), data, 2, lr=1e-3, compile=compile, show_progress=False).series('loss')
    assert losses(True) == pytest.approx(losses(False), rel=1e-3) and len(compiled) == 2     # the network, and the one without closed kernels
    with pytest.raises(ValueError, match="unknown compile 'never'"): fit(network(), data, 1, compile='never')


# Processes that are killed

KILLED = """
import os, signal, sys, time
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
processes = [train([*words, '--out', first], 1), train([*words, '--out', second], 2), train([*words, '--out', middle], 0)]
ends, limit = [os.waitpid(p, 0)[1] for p in processes[:2]], time.monotonic() + 60
while not os.path.exists(os.path.join(middle, 'model.safetensors')) and time.monotonic() < limit: time.sleep(.01)
time.sleep(.3)
os.kill(processes[2], signal.SIGKILL)
ends.append(os.waitpid(processes[2], 0)[1])
assert all(os.WIFSIGNALED(e) for e in ends), ends
"""
WORDS = ['train', '--data', 'digits', '--width', '0.1', '--seed', '1', '--device', 'cpu']


@pytest.fixture(scope='module')
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "Folders of runs that were killed, at three moments."
    folder = tmp_path_factory.mktemp('killed')
    outs = {when: folder/when for when in ('first', 'second', 'middle')}
    done = subprocess.run([sys.executable, '-c', KILLED, *map(str, outs.values()), *WORDS, '--epochs', '100000'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return outs


@pytest.mark.parametrize('when, checkpoint', [('first', False), ('second', True), ('middle', True)])
def test_killed(when: str, checkpoint: bool, killed: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    "No checkpoint or a whole one; the folder does not pass for a run; and it can be used again."
    out = killed[when]
    assert (out/'model.safetensors').exists() == checkpoint and not (out/'run.json').exists()
    if checkpoint: assert load_checkpoint(network(modular='composable'), out/'model.safetensors')['epoch'] >= 1
    if when != 'middle': assert any(p.name[0] == '.' for p in out.iterdir()), 'killed at another moment'
    assert main(['decompose', '--out', str(out)]) == 2 and 'holds no run' in capsys.readouterr().err
    again = [*WORDS, '--epochs', '1', '--out', str(out)]
    assert main(again) == 2 and ('go on with it by --resume' if when == 'middle' else 'already holds a run') in capsys.readouterr().err
    assert main([*again, '--overwrite']) == 0 and main(['decompose', '--out', str(out)]) == 0
    assert {p.name for p in out.iterdir() if p.name[0] != '.'} == {'run.json', 'history.json', 'model.safetensors', 'parts.safetensors'}
