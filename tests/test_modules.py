"Modules and parts as files, networks as descriptions: what is stored is what runs, and nothing else."
from __future__ import annotations
import copy
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, lively, random_parts
from torch import Tensor, fx, nn
from mwt.channels.description import decode, describe_steps, encode
from mwt.core.files import load_tensors, save_tensors
from mwt.methods.modular import modularize
from mwt.modules.compose import compose
from mwt.modules.extract import extract
from mwt.modules.module import SlimModule, as_module, load_module, save_module
from mwt.modules.parts import Parts, load_parts, save_parts, union_masks
from mwt.modules.speed import fold_norms, joining_order, round_masks
from mwt.networks import create_model

OLD = Path(__file__).resolve().parent/'fixtures'/'0.1.0'


# Descriptions

@pytest.fixture(scope='module')
def module() -> SlimModule:
    torch.manual_seed(0)
    model = modularize(lively(NETWORKS['rescnn']()), n_classes=10).eval()
    return extract(model, random_parts(model, .4), [0])


def test_description_is_plain_data(module: SlimModule) -> None:
    again = json.loads(json.dumps(module.description))
    assert again == module.description
    assert SlimModule(again).state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize('value', [
    None, True, 3, 1.5, 'reflect', [], (), [1, [2, (3,)]], ..., slice(None), slice(1, None, 2),
    (slice(None), [2, 5, 7]), (..., [0, 0], None), [(slice(None), [1]), (0,)], torch.float16,
    torch.channels_last], ids=repr)
def test_arguments_survive_json(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value))), {}) == value


@pytest.mark.parametrize('value', [torch.zeros(2), {'a': 1}, {1}, print, ([torch.zeros(1)],)],
                         ids=['tensor', 'dictionary', 'set', 'function', 'tensor in a tuple'])
def test_arguments_that_no_file_holds(value: Any) -> None:
    with pytest.raises(ValueError, match='cannot be stored in a module'): encode(value)


class Branches(nn.Module):
    "The layers of a slim network with two branches."
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 3, 3, padding=1)
        self.right = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(5, 1, 1))
        self.head = nn.Linear(4, 2)


def aligned_sum() -> fx.GraphModule:
    "A slim network made by hand: `F.pad` and gathered channels bring its branches in line."
    graph = fx.Graph()
    x = graph.placeholder('x')
    left = graph.call_module('left', (x,))
    right = graph.call_module('right', (x,))
    everything = slice(None)
    wide = graph.call_function(F.pad, (left, [0, 0, 0, 0, 0, 1]))           # a fourth channel, of zeros
    left_in_line = graph.call_function(operator.getitem, (wide, (everything, [0, 1, 2, 3, 3])))
    padded = graph.call_function(F.pad, (right,), dict(pad=[0, 0, 0, 0, 0, 1]))
    right_in_line = graph.call_function(operator.getitem, (padded, (everything, [3, 0, 1, 3, 2])))
    total = graph.call_function(operator.add, (left_in_line, right_in_line))
    scaled = graph.call_function(operator.mul, (total, graph.get_attr('scale')))
    relu = graph.call_function(torch.relu, (scaled,))
    index = (everything, [4, 2, 1, 0], everything, slice(None, None, 2))
    some = graph.call_function(operator.getitem, (relu, index))
    pooled = graph.call_function(F.adaptive_avg_pool2d, (some, (1, 1)))
    features = graph.call_function(operator.getitem, (pooled, (..., 0, 0)))
    graph.output(graph.call_module('head', (features,)))
    return fx.GraphModule(Branches(), graph).eval()


def aligned_by_hand(net: fx.GraphModule, x: Tensor) -> Tensor:
    "What `aligned_sum` computes, in five channels written out one by one."
    left, right = net.left(x), net.right(x)
    zero = torch.zeros_like(left[:, 0])
    channels = [left[:, 0], left[:, 1] + right[:, 0], left[:, 2] + right[:, 1], zero, right[:, 2]]
    total = torch.stack(channels, 1)
    relu = (total * net.scale).relu()[:, [4, 2, 1, 0], :, ::2]
    return net.head(relu.mean((2, 3)))


