"""Test how a meta-model is split into features and a last linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import build_model
from bidfmkd_fast.models.head import last_linear
from bidfmkd_fast.survey.backbone import check_backbone, features_of


class WithFeatures(nn.Module):
    """A module that ends in no linear layer, but has `features`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3)
        self.ends = nn.Conv2d(4, 5, 14)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.ends(self.features(images)).flatten(1)


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 5, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).flatten(1)


@pytest.mark.parametrize("name", ["conv4", "conv4_any_size", "resnet10"])
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_features_and_head_make_the_logits(name: str, batch_statistics: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = build_model(
        name, in_channels=1, n_classes=5, image_size=(16, 16), width=8,
        batch_statistics=batch_statistics,
    )  # fmt: skip
    images = torch.rand(6, 1, 16, 16)
    head = last_linear(module)
    assert head is module.classifier
    before = {name: value.clone() for name, value in module.state_dict().items()}
    features = features_of(module)(images)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(head(features), module(images))


def test_gradients_reach_every_layer_but_the_head() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(588, 4))
    features_of(module)(torch.rand(2, 1, 16, 16)).sum().backward()
    assert module[0].weight.grad is not None and module[3].weight.grad is None


def test_a_module_with_features_serves() -> None:
    module = WithFeatures()
    check_backbone("fit", module)
    assert features_of(module)(torch.rand(2, 1, 16, 16)).shape == (2, 4 * 14 * 14)


def test_a_module_with_neither_is_refused_naming_both() -> None:
    with pytest.raises(
        InputError, match=r"nn\.Linear, or it must have a method features\(images\)"
    ):
        check_backbone("fit", Headless())


def test_running_statistics_stay(seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(588, 4))
    before = module[1].running_mean.clone()
    features_of(module)(torch.rand(4, 1, 16, 16))
    assert torch.equal(module[1].running_mean, before)
