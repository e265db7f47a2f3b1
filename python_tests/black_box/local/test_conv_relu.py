"""Check which convolutions are fused with their ReLU, and that the scores do not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.black_box.local.conv_relu import ConvReLU2d, fuse_relus


def chain(*after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *after)


class Functional(nn.Module):
    """A module of two convolutions before functional ReLUs, one of which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        second = self.second(functional.relu(self.first(images)))
        return torch.relu(second) + second


def hooked() -> nn.Module:
    module = chain(nn.MaxPool2d(2), nn.ReLU())
    module[1].register_forward_hook(lambda layer, inputs, output: -output)
    return module


def returning_indices() -> nn.Module:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.pool = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, return_indices=True)

        def forward(self, images: Tensor) -> Tensor:
            return self.pool(self.convolution(images))[0].relu()

    return Module()


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "relu": (lambda: chain(nn.ReLU()), 1),
    "in place": (lambda: chain(nn.ReLU(inplace=True)), 1),
    "identity, pool, relu": (lambda: chain(nn.Identity(), nn.MaxPool2d(3, 2, 1), nn.ReLU()), 1),
    "functions": (Functional, 1),
    "average": (lambda: chain(nn.AvgPool2d(2), nn.ReLU()), 0),
    "leaky": (lambda: chain(nn.LeakyReLU()), 0),
    "normed": (lambda: chain(nn.BatchNorm2d(3), nn.ReLU()), 0),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU()), 0),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU()),
        0,
    ),
    "hooked pool": (hooked, 0),
    "indices": (returning_indices, 0),
    "end": (chain, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_fused_keeps_its_values(name: str, seed: int) -> None:
    build, fused = CASES[name]
    torch.manual_seed(seed)
    module, images = build().eval(), torch.randn(5, 2, 9, 8)
    with torch.no_grad():
        wanted = module(images.clone())
        assert wanted.std() > 0
        fuse_relus(module)
        assert sum(isinstance(layer, ConvReLU2d) for layer in module.modules()) == fused
        torch.testing.assert_close(module(images.clone()), wanted, rtol=1e-5, atol=1e-5)
