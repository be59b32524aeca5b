"Small networks, each with one oddity, and data for them."

from __future__ import annotations
from collections.abc import Callable
from typing import Any
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from mwt.data.batches import ImageData, from_tensors


def few_images(size: int = 16, classes: int = 4, black: bool = False) -> ImageData:
    "48 images that are easy to tell apart, or all black."
    labels = torch.arange(48) % classes
    noise = torch.randint(60, (48, 3, size, size), generator=torch.Generator().manual_seed(0))
    images = (40 * labels[:, None, None, None] + noise).byte()
    split = (torch.zeros_like(images) if black else images), labels
    return from_tensors(split, split, split, batch_size=16, augment=None, device='cpu')


class Small(nn.Module):
    "Two convolutions with norms, and a head."

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm_a(self.a(x)))
        x = torch.relu(self.norm_b(self.b(x)))
        return self.head(x.mean((2, 3)))


class Between(Small):
    "Something between the first norm and the second convolution."

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor], extra: nn.Module | None = None) -> None:
        super().__init__()
        self.use, self.extra = use, extra

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self, self.norm_a(self.a(x)))
        x = torch.relu(self.norm_b(self.b(torch.relu(x))))
        return self.head(x.mean((2, 3)))


class Answers(Small):
    "Something done to the answer."

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(super().forward(x))


class Viewed(Small):
    "A head that reads every pixel, by some view."

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view, self.head = view, nn.Linear(8 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(x)))
        return self.head(self.view(torch.relu(self.norm_b(self.b(x)))))


class Encoder(nn.Module):
    "Layers, a norm, an activation, the head and whole blocks under two names; called by the other ones."

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.body = nn.Sequential(self.conv, self.norm, self.act)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer2 = nn.Sequential(self.conv2, self.norm2, nn.ReLU())
        self.blocks = nn.ModuleList([self.body, self.layer2])
        self.fc = nn.Linear(8, 4)
        self.head = self.fc

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class EncoderMixed(Encoder):
    "The same, called once by the first names and once by the others."

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm2(self.conv2(self.body(x))))
        return self.fc(x.mean((2, 3)))


class WithTensors(Small):
    "Buffers of several types, and a parameter that is used by itself."

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
        self.register_buffer('flags', torch.tensor([True, False, True]))
        self.register_buffer('table', torch.arange(200).to(torch.uint8))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(x - self.mean)) * self.scale)
        return self.head(torch.relu(self.norm_b(self.b(x))).mean((2, 3)))


class Remembers(Small):
    "Keeps results of its last pass, as an attribute."

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.relu(self.norm_a(self.a(x)))
        return self.head(torch.relu(self.norm_b(self.b(self.features))).mean((2, 3)))


class SharedNorm(Small):
    "One norm behind two convolutions."

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.a, self.b, self.b):
            x = torch.relu(self.norm_a(conv(x)))
        return self.head(x.mean((2, 3)))


class OwnConv(nn.Conv2d):
    "A convolution that views its weight."

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(self.weight.shape[0], -1)
        weight = (flat - flat.mean(1, keepdim=True)).view(self.weight.shape)
        return F.conv2d(x, weight, self.bias, padding=1)


def changed(change: Callable[[Small], Any]) -> Callable[[], Small]:
    "A maker of networks to which something was done."

    def make() -> Small:
        net = Small()
        change(net)
        return net

    return make