def test_graph_module_that_aligns_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = aligned_sum(), torch.randn(4, 3, 8, 8)
    module = as_module(net, ['small', 'large'], (3, 8, 8))
    with torch.no_grad():
        logits = module(x)
        assert torch.equal(logits, net(x))
        assert torch.allclose(logits, aligned_by_hand(net, x), atol=1e-6)
        loaded = load_module(save_module(module, tmp_path/'module.safetensors'))
        assert torch.equal(loaded(x), logits)
        both = compose([loaded, as_module(net, ['thin', 'wide'], (3, 8, 8))])
        assert torch.equal(both(x), torch.cat([logits, logits], 1))
        exported = torch.export.export(module, (x,)).module()
        assert torch.allclose(exported(x), logits, atol=1e-6)
    module.train()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_graph_module_is_described_as_it_is() -> None:
    steps = {s['name']: s for s in describe_steps(aligned_sum())}
    assert steps['getitem']['target'] == 'operator.getitem'
    index = {'tuple': [{'slice': [None, None, None]}, [0, 1, 2, 3, 3]]}
    assert steps['getitem']['args'] == [{'step': 'pad'}, index]
    assert steps['pad']['target'] == 'F.pad'
    assert steps['pad']['args'] == [{'step': 'left'}, [0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize('index, says', [
    ([0, 1, 9], 'out of range for 4 channels'), ([{'step': 'nowhere'}], 'nowhere'),
    ([{'call': 'os.system'}], "kind 'call'"), ([{'tuple': [], 'slice': []}], 'too many values')],
    ids=['beyond the channels', 'no such step', 'call', 'two kinds'])
def test_forged_index_is_refused(index: list[Any], says: str, tmp_path: Path) -> None:
    "A list is an argument like others: it is checked on the `meta` device, and names nothing that could run."
    module = as_module(aligned_sum(), ['small', 'large'], (3, 8, 8))
    about = copy.deepcopy(module.description)
    step = next(s for s in about['steps'] if s['name'] == 'getitem')
    step['args'][1]['tuple'][1] = index
    path = save_tensors(tmp_path/'forged.safetensors', 'module', module.state_dict(), about)
    with pytest.raises(ValueError, match=f'does not describe a module.*{says}'): load_module(path)


# Folded norms

class Awkward(nn.Module):
    "Norms that cannot be folded into the convolution before them, and one that can."
    def __init__(self) -> None:
        super().__init__()
        self.once, self.n_once = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.read_twice, self.n_read_twice = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.run_twice, self.n_run_twice = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right, self.n_shared = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.batch, self.n_batch = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)
        self.bare, self.n_bare = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.n_alone, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)
        self(torch.randn(16, 3, 8, 8))                  # gives the norms statistics

    def forward(self, x: Tensor) -> Tensor:
        x = self.n_once(self.once(x)).relu()
        y = self.read_twice(x)
        x = self.n_read_twice(y) + y
        x = self.n_run_twice(self.run_twice(self.run_twice(x).relu()))
        x = self.n_shared(self.left(x)) + self.n_shared(self.right(x).relu())
        x = self.n_batch(self.batch(self.n_alone(x.relu())))
        x = self.n_bare(self.bare(x)) * self.bare.weight.mean()
        return self.head(x.mean((2, 3)))


def norms(module: nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)}


