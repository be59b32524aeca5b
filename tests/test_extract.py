"The slim network computes what the binary-masked model computes, for all six networks, and survives the file system."
import pytest
import torch
from networks import NETWORKS, calibrate, lively, random_parts
from torch import nn
from mwt.channels import slice_channels_
from mwt.convert import fixed_masks, modularize, plain
from mwt.decompose import union_masks
from mwt.extract import SlimModule, extract, load_module, save_module
from mwt.masks import masked_layers
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
