"""Check Conv4 against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import Conv4, build_model, model_arguments


def by_hand(model: Conv4, images: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
    """Compute the network in float64 from its definition.

    Torch's convolution, batch norm and pooling are not used.
    """
    state = {key: value.double() for key, value in model.state_dict().items()}
    x = images.double()
    for i in range(4):
        weight = state[f"blocks.{i}.0.weight"]
        n, _, h, w = x.shape
        patches = nn.functional.unfold(x, 3, padding=1)
        x = (weight.flatten(1) @ patches).view(n, -1, h, w)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        if not batch_statistics:
            mean, variance = state[f"blocks.{i}.1.running_mean"], state[f"blocks.{i}.1.running_var"]
        x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        x = x * state[f"blocks.{i}.1.weight"].view(-1, 1, 1) + state[f"blocks.{i}.1.bias"].view(
            -1, 1, 1
        )
        x = x.clamp(min=0)[..., : h // 2 * 2, : w // 2 * 2]
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    return x.flatten(1) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 48)), (3, (16, 17))])
def test_logits_are_those_of_the_definition(
    channels: int, size: tuple[int, int], batch_statistics: bool
) -> None:
    torch.manual_seed(5)
    model = Conv4(channels, 7, size, width=6, batch_statistics=batch_statistics)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            if not batch_statistics:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    images = torch.rand(5, channels, *size)
    model.eval()
    logits = model(images)
    assert logits.shape == (5, 7)
    torch.testing.assert_close(
        logits.double(), by_hand(model, images, batch_statistics), rtol=1e-3, atol=1e-4
    )


def test_batch_statistics_keeps_no_state_and_works_under_vmap_in_training() -> None:
    model = build_model(
        "conv4", in_channels=1, n_classes=5, image_size=(28, 28), width=4, batch_statistics=True
    )
    assert list(model.buffers()) == []
    first, second = (
        {key: torch.randn_like(value) for key, value in model.named_parameters()} for _ in range(2)
    )
    stacked = {key: torch.stack([first[key], second[key]]) for key in first}
    images = torch.rand(2, 10, 1, 28, 28)
    together = vmap(lambda parameters, images: functional_call(model, parameters, (images,)))(
        stacked, images
    )
    for i, parameters in enumerate((first, second)):
        alone = functional_call(model, parameters, (images[i],))
        torch.testing.assert_close(
            together[i], alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item()
        )


def test_model_arguments_rebuild_the_module() -> None:
    model = build_model(
        "conv4", in_channels=3, n_classes=4, image_size=(20, 32), width=5, batch_statistics=True
    )
    arguments = model_arguments(model)
    assert arguments is not None
    again = build_model(**arguments)
    again.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 20, 32)
    assert torch.equal(again(images), model(images))
    assert model_arguments(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "conv5"}, "conv5"),
        ({"image_size": (15, 28)}, r"\(15, 28\)"),
        ({"image_size": (28, 15)}, r"\(28, 15\)"),
        ({"in_channels": 0}, "in_channels"),
        ({"n_classes": 1}, "n_classes"),
        ({"width": 0}, "width"),
        ({"width": 10**6}, "Conv4: a network of width=1000000 .* takes at least 108,"),
        ({"image_size": (10**6, 10**6)}, "Conv4: .* for images of 1000000 x 1000000 takes at"),
    ],
)
def test_refusals(change: dict, says: str) -> None:
    arguments = {
        "name": "conv4",
        "in_channels": 1,
        "n_classes": 5,
        "image_size": (28, 28),
        "width": 4,
    } | change
    with pytest.raises(InputError, match=says):
        build_model(**arguments)
