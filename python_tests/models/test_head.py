"""Test that a head grows to any number of classes, the same vector for each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
    body = {name: value for name, value in module.state_dict().items() if "classifier" not in name}
    assert all(torch.equal(grown.state_dict()[name], value) for name, value in body.items())
    assert grown(torch.rand(3, 1, 16, 16)).shape == (3, 12)


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


class Odd(nn.Module):
    """A module whose head was registered before the layers that run before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def test_the_head_is_the_linear_layer_that_runs_last() -> None:
    module, images = Odd(), torch.rand(2, 1, 4, 4)
    state = torch.random.get_rng_state()
    assert last_linear(module, images) is module.head
    assert torch.equal(state, torch.random.get_rng_state())  # the dropout drew from another
    grown = with_classes("adapt", module, 7, images)
    assert grown(images).shape == (2, 7) and grown.body[1].out_features == 8
    zero_head(module, images)
    assert module.body[1].weight.any() and not module.head.weight.any()


def test_a_module_that_has_enough_outputs_needs_no_linear_layer() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())
    images = torch.rand(2, 1, 4, 4)
    assert with_classes("adapt", module, 3, images) is module
    with pytest.raises(InputError, match=r"cannot be changed to 4"):
        with_classes("adapt", module, 4, images)


def test_frozen_and_shared_parameters_are_not_zeroed() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.Linear(3, 3))
    module[2].weight = module[1].weight
    module[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    zero_head(module, torch.rand(2, 3, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
