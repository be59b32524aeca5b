"The slim network computes what the binary-masked model computes, for all six networks, and survives the file system."
import copy
from dataclasses import replace
import pytest
import torch
import torchvision
from networks import NETWORKS, calibrate, lively, random_parts
from torch import nn
from mwt.channels import slice_channels_
from mwt.convert import fixed_masks, modularize, plain
from mwt.decompose import union_masks
from mwt.extract import SlimModule, _next_in_line, as_module, extract, fold_norms, load_module, round_masks, save_module
from mwt.masks import masked_layers
from mwt.models import create_model
from mwt.reuse import add_head, compose


@pytest.fixture(scope='module', params=[(network, method) for network in NETWORKS for method in ('composable', 'mwt')], ids='-'.join)
def model(request):
    torch.manual_seed(0)
    network, method = request.param
    return modularize(lively(NETWORKS[network]()), n_classes=10, method=method).eval()


def masked_logits(model, parts, classes, x):
    with fixed_masks(model, union_masks(parts, classes)), torch.no_grad(): return model(x)[:, classes]


@pytest.mark.parametrize('share, classes', [(.3, [4]), (.3, [7, 2]), (.7, list(range(10))), (None, [7, 2])],
                         ids=['a third, one class', 'a third, two', 'most, ten', 'one kernel a layer, two'])
def test_slim_equals_masked(model, share, classes, tmp_path):
    parts = random_parts(model, share, seed=len(classes))
    calibrate(model, union_masks(parts, classes))
    module, x = extract(model, parts, classes), torch.randn(8, *model.input_shape, generator=torch.Generator().manual_seed(1))
    expected = masked_logits(model, parts, classes, x)
    with torch.no_grad(): slim = module(x)
    assert share is None or expected.std(0).max() > 2e-4, 'the comparison would be empty'       # one neuron behind a ReLU may be silent
    assert torch.allclose(slim, expected, rtol=0, atol=1e-5), (slim - expected).abs().max()
    loaded = load_module(save_module(module, tmp_path/'module.safetensors'))
    with torch.no_grad(): assert torch.equal(loaded(x), slim)
    assert loaded.classes == [parts.classes[c] for c in classes]


def test_slim_is_smaller_and_ordinary(model):
    module = extract(model, random_parts(model, .3), [0, 1])
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert size(module) < size(plain(model))
    assert not masked_layers(module) and not [n for n, _ in module.named_parameters() if 'source' in n]
    heads = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert heads[-1].out_features == 2


