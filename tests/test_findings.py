"What a reading of the code found: each as the smallest input that showed it."
from __future__ import annotations
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from mwt.channels.trace import find_example, input_channels
from mwt.data.batches import ImageData, from_tensors
from mwt.measure import confusion, evaluate
from mwt.methods.modular import fixed_masks, modularize
from mwt.modules.compose import fine_tune
from mwt.modules.decompose import decompose
from mwt.modules.extract import extract
from mwt.networks import create_model
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import fit
from mwt.train.history import TrainConfig
from mwt.train.trainer import Trainer

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    "Two convolutions and a head; subclasses change what happens between."

    def __init__(self, head: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, head)

    def between(self, x: Tensor) -> Tensor: return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.between(self.a(x))).relu().mean((2, 3)))


@pytest.fixture(scope='module')
def data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = images, torch.arange(32) % 4
    return from_tensors(split, split, split, batch_size=8, augment=None, device='cpu')


def learned(net: nn.Module, data: ImageData, method: str = 'composable') -> nn.Module:
    model = modularize(net, 4, method, EXAMPLE)
    fit(model, data, 1, show_progress=False)
    return model


def test_cudnn_stays_on_while_training(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Trainer.step

    def looking(self: Trainer, *args: Tensor) -> dict[str, Tensor]:
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
        return step(self, *args)

    monkeypatch.setattr(Trainer, 'step', looking)
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    fit(Net(), data, 1, show_progress=False)
    assert set(seen) == {(before[0], True)}
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark) == before


def test_one_class_by_name() -> None:
    split = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 2])
    data = from_tensors(split, split, split, ['1', '0', '10'], 4, augment=None, device='cpu')
    assert confusion(Net(3), data.test, '10').sum() == 2


def test_recipe_of_fine_tuning(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learned(Net(), data)
    module, rates = extract(model, decompose(model, data.train, show_progress=False), ['0', '1']), []
    monkeypatch.setattr('mwt.modules.compose.fit', lambda *args, **options: rates.append(
        options.get('lr', getattr(options.get('config'), 'lr', None))))
    for options in ({}, dict(config=TrainConfig(lr=1e-4)), dict(lr=0.2), dict(config=TrainConfig(), lr=0.3)):
        fine_tune(module, data, 1, **options)
    assert rates == [0.01, 1e-4, 0.2, 0.3]


def test_what_passes_an_activation_is_heard_as_it_was(data: ImageData) -> None:
    class Dropped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.9, inplace=True)

        def between(self, x: Tensor) -> Tensor: return self.drop(x.relu())

    model = modularize(Dropped(), 4, 'moda', EXAMPLE).train()
    images, _ = data.train.take(8)
    _, outputs = model.with_outputs(images)
    assert (outputs[0] == 0).float().mean() < 0.7, 'some are zero by the ReLU, most are not'


def test_coupled_kernels_of_one_layer_need_one_mask() -> None:
    class Grouped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Conv2d(8, 8, 3, groups=4)

    model = modularize(Grouped(), 4, example_input=EXAMPLE)
    masks = {name: torch.ones(n, dtype=torch.bool) for name, n in model.kernels.items()}
    masks['a'][0] = False
    with pytest.raises(ValueError, match='is coupled with others'):
        with fixed_masks(model, masks): pass
    assert torch.isfinite(model(torch.rand(2, 3, 8, 8))).all(), 'it lets go'


def test_nothing_is_loaded_into_a_module_of_other_classes(data: ImageData, tmp_path) -> None:
    model = learned(Net(), data)
    parts = decompose(model, data.train, show_progress=False)
    one, other = extract(model, parts, ['0', '1']), extract(model, parts, ['1', '2'])
    other.load_state_dict({k: v for k, v in other.state_dict().items()})
    before = {k: v.clone() for k, v in one.state_dict().items()}
    path = save_checkpoint(other, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match='another network|a module of the same classes'):
        load_checkpoint(one, path)
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())


def test_frozen_layers_stay_frozen_when_fused(data: ImageData) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            for p in (*self.a.parameters(), *self.norm.parameters()): p.requires_grad_(False)

        def between(self, x: Tensor) -> Tensor: return self.norm(x).relu()

    model = learned(Normed(), data)
    module = extract(model, decompose(model, data.train, show_progress=False), ['0', '1'], fuse=True)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    assert not flags['a.weight'] and not flags['a.bias'] and flags['b.bias']


