"What every registered method has to keep: the contract of `mwt.methods.base.Method`."
from __future__ import annotations
import copy, functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
import pytest
import torch
from helpers import kernel_costs
from odd_networks import Small, few_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from mwt.core.signature import normalise
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.measure import evaluate
from mwt.methods.base import METHODS, Method, describe_method, make_method
from mwt.methods.composable import module_masks, open_gates
from mwt.methods.modular import ModularModel, fixed_masks, mask_table, modularize
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.modules.module import load_module, save_module
from mwt.modules.parts import Parts, load_parts, save_parts, union_masks
from mwt.networks import create_model
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import Fit, fit
from mwt.train.history import TrainConfig
from mwt.train.trainer import Trainer

BUILT_IN = sorted(METHODS)
NETWORKS = ('simcnn', 'resnet18')


@pytest.fixture(scope='session')
def digits() -> ImageData:
    return image_data('digits', batch_size=64, device='cpu')


@pytest.fixture(scope='session')
def few_digits(digits: ImageData) -> ImageData:
    "Enough for five steps an epoch."
    return ImageData(digits.train.sample(320), digits.valid.sample(64), digits.test.sample(64))


@functools.cache                # `modularize` checks for a quarter of a second
def made_once(method: str, network: str, width: float) -> ModularModel:
    return modularize(create_model(network, 10, width, 1, seed=0), 10, method)


def new_model(method: str, network: str = 'simcnn', width: float = 0.1) -> ModularModel:
    return copy.deepcopy(made_once(method, network, width))


@dataclass
class Trained:
    "A model that has learned the digits, and its parts."
    model: ModularModel
    parts: Parts


@pytest.fixture(scope='module', params=BUILT_IN)
def trained(request: pytest.FixtureRequest, digits: ImageData) -> Trained:
    model = new_model(request.param, width=0.15)
    fit(model, digits, 10 if request.param == 'composable' else 9, lr=0.1, show_progress=False)
    return Trained(model, decompose(model, digits.train, show_progress=False))


def test_it_learns(trained: Trained, digits: ImageData) -> None:
    assert evaluate(trained.model, digits.test) > 0.85


def test_parts_have_kernels_for_every_class(trained: Trained) -> None:
    parts = trained.parts
    assert parts.sizes == trained.model.kernels and parts.kept.shape == (10, sum(parts.sizes.values()))
    for layer, kept in parts.split(parts.kept).items(): assert kept.any(1).all(), layer


@pytest.mark.parametrize('classes', [['3'], ['0', '8'], [str(i) for i in range(10)]], ids=len)
def test_slim_equals_masked(trained: Trained, classes: list[str]) -> None:
    model, parts = trained.model.eval(), trained.parts
    module, masks = extract(model, parts, classes), union_masks(parts, classes)
    x = torch.rand(8, *model.input_shape, generator=torch.Generator().manual_seed(1))
    taken = normalise(x, module.pixel_mean, module.pixel_std)
    with torch.no_grad(), fixed_masks(model, masks):
        wanted = model(taken)[:, [parts.classes.index(c) for c in classes]]
    with torch.no_grad(): found = module(x)
    assert wanted.std() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('method', BUILT_IN)
def test_any_masks_are_cut_exactly(method: str, network: str) -> None:
    model = new_model(method, network).double().eval()
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if not isinstance(norm, torch.nn.BatchNorm2d): continue
        norm.running_mean.normal_(0, .1, generator=generator)
        with torch.no_grad(): norm.bias.normal_(0, .3, generator=generator)
    masks = random_masks(model, generator)
    x = torch.randn(4, *model.input_shape, generator=generator).double()
    with torch.no_grad(), fixed_masks(model, masks): wanted = model(x)
    with torch.no_grad(): found = model.cut(masks)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def random_masks(model: ModularModel, generator: torch.Generator) -> dict[str, Tensor]:
    "Half of the kernels of each layer; coupled layers get the same, as their number in the table says."
    numbers, drawn = model.masks.rows(), {}
    masks = {}
    for layer, kernels in model.kernels.items():
        group = numbers.get(layer, layer)
        if group not in drawn:
            drawn[group] = torch.rand(kernels, generator=generator) < .5
            drawn[group][0] = True
        masks[layer] = drawn[group]
    return masks