def test_module_exports_and_learns(model):
    module = extract(model, random_parts(model, None), [0, 1])
    x = torch.randn(2, *model.input_shape)
    exported = torch.export.export(module, (x,)).module()
    with torch.no_grad(): assert torch.allclose(exported(x), module(x), atol=1e-6)
    module.train()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_model_is_left_as_it_was(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    extract(model, random_parts(model, .3), [0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(layer.fixed is None and layer.record is None for layer in model.points.values())


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    model = modularize(lively(NETWORKS['rescnn']()), n_classes=10).eval()
    return model, random_parts(model, .4), torch.randn(4, 3, 32, 32)


def test_composed_side_by_side(small, tmp_path):
    model, parts, x = small
    a, b = extract(model, parts, [0, 1]), extract(model, parts, [5])
    both = compose([a, b])
    with torch.no_grad():
        assert torch.equal(both(x), torch.cat([a(x), b(x)], 1)) and both.classes == ['class 0', 'class 1', 'class 5']
        more = compose([both, extract(model, parts, [9])])              # composed modules compose again
        assert torch.equal(more(x)[:, :3], both(x))
        assert torch.equal(load_module(save_module(more, tmp_path/'more.safetensors'))(x), more(x))


def test_new_head_starts_as_identity(small):
    model, parts, x = small
    module = extract(model, parts, [0, 1, 2])
    with torch.no_grad(): assert torch.equal(add_head(module)(x), module(x).relu())


def test_union_keeps_what_each_needs(small):
    model, parts, _ = small
    one, two, both = (extract(model, parts, c) for c in ([0], [1], [0, 1]))
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert max(size(one), size(two)) < size(both) <= size(plain(model))


class Standardised(nn.Conv2d):
    "A convolution whose weights depend on all its inputs: without some of them it computes something else."
    def forward(self, x): return self._conv_forward(x, (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True), None)


def test_inexact_cut_is_never_silent():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ValueError): extract(m := modularize(net, n_classes=4).eval(), random_parts(m, .3), [0])


def test_empty_layer_is_refused(small):
    model, _, x = small
    name, kernels = next(iter(model.kernels.items()))
    with pytest.raises(ValueError, match='no kernel is kept'): slice_channels_(plain(model), model.channels, {name: torch.zeros(kernels, dtype=torch.bool)})


def test_description_is_plain_data(small):
    import json
    model, parts, _ = small
    module = extract(model, parts, [0])
    assert json.loads(json.dumps(module.description)) == module.description
    assert SlimModule(json.loads(json.dumps(module.description))).state_dict().keys() == module.state_dict().keys()


FASTER = {'simcnn': NETWORKS['simcnn'], 'resnet18': NETWORKS['resnet18'], 'mobilenet': lambda: create_model('mobilenet', width=0.25),
          'densenet': lambda: torchvision.models.DenseNet(12, (2, 3), 24, bn_size=2, num_classes=10),
          'resnext': lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4)}


def count(module, kind): return sum(isinstance(layer, kind) for layer in module.modules())


@pytest.fixture(scope='module', params=[(network, method) for network in FASTER for method in ('composable', 'mwt')], ids='-'.join)
def quick(request):
    "A model, random parts, images, and the module of two classes as it is cut."
    network, method = request.param
    torch.manual_seed(0)
    model = modularize(lively(FASTER[network]()), n_classes=10, method=method).eval()
    parts = random_parts(model, .3)
    calibrate(model, union_masks(parts, [7, 2]))
    return network, model, parts, torch.randn(4, *model.input_shape), extract(model, parts, [7, 2])


def test_fused_equals_unfused(quick, tmp_path):
    network, model, parts, x, module = quick
    fused = extract(model, parts, [7, 2], fuse=True)
    with torch.no_grad(): logits = fused(x)
    assert logits.std() > 1e-3 and torch.allclose(logits, module(x), rtol=1e-4, atol=1e-4)
    folded = count(module, nn.BatchNorm2d) - count(fused, nn.BatchNorm2d)
    assert len(module.description['steps']) - len(fused.description['steps']) == folded > 0
    left = {name for name, layer in fused.named_modules() if isinstance(layer, nn.BatchNorm2d)}     # these read a concatenation or a pooling
    assert left == (set() if network != 'densenet' else {f'features.denseblock{b}.denselayer{i}.norm1' for b, n in ((1, 2), (2, 3)) for i in range(1, n + 1)}
                    | {'features.transition1.norm', 'features.norm5'})
    loaded = load_module(save_module(fused, tmp_path/'fused.safetensors'))
    with torch.no_grad(): assert torch.equal(loaded(x), logits)
    exported = torch.export.export(fused, (x,)).module()
    with torch.no_grad(): assert torch.allclose(exported(x), logits, atol=1e-6)
    fused.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize('fuse', [False, True], ids=['norms', 'fused'])
def test_rounded_up_to_a_multiple(quick, tmp_path, fuse):
    network, model, parts, x, _ = quick
    model, x = copy.deepcopy(model).double(), x.double()        # where rounding errors cannot hide a mistake
    module = extract(model, parts, [7, 2])
    rounded, before = extract(model, parts, [7, 2], fuse=fuse, round_to=8), dict(module.named_modules())
    width = lambda layer: layer.weight.shape[0]
    for name, layer in rounded.named_modules():
        if name not in model.kernels: continue
        assert width(layer) % 8 == 0 or width(layer) == width(before[name]) > model.kernels[name] // 8 * 8, f'{name} has {width(layer)} of {model.kernels[name]}'
        assert 0 <= width(layer) - width(before[name]) < 8
    masks = round_masks(model.channels, union_masks(parts, [7, 2]), _next_in_line(model, parts, [7, 2]), 8)
    assert all((masks[name] >= mask).all() for name, mask in union_masks(parts, [7, 2]).items()) and sum(m.sum() for m in masks.values()) > parts.modules[[7, 2]].any(0).sum()
    if model.gates is not None: assert all(width(rounded.get_submodule(name)) == mask.sum() for name, mask in masks.items())     # nothing but real kernels
    with fixed_masks(model, masks), torch.no_grad(): expected = model(x)[:, [7, 2]]
    with torch.no_grad(): logits = rounded(x)
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9) and not torch.allclose(logits, module(x), rtol=1e-3, atol=1e-3)
    loaded = load_module(save_module(rounded, tmp_path/'rounded.safetensors'))
    with torch.no_grad(): assert torch.equal(loaded(x), logits)


