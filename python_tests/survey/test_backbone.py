"""Test how a meta-model is split into features and a last linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import build_model
from bidfmkd_fast.models.head import last_linear, zero_head
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
    features = features_of(module, images)(images)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(head(features), module(images))


def test_gradients_reach_every_layer_but_the_head() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(588, 4))
    images = torch.rand(2, 1, 16, 16)
    features_of(module, images)(images).sum().backward()
    assert module[0].weight.grad is not None and module[3].weight.grad is None


def test_a_module_with_features_serves() -> None:
    module = WithFeatures()
    images = torch.rand(2, 1, 16, 16)
    check_backbone("fit", module, images)
    assert features_of(module, images)(images).shape == (2, 4 * 14 * 14)


def test_a_module_with_neither_is_refused_naming_both() -> None:
    with pytest.raises(
        InputError, match=r"nn\.Linear, or it must have a method features\(images\)"
    ):
        check_backbone("fit", Headless(), torch.rand(2, 1, 16, 16))


def test_running_statistics_stay(seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(588, 4))
    before = module[1].running_mean.clone()
    images = torch.rand(4, 1, 16, 16)
    features_of(module, images)(images)
    assert torch.equal(module[1].running_mean, before)


class FeaturesInList(nn.Module):
    """A module whose `features` is a list of layers, which cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleList([nn.Flatten()])
        self.ends = nn.Linear(256, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.ends(self.features[0](images))
        return logits


class HeadByHand(Headless):
    """A module whose last layer is an nn.Linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(super().forward(images), self.ends.weight, self.ends.bias)


class Flat(Headless):
    """A module whose features have no dimension but the batch."""

    def features(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (FeaturesInList(), "has features that fail: .*ModuleList"),
        (Flat(), "has features that fail: Dimension out of range"),
        (HeadByHand(), "has neither"),
    ],
)
def test_what_would_fail_after_the_survey_is_refused_before(module: nn.Module, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_backbone("fit", module, torch.rand(2, 1, 16, 16))


def test_linear_layers_of_the_features_are_no_head() -> None:
    """A cosine head, say, is no layer, so the linear layer before it must keep its weights."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rows = nn.Linear(256, 8), nn.Parameter(torch.rand(3, 8))

        def features(self, images: Tensor) -> Tensor:
            return self.body(images.flatten(1)).relu()

        def forward(self, images: Tensor) -> Tensor:
            return self.features(images) @ self.rows.T

    module = Bare()
    zero_head(module, torch.rand(2, 1, 16, 16))
    assert module.body.weight.any()