def test_gates_learn_in_full_precision(data: ImageData) -> None:
    model = modularize(create_model('simcnn', 4, 0.1), 4, example_input=torch.zeros(1, 3, 16, 16)).train()
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    with torch.autocast('cpu', torch.bfloat16): loss, _ = model.training_loss(images, labels, 0.2)
    loss.backward()
    assert model.masks.gates.mask.grad.dtype == torch.float32


def test_first_layer_of_a_class_of_its_own() -> None:
    class Conv(nn.Conv2d):
        def __init__(self, a: int, b: int) -> None: super().__init__(a, b, 3, padding=1)

    net = nn.Sequential(Conv(3, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8, 4))
    assert input_channels(net) == 3 and find_example(net).shape[1] == 3


def test_looking_leaves_nothing_on_a_network() -> None:
    class Scaled(Net):
        def between(self, x: Tensor) -> Tensor: return x * torch.tensor([2.0, 0.5] * 4)[:, None, None]

    net = Scaled()
    before = set(vars(net))
    for _ in range(3): input_channels(net)
    assert set(vars(net)) == before


@pytest.mark.parametrize('method', ['composable', 'mwt', 'moda'])
def test_settings_and_sizes_may_decide(method: str, data: ImageData) -> None:
    class Deciding(Net):
        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            x = self.a(x).relu()
            if x.shape[-1] > 5: x = self.b(x).relu()
            x = x.mean((2, 3))
            if features: return x
            return self.head(x)

    learned(Deciding(), data, method)


def test_activations_of_tokens_are_left_alone(data: ImageData) -> None:
    class Tokens(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu().flatten(2).transpose(1, 2)
            return self.head(self.mix(x).relu().mean(1))

    model = learned(Tokens(), data, 'moda')
    assert len(model.kernels) == 1


@pytest.mark.parametrize('method', ['composable', 'mwt', 'moda'])
def test_a_tensor_that_is_read_twice(method: str, data: ImageData) -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer('scale', torch.rand(1, 8, 1, 1) + 0.5)

        def between(self, x: Tensor) -> Tensor: return (x * self.scale).relu() * self.scale

    model = learned(Twice(), data, method)
    extract(model, decompose(model, data.train, show_progress=False), ['0', '1'])


def test_norms_with_names_of_their_own(data: ImageData) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer('mean', torch.zeros(8))
            self.register_buffer('var', torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def between(self, x: Tensor) -> Tensor: return self.norm(x).relu()

    model = learned(Normed(), data)
    extract(model, decompose(model, data.train, show_progress=False), ['0', '1'])


def test_a_refused_call_leaves_no_names(data: ImageData, tmp_path) -> None:
    net, junk = Net(), tmp_path / 'run.safetensors'
    junk.write_bytes(b'junk')
    with pytest.raises(ValueError, match='truncated, damaged or no safetensors file'):
        fit(net, data, 1, resume=junk, show_progress=False)
    assert getattr(net, 'signature', None) is None


def test_a_lost_run_gives_the_best_weights_back(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    step, done = Trainer.step, []

    def spoiled(self: Trainer, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        done.append(1)
        return step(self, images * (float('nan') if len(done) > 6 else 1), labels)

    monkeypatch.setattr(Trainer, 'step', spoiled)
    net = Net()
    with pytest.raises(FloatingPointError, match='weights of epoch 1 are those of the network again'):
        fit(net, data, 3, show_progress=False)
    assert 0 <= evaluate(net, data.test) <= 1 and all(p.isfinite().all() for p in net.parameters())


def test_a_layer_called_net_is_no_network(data: ImageData) -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = 'a name'

    fit(Named(), data, 1, show_progress=False, compile=False)
    Trainer(Named(), TrainConfig(), 10, compile=True)


def test_signature_of_another_head() -> None:
    net = Net()
    net.signature = from_tensors(*[(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6))] * 3,
                                 batch_size=3, device='cpu').train.signature
    with pytest.raises(ValueError, match='signature names 6'): modularize(net, 4, example_input=EXAMPLE)