def test_files_give_back_what_was_saved(trained: Trained, tmp_path: Path) -> None:
    model, parts = trained.model.eval(), trained.parts
    save_checkpoint(model, tmp_path/'model.safetensors')
    twin = modularize(create_model('simcnn', 10, 0.15, 1), 10, model.method)
    load_checkpoint(twin, tmp_path/'model.safetensors')
    for name, value in model.state_dict().items(): assert torch.equal(value, twin.state_dict()[name]), name
    again = load_parts(save_parts(parts, tmp_path/'parts.safetensors'))
    assert torch.equal(again.kept, parts.kept) and again.classes == parts.classes
    module = extract(twin, again, ['2', '5'])
    stored = load_module(save_module(module, tmp_path/'module.safetensors'))
    x = torch.rand(3, *model.input_shape)
    with torch.no_grad(): assert torch.equal(stored(x), module(x))


class Stopped(Exception): "Instead of a power cut."


@pytest.mark.parametrize('method', BUILT_IN)
def test_a_stopped_run_ends_at_the_same_bits(method: str, few_digits: ImageData, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = dict(epochs=4, seed=3, show_progress=False)
    whole = new_model(method)
    fit(whole, few_digits, **options)
    save_run, stops = Fit.save_run, []
    def stop_after_two(self: Fit) -> None:
        save_run(self)
        stops.append(None)
        if len(stops) == 2: raise Stopped
    with monkeypatch.context() as patch:
        patch.setattr(Fit, 'save_run', stop_after_two)
        with pytest.raises(Stopped):
            fit(new_model(method), few_digits, resume=tmp_path/'run.safetensors', **options)
    resumed = new_model(method)
    fit(resumed, few_digits, resume=tmp_path/'run.safetensors', **options)
    for name, value in whole.state_dict().items(): assert torch.equal(value, resumed.state_dict()[name]), name


class HostReads(TorchDispatchMode):
    "Notes operations whose result the host has to wait for."
    WAITS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'equal')

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        chosen_by_mask = name == 'index' and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self.WAITS or name.startswith('_unique') or chosen_by_mask: self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_a_wait() -> None:
    with HostReads() as reads:
        torch.ones(2).sum().item()
        torch.ones(2)[torch.tensor([True, False])]
    assert reads.seen == ['_local_scalar_dense', 'index']


@pytest.mark.parametrize('progress', [0., 0.7])
@pytest.mark.parametrize('method', BUILT_IN)
def test_a_step_never_waits_for_the_device(method: str, progress: float) -> None:
    model = new_model(method).train()
    run = Trainer(model, TrainConfig(), 100)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    run.done = int(100 * progress)
    run.step(images, labels)            # a smaller network may take over here, once
    with HostReads() as reads: run.step(images, labels)
    assert not reads.seen


@pytest.mark.parametrize('method', BUILT_IN)
def test_a_method_is_its_name_and_settings(method: str) -> None:
    made = make_method(method)
    assert made.name == method and make_method(**describe_method(made)) == made
    assert made.__doc__ and set(describe_method(made)) == {'method', *(f.name for f in fields(made))}
    problem = f"method '{method}' has no setting 'no_such'"
    with pytest.raises(ValueError, match=problem): make_method(method, no_such=1)
    with pytest.raises(ValueError, match='put them into it'): make_method(made, no_such=1)


@pytest.mark.parametrize('method', BUILT_IN)
def test_it_says_what_it_cannot_do(method: str) -> None:
    with pytest.raises(ValueError, match='no layer is left'):
        modularize(create_model('simcnn', 10, .1), 10, method, filter_fn=lambda layer, name: False)
    model = new_model(method)
    assert str(sum(model.kernels.values())) in mask_table(model).title.replace(',', '')
    targets = torch.ones(2, 10, dtype=torch.bool)
    try: answers = model.eval()(torch.zeros(2, 1, 8, 8), targets)
    except ValueError as e: assert 'targets: the masks of this method are made of each image' in str(e)
    else: assert answers.shape == (2, 10)


