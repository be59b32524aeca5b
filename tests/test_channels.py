"Any network: channels followed through every family of torchvision, and through networks made to be awkward."
import pytest
import torch
import torchvision
from networks import calibrate, lively, random_parts
from torch import nn
from torch.nn import functional as F
from mwt.channels import map_channels
from mwt.convert import fixed_masks, mask_table, modularize, places, plain, shrunk
from mwt.decompose import decompose, union_masks
from mwt.extract import extract, load_module, save_module
from mwt.training import training_loss

FAMILIES = {'alexnet': 64, 'vgg11': 32, 'vgg11_bn': 32, 'resnet18': 32, 'resnext50_32x4d': 32, 'wide_resnet50_2': 32, 'squeezenet1_1': 32,
            'densenet121': 32, 'googlenet': 64, 'inception_v3': 96, 'shufflenet_v2_x0_5': 32, 'mobilenet_v2': 32, 'mobilenet_v3_small': 32,
            'mnasnet0_5': 32, 'efficientnet_b0': 32, 'efficientnet_v2_s': 32, 'regnet_x_400mf': 32, 'regnet_y_400mf': 32, 'convnext_tiny': 32}


def family(name):
    more = dict(aux_logits=False, init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    torch.manual_seed(0)
    with torch.device('meta' if name.startswith(('alexnet', 'vgg')) else 'cpu'): net = torchvision.models.get_model(name, weights=None, num_classes=10, **more)
    if not name.startswith(('alexnet', 'vgg')): return net
    old = [layer for layer in net.classifier if isinstance(layer, nn.Linear)]           # 4,096 neurons twice: 64 will do for a test
    sizes = iter(((old[0].in_features, 64), (64, 64), (64, 10)))
    net.classifier = nn.Sequential(*(nn.Linear(*next(sizes), device='meta') if isinstance(layer, nn.Linear) else layer for layer in net.classifier))
    net = net.to_empty(device='cpu')
    for layer in net.modules():
        if hasattr(layer, 'reset_parameters'): layer.reset_parameters()
    return net


def check_exact(model, classes, x, path=None):
    "Slim equals masked, is smaller, and survives the file system. In float64, where rounding cannot hide a mistake."
    model, x = model.double(), x.double()
    parts = random_parts(model, 1 / (1 + len(classes)), seed=len(classes))
    calibrate(model, union_masks(parts, classes))
    module = extract(model, parts, classes)
    with fixed_masks(model, union_masks(parts, classes)), torch.no_grad(): expected = model(x)[:, classes]
    with torch.no_grad(): slim = module(x)
    assert expected.std(0).max() > 1e-6 * expected.abs().max(), 'the comparison would be empty'
    assert torch.allclose(slim, expected, rtol=0, atol=1e-9 * expected.abs().max().item()), (slim - expected).abs().max()
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert size(module) < size(plain(model))
    if path is not None:
        loaded = load_module(save_module(module, path))
        with torch.no_grad(): assert torch.equal(loaded(x), slim), 'loaded module differs'
    return module, slim


@pytest.mark.parametrize('method', ['composable', 'mwt'])
@pytest.mark.parametrize('name', FAMILIES)
def test_family(name, method, tmp_path):
    side = FAMILIES[name]
    net, x = lively(family(name)), torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    if name == 'squeezenet1_1': net.classifier[1].bias.data += 3           # it ends in a ReLU
    try: model = modularize(net, 10, method, example_input=x)
    except ValueError as e:
        assert method == 'mwt' and name == 'convnext_tiny' and 'no layer is left to mask' in str(e)     # no convolution without a layer norm
        return
    labels = torch.tensor([0, 1, 2, 3])
    loss, _ = training_loss(model.train(), x, labels)                       # one step
    loss.backward()
    model.method.learn(model, labels, 0.)
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    for classes in ([3], list(range(10))): check_exact(model.eval(), classes, x)
    module, slim = check_exact(model, [7, 2], x, tmp_path/'module.safetensors')
    exported = torch.export.export(module, (x.double(),)).module()
    with torch.no_grad(): assert torch.allclose(exported(x.double()), slim, rtol=1e-9)


def check_shrunk(net, x, n, multiple):
    "Without closed kernels a model computes the same, and learns the same."
    model = modularize(lively(net), n, example_input=x).double().eval()
    generator = torch.Generator().manual_seed(0)
    model.gates.gates.copy_(torch.rand(model.gates.gates.shape, generator=generator) < .05)
    for group in model.gates.groups.unique(): model.gates.gates[0, (model.gates.groups == group).nonzero()[0, 0]] = 1       # at least one
    small, where, targets = shrunk(model, multiple), places(model, multiple), torch.rand(len(x), n, generator=generator) < .5
    answers = [m(x.double(), targets) for m in (model, small)]
    assert torch.allclose(*answers, rtol=1e-9) and answers[0].std() > 0
    for a in answers: a.square().sum().backward()
    grads, dense = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (small, model))
    assert grads.keys() == dense.keys() and sum(g.numel() for g in grads.values()) < sum(g.numel() for g in dense.values())
    for name, grad in grads.items(): assert torch.allclose(grad.flatten(), dense[name].flatten()[where[name]], atol=1e-9 * (1 + grad.abs().max().item())), name
    assert all(len(at.unique()) == len(at) for at in where.values())


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'mobilenet_v2', 'shufflenet_v2_x0_5', 'regnet_y_400mf'])
def test_training_without_closed_kernels(name):
    side = FAMILIES[name]
    check_shrunk(family(name), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)), 10, 8)