def test_only_what_can_be_folded_is() -> None:
    torch.manual_seed(0)
    module = as_module(Awkward(), list('abcd'), (3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    folded = fold_norms(module)
    assert norms(module) - norms(folded) == {'n_once'}
    with torch.no_grad(): assert torch.allclose(folded(x), module(x), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())   # left as it was
    for name in ('once', 'head'):
        assert folded.get_submodule(name).weight.data_ptr() != module.get_submodule(name).weight.data_ptr()


def test_as_module_leaves_the_network_alone() -> None:
    net = Awkward().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    module = as_module(net, list('abcd'), (3, 8, 8))
    assert all(layer.training for layer in net.modules()) and not module.training
    with torch.no_grad():
        for p in module.parameters(): p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# Rounding

def test_who_joins() -> None:
    "The kernels most frequent for the target classes; where that is equal, those that most classes keep."
    model = modularize(create_model('simcnn', width=.25), n_classes=10)
    name, target = 'features.4.0', [0, 1]
    example = random_parts(model, .5)
    kept = torch.ones_like(example.kept)
    layer = example.split(kept)[name]                   # a view
    layer[:] = False
    layer[:2, :6] = True                                # six kernels for the two target classes
    layer[5, 20] = True
    layer[5:7, 30] = True
    frequency = kept.double()
    how_often = example.split(frequency)[name]

    def joined() -> list[int]:
        parts = replace(example, frequency=frequency, kept=kept)
        order = joining_order(model, parts, target)
        rounded = round_masks(model.channels, union_masks(parts, target), order, 8)
        return rounded[name].nonzero()[:, 0].tolist()

    assert joined() == [*range(6), 20, 30]
    layer[5, 20] = False
    assert joined() == [*range(6), 6, 30]               # nobody else is left: the first in order
    how_often[0, 25] = .8
    assert joined() == [*range(6), 25, 30]
    how_often[1, 11] = .3
    assert joined() == [*range(6), 11, 25]


# Files

@pytest.fixture
def parts() -> Parts:
    kept = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    thresholds = torch.tensor([[.9, .85], [.9, .9]]).double()
    cohesion = torch.tensor([.9, .8])
    return Parts(['cat', 'dog'], {'a': 1, 'b': 3}, kept.double() * .95, kept, thresholds, cohesion, 20)


def same(a: Parts, b: Parts) -> bool:
    names = ('frequency', 'kept', 'thresholds', 'cohesion')
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return tensors and (a.classes, a.sizes, a.samples) == (b.classes, b.sizes, b.samples)


def test_parts_survive_a_file(parts: Parts, tmp_path: Path) -> None:
    path = save_parts(parts, tmp_path/'parts.safetensors')
    assert same(load_parts(path), parts)
    tensors, _ = load_tensors(path, 'parts')
    assert sorted(tensors) == ['cohesion', 'frequency', 'kept', 'thresholds']           # today's names


def test_parts_with_both_names_are_refused(parts: Parts, tmp_path: Path) -> None:
    path = save_parts(parts, tmp_path/'parts.safetensors')
    tensors, about = load_tensors(path, 'parts')
    save_tensors(path, 'parts', tensors | dict(modules=parts.kept), about)
    with pytest.raises(ValueError, match='does not describe parts that this version of mwt knows'):
        load_parts(path)


@pytest.mark.parametrize('method', ['composable', 'mwt'])
def test_parts_of_version_0_1_0(method: str, tmp_path: Path) -> None:
    path = OLD/method/'parts.safetensors'
    tensors, about = load_tensors(path, 'parts')
    parts = load_parts(path)
    assert torch.equal(parts.kept, tensors['modules']) and parts.kept.dtype == torch.bool
    assert parts.classes == about['classes'] and parts.sizes == about['sizes']
    assert same(load_parts(save_parts(parts, tmp_path/'parts.safetensors')), parts)
    assert len(parts.report()) == len(parts.classes) + 1


@pytest.mark.parametrize('method', ['composable', 'mwt'])
def test_modules_of_version_0_1_0(method: str) -> None:
    answers = json.loads((OLD/method/'answers.json').read_text())
    x = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    module = load_module(OLD/method/'modules'/'3-7.safetensors')
    assert module.classes == ['3', '7']
    with torch.no_grad(): logits = module(x)
    assert torch.allclose(logits, torch.tensor(answers['module']), rtol=0, atol=1e-5)
    one = load_module(OLD/method/'modules'/'1.safetensors')
    assert one.classes == ['1'] and compose([module, one])(x).shape == (4, 3)


# What channels are followed through can be stored

class Spelled(nn.Module):
    "A small network that writes its operations in unusual ways."
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.softsign, self.pool, self.head = nn.Softsign(), nn.LPPool2d(2, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.spelling == 'relu_': x = torch.relu_(x)
        elif self.spelling == 'celu': x = torch.celu(x)
        elif self.spelling == 'clip': x = x.clip(min=0)
        elif self.spelling == 'max_pool2d': x = torch.max_pool2d(x, 2)
        elif self.spelling == 'dropout': x = torch.dropout(x, .5, False)
        elif self.spelling == 'multiply': x = torch.multiply(x, 2.)
        elif self.spelling == 'softsign': x = self.softsign(x)
        elif self.spelling == 'lp_pool': x = self.pool(x)
        return self.head(torch.tanh_(self.b(x)).mean((2, 3)))


@pytest.mark.parametrize('spelling', ['relu_', 'celu', 'clip', 'max_pool2d', 'dropout', 'multiply',
                                      'softsign', 'lp_pool'])
def test_a_followed_spelling_is_cut_and_stored(spelling: str, tmp_path: Path) -> None:
    model = modularize(Spelled(spelling).eval(), 4, example_input=torch.zeros(2, 3, 8, 8)).eval()
    module = extract(model, random_parts(model, .5), [0, 2])
    assert module.a.out_channels < 8
    again = load_module(save_module(module, tmp_path/'module.safetensors'))
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad(): assert torch.equal(again(x), module(x))
