"""Test that a head grows to any number of classes, the same vector for each of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import build_model
from bidfmkd_fast.models.head import last_linear, with_classes, zero_head


@pytest.mark.parametrize("name", ["conv4", "conv4_any_size", "resnet10"])
def test_rows_of_a_grown_head_are_the_mean_of_the_old(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    module = build_model(name, in_channels=1, n_classes=5, image_size=(16, 16), width=4)
    grown = with_classes("adapt", module, 12)
    old, new = last_linear(module), last_linear(grown)
    assert old is not None and new is not None and grown is not module
    assert old.out_features == module.n_classes == 5  # the module itself stays
    assert new.out_features == grown.n_classes == 12
    torch.testing.assert_close(new.weight, old.weight.mean(0).expand(12, -1))
    torch.testing.assert_close(new.bias, old.bias.mean().expand(12))
    images = torch.rand(3, 1, 16, 16)
    assert grown(images).shape == (3, 12)
    body = {name: value for name, value in module.state_dict().items() if "classifier" not in name}
    assert all(torch.equal(grown.state_dict()[name], value) for name, value in body.items())


def test_a_head_that_is_wide_enough_stays(seed: int) -> None:
    module = build_model("conv4", in_channels=1, n_classes=5, image_size=(16, 16), width=4)
    assert with_classes("adapt", module, 5) is module and with_classes("adapt", module, 2) is module


def test_a_module_without_a_last_linear_layer_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 3, 1))
    with pytest.raises(InputError, match=r"adapt: the last layer of Sequential is no nn\.Linear"):
        with_classes("adapt", module, 4)


def test_the_head_is_set_to_zero() -> None:
    module = build_model("conv4", in_channels=1, n_classes=5, image_size=(16, 16), width=4)
    zero_head(module)
    assert not module.classifier.weight.any() and not module.classifier.bias.any()
    assert module.blocks[0][0].weight.any()