def test_a_method_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Twice(METHODS['composable'], name='twice-as-dense'): target_krr: float = .3
    try:
        assert isinstance(make_method(Twice()), Method)
        assert describe_method(Twice())['method'] == 'twice-as-dense'
        model = modularize(create_model('simcnn', 10, .1), 10, 'twice-as-dense')
        assert model.method == Twice()
    finally: del METHODS['twice-as-dense']


def test_settings_of_earlier_files_still_mean_the_same() -> None:
    old = dict(method='composable', target_krr=.2, full=.4, start=.2, end=.6, memory=.9, twice=False)
    made = make_method(**old)
    assert (made.full_fraction, made.close_from, made.closed_by) == (.4, .2, .6)
    assert (made.decay, made.two_roles) == (.9, False)


# Degenerate data

EQUAL = {'zero': 0., 'one': 1., 'tiny': 1e-38, 'NaN': float('nan'), 'infinite': float('inf')}


@pytest.mark.parametrize('fraction', [.05, .15, .5, .99])
@pytest.mark.parametrize('value', EQUAL.values(), ids=EQUAL)
def test_target_holds_where_all_scores_are_equal(value: float, fraction: float) -> None:
    "For every class and every layer, since ties are broken evenly."
    sizes = [40, 80, 160, 320]
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    kernels = torch.where(groups == 2, 3, 1).float()        # a stream, coupled in three layers
    gates = open_gates(torch.full((5, len(groups)), value), kernel_costs(kernels), groups, fraction)
    share = (gates * kernels).sum(1) / kernels.sum()        # all classes open the same
    assert (share <= fraction + 1e-6).all() and (share > fraction - .01).all()
    for group, size in enumerate(sizes):
        assert abs(gates[:, groups == group].mean() - fraction) < 2.5 / size + .01


def test_some_scores_are_equal() -> None:
    "Half of the units are dead; the target is filled with equals, at least one in each group."
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.rand(4, 200, generator=generator), torch.arange(200) // 10
    scores[:, 100:] = 0.
    for fraction in (.2, .3, .5, .7):       # of 20 groups, a class needs one unit each
        gates = open_gates(scores, kernel_costs(torch.ones(200)), groups, fraction)
        kept = module_masks(gates)[:, :-1].mean()
        assert abs(kept - fraction) < .02
        assert (gates.view(4, 20, 10).sum(2) > 0).all()


def test_class_that_was_never_seen() -> None:
    "It gets one unit a group, not all; a class with NaN scores likewise."
    groups = torch.arange(100) // 10
    scores = torch.rand(3, 100, generator=torch.Generator().manual_seed(0))
    scores[1], scores[2] = 0., torch.nan
    gates = open_gates(scores, kernel_costs(torch.ones(100)), groups, .6)
    assert gates[1].sum() == gates[2].sum() == 10 and gates[0].sum() > 80


def test_scores_that_differ_are_ranked_as_ever() -> None:
    scores = torch.rand(4, 500, generator=torch.Generator().manual_seed(0))
    gates = open_gates(scores, kernel_costs(torch.ones(500)), torch.zeros(500, dtype=torch.long), .36)
    best = scores.flatten().topk(int(gates.sum())).indices
    assert gates.flatten()[best].all() and 360 < gates.sum() < 480
    assert abs(module_masks(gates)[:, :-1].mean() - .36) < .002


@pytest.mark.parametrize('network', [pytest.param('simcnn', marks=pytest.mark.slow), 'resnet18'])
def test_black_images(network: str) -> None:
    data = few_images(size=32, black=True)
    model = modularize(create_model(network, 4, .25, seed=0), 4, target_krr=.15)
    fit(model, data, 3, show_progress=False)
    assert abs(model.masks.gates.krr.item() - .15) < .02    # for all classes the same kernels
    kept = decompose(model, data.train, show_progress=False)
    layers = kept.split(kept.kept.float())
    assert all(abs(mask.mean() - .15) < .12 for mask in layers.values())


@pytest.mark.parametrize('method', BUILT_IN)
def test_black_images_end_in_a_module(method: str) -> None:
    data = few_images(black=True)
    model = modularize(Small(), 4, method, example_input=torch.zeros(1, 3, 16, 16))
    fit(model, data, 2, lr=.01, show_progress=False)
    module = extract(model, decompose(model, data.train, show_progress=False), ['1'])
    assert all(p.isfinite().all() for p in module.parameters())