def test_fast_modules_compose(small):
    model, parts, x = small
    a, b = (extract(model, parts, c, fuse=True, round_to=4) for c in ([0, 1], [5]))
    both = compose([a, b])
    with torch.no_grad():
        assert torch.equal(both(x), torch.cat([a(x), b(x)], 1))
        later = fold_norms(compose([extract(model, parts, c, round_to=4) for c in ([0, 1], [5])]))
        assert not count(later, nn.BatchNorm2d) and torch.allclose(later(x), both(x), atol=1e-5)


@pytest.mark.parametrize('method', ['composable', 'mwt'])
def test_who_joins(method):
    "The kernels most frequent for the target classes; where that is equal, those that most classes keep."
    model = modularize(NETWORKS['simcnn'](), n_classes=10, method=method)
    name, modules = 'features.4.0', torch.zeros(10, sum(model.kernels.values()), dtype=torch.bool)
    at = list(model.kernels).index(name)
    first = sum(list(model.kernels.values())[:at])
    modules[:, :] = True
    modules[:, first:first + model.kernels[name]] = False
    modules[:2, first:first + 6] = True                 # six kernels for the two target classes
    modules[5, first + 20] = modules[5:7, first + 30] = True
    frequency = modules.double()
    parts = replace(random_parts(model, .5), modules=modules, frequency=frequency)
    joined = lambda p: round_masks(model.channels, union_masks(p, [0, 1]), _next_in_line(model, p, [0, 1]), 8)[name].nonzero()[:, 0].tolist()
    assert joined(parts) == [*range(6), 20, 30]
    modules[5, first + 20] = False
    assert joined(parts) == [*range(6), 6, 30]          # nobody else is left: the first in order
    frequency[0, first + 25] = .8
    assert joined(parts) == [*range(6), 25, 30]
    frequency[1, first + 11] = .3
    assert joined(parts) == [*range(6), 11, 25]


def test_bad_multiples(small):
    model, parts, _ = small
    for wrong in (0, -8): pytest.raises(ValueError, extract, model, parts, [0], round_to=wrong).match(f'round_to must be a whole number at least 1, not {wrong}')
    for wrong in (1.5, '8', True): pytest.raises(TypeError, extract, model, parts, [0], round_to=wrong).match('round_to must be a whole number')
    as_cut = extract(model, parts, [0])
    for same in (1, 10**6):                             # no layer has so many kernels: all stay as they are
        assert extract(model, parts, [0], round_to=same).description == as_cut.description


class Awkward(nn.Module):
    "Norms that cannot be folded into the convolution before them, and one that can."
    def __init__(self):
        super().__init__()
        self.once, self.n_once = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.read_twice, self.n_read_twice = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.run_twice, self.n_run_twice = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right, self.n_shared = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.batch, self.n_batch = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)
        self.bare, self.n_bare = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.n_alone, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)
        self(torch.randn(16, 3, 8, 8))                  # gives the norms statistics

    def forward(self, x):
        x = self.n_once(self.once(x)).relu()
        y = self.read_twice(x)
        x = self.n_read_twice(y) + y
        x = self.n_run_twice(self.run_twice(self.run_twice(x).relu()))
        x = self.n_shared(self.left(x)) + self.n_shared(self.right(x).relu())
        x = self.n_batch(self.batch(self.n_alone(x.relu())))
        x = self.n_bare(self.bare(x)) * self.bare.weight.mean()
        return self.head(x.mean((2, 3)))


def test_only_what_can_be_folded_is():
    torch.manual_seed(0)
    module, x = as_module(Awkward(), list('abcd'), (3, 8, 8)), torch.randn(4, 3, 8, 8)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    folded = fold_norms(module)
    gone = {name for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)} - {name for name, _ in folded.named_modules()}
    assert gone == {'n_once'}
    with torch.no_grad(): assert torch.allclose(folded(x), module(x), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())       # the argument is left as it was
    assert folded.once.weight.data_ptr() != module.once.weight.data_ptr() and folded.head.weight.data_ptr() != module.head.weight.data_ptr()