class Block(nn.Module):
    "What awkward networks are made of; `kind` says which."
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem, self.a, self.b, self.c = (nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1),
                                             nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1))
        self.n1, self.n2, self.wide = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(24)
        self.grouped, self.deep = nn.Conv2d(12, 24, 3, padding=1, groups=4), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.join, self.point = nn.Conv2d(24, 12, 1), nn.Linear(12, 12)
        self.scale, self.group_norm, self.layer_norm = nn.Parameter(torch.rand(12, 1, 1) + .5), nn.GroupNorm(3, 12), nn.LayerNorm(12)
        for layer in (self.stem, self.a, self.b, self.c, self.grouped, self.deep, self.join): nn.init.kaiming_normal_(layer.weight)
        self.head = nn.Conv2d(12, 4, 1) if kind == 'conv head' else nn.Linear(12 * 9 if kind == 'flatten' else 12, 4)

    def middle(self, x):
        k = self.kind
        if k == 'pre-norm': return x + self.b(F.relu(self.n2(self.a(F.relu(self.n1(x))))))
        if k == 'concat': return self.join(F.relu(self.wide(torch.cat([self.a(x), self.b(x)], 1))))
        if k == 'grouped': return self.join(F.relu(self.grouped(F.relu(self.a(x)))))
        if k == 'depthwise': return self.b(F.relu(self.n1(self.deep(F.relu(self.a(x))))))
        if k == 'squeeze': return self.b(x * torch.sigmoid(self.a(x.mean((2, 3), keepdim=True))))
        if k == 'sigmoid': return self.b(torch.sigmoid(self.a(x)))
        if k == 'twice': return self.a(F.relu(self.a(F.relu(self.n1(x)))))
        if k == 'chunk': return self.a(torch.cat(x.chunk(2, 1)[::-1], 1))
        if k == 'slices': return self.a(torch.cat([x[:, 6:], x[:, :6]], 1))
        if k == 'scale': return self.b(F.relu(self.a(x) * self.scale))
        if k == 'shift': return self.b(F.relu(self.a(x) + self.scale))
        if k == 'group norm': return self.b(F.relu(self.group_norm(self.a(x))))
        if k == 'layer norm': return self.b(self.point(self.layer_norm(self.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2))
        if k == 'pointwise': return self.b(F.gelu(self.point(self.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2))
        if k == 'attention': return self.b(x * torch.sigmoid(self.a(x).mean(1, keepdim=True)))
        if k == 'divide': return self.b(F.relu(self.a(x) / (1 + self.c(x).abs())))
        if k == 'shuffle': return self.a(x.view(x.shape[0], 3, x.shape[1] // 3, 8, 8).transpose(1, 2).reshape(x.shape[0], x.shape[1], 8, 8))
        if k == 'norm sum': return F.relu(self.n1(self.a(x) + self.b(x)))
        return self.b(F.relu(self.a(x)))

    def forward(self, x):
        x = F.relu(self.c(F.relu(self.middle(F.relu(self.stem(x))))))
        if self.kind == 'conv head': return self.head(x).mean((2, 3))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 3 if self.kind == 'flatten' else 1), 1))


KINDS = ['pre-norm', 'concat', 'grouped', 'depthwise', 'squeeze', 'sigmoid', 'twice', 'chunk', 'slices', 'scale', 'shift', 'group norm',
         'layer norm', 'pointwise', 'attention', 'divide', 'shuffle', 'norm sum', 'conv head', 'flatten', 'plain']


@pytest.mark.parametrize('method', ['composable', 'mwt'])
@pytest.mark.parametrize('kind', KINDS)
def test_awkward_network(kind, method, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = modularize(lively(Block(kind)), 4, method, example_input=x).eval()
    for classes in ([2], [3, 0]): check_exact(model, classes, x, tmp_path/'module.safetensors')


class Optional(nn.Module):
    "A forward pass with arguments that nobody passes here, and a check of shapes."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x, features: bool = False, scale=None):
        torch._assert(x.ndim == 4, 'four dimensions')
        x = F.relu(torch.add(self.a(x), other=1.) - 1)
        if scale is not None: x = x * scale
        x = F.relu(self.b(x)).mean((2, 3))
        return x if features else self.head(x)


def test_optional_arguments_keep_their_defaults(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    model = modularize(lively(Optional()), 4, example_input=x).eval()
    assert [i.name for i in model.channels.infos if i.reason] == ['a', 'head']          # a number was added in between
    check_exact(model, [1, 2], x, tmp_path/'module.safetensors')


@pytest.mark.parametrize('kind, layer, reason', [('sigmoid', 'a', 'sigmoid'), ('slices', 'stem', 'picks some of its channels'),
                                                ('group norm', 'a', 'GroupNorm reads it'), ('layer norm', 'a', 'LayerNorm reads it'), ('shift', 'a', 'scale'),
                                                ('attention', 'a', 'mean reads it')])
def test_what_cannot_be_cut_is_named(kind, layer, reason):
    info = next(i for i in map_channels(Block(kind), torch.randn(2, 3, 8, 8)).infos if i.name == layer)
    assert reason in info.reason
    assert reason in str(mask_table(modularize(Block(kind), 4, example_input=torch.randn(2, 3, 8, 8))))


def test_ties_of_a_grouped_convolution():
    channels = map_channels(Block('grouped'), torch.randn(2, 3, 8, 8))
    roots = channels.root[channels.layers['grouped'].writes]
    assert len(roots.unique()) == 4                 # one unit a group ...
    assert torch.equal(channels.root[channels.layers['a'].writes].unique(), roots.unique())     # ... together with its inputs
    assert not channels.stays[roots].any()


def test_filter_leaves_tied_layers_alone_too():
    model = modularize(Block('depthwise'), 4, example_input=torch.randn(2, 3, 8, 8), filter_fn=lambda layer, name: name != 'deep')
    reasons = {i.name: i.reason for i in model.channels.infos}
    assert reasons['deep'] == 'left out by filter_fn' and reasons['a'] == 'tied to a layer that stays' and not reasons['b']


def test_layers_that_hang_together_need_one_mask():
    model = modularize(Block('depthwise'), 4, example_input=torch.randn(2, 3, 8, 8))
    masks = {name: torch.ones(k) for name, k in model.kernels.items()} | {'deep': torch.zeros(12)}
    with pytest.raises(ValueError, match='hangs together'), fixed_masks(model, masks): pass


class Fickle(nn.Module):
    "Runs another way each time."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x)
        if x.mean() > 0: x = self.b(x)
        return self.head(x.mean((2, 3)))


def test_network_that_cannot_be_traced_is_named():
    with pytest.raises(ValueError, match='Fickle cannot be traced'): modularize(Fickle(), 2)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_100', 'densenet121', 'regnety_002', 'res2net50_14w_8s', 'hrnet_w18_small', 'dla34', 'xception41'])
def test_timm(name, tmp_path):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = modularize(lively(timm.create_model(name, num_classes=10)), 10, example_input=x).eval()
    check_exact(model, [2, 5], x)
