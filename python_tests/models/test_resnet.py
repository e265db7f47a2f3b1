"""Check the ResNets against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES
from torch import nn
from torch.func import functional_call, vmap

from bidfmkd_fast.black_box import APISpec, TorchBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import build_model, model_arguments

NAMES = ("resnet10", "resnet18")


def made(name: str, seed: int, **changes: object) -> nn.Module:
    """Make a ResNet whose batch norms do something."""
    torch.manual_seed(seed)
    arguments = {"in_channels": 3, "n_classes": 5, "image_size": (20, 17), "width": 4} | changes
    module = build_model(name, **arguments)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.2)
            nn.init.normal_(layer.bias, 0, 0.2)
            if layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 2)
    return module.eval()


def by_hand(module: nn.Module, images: torch.Tensor, blocks: int) -> torch.Tensor:
    """Compute the network in float64 from its definition, as products of unfolded images."""
    state = {key: value.double() for key, value in module.state_dict().items()}

    def layer(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.0.weight"]
        side = weight.shape[-1]
        height, width = ((size - 1) // stride + 1 for size in x.shape[-2:])
        patches = nn.functional.unfold(x, side, padding=side // 2, stride=stride)
        x = (weight.flatten(1) @ patches).view(len(x), -1, height, width)
        mean, variance, scale, shift = (
            state[f"{name}.1.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = layer("stem", images.double())
    for index in range(4 * blocks):
        stride = 2 if index >= blocks and index % blocks == 0 else 1
        inside = layer(f"blocks.{index}.first", x, stride).clamp(min=0)
        beside = layer(f"blocks.{index}.shortcut", x, stride) if stride == 2 else x
        x = (layer(f"blocks.{index}.second", inside) + beside).clamp(min=0)
    return x.flatten(2).mean(2) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize(("name", "blocks"), [("resnet10", 1), ("resnet18", 2)])
def test_logits_are_those_of_the_definition(name: str, blocks: int, seed: int) -> None:
    module = made(name, seed)
    images = torch.rand(3, 3, 20, 17)
    wanted = by_hand(module, images, blocks)
    scale = wanted.abs().max().item()
    torch.testing.assert_close(
        module(images).double(), wanted, rtol=0, atol=TOLERANCES["float32"][0] * scale
    )


@pytest.mark.parametrize(
    ("name", "convolutions", "parameters"), [("resnet10", 9, 4.9e6), ("resnet18", 17, 11.2e6)]
)
def test_depth_and_size_at_full_width_are_the_papers(
    name: str, convolutions: int, parameters: float
) -> None:
    """Count the 3x3 convolutions and the linear layer, which 10 and 18 are the numbers of."""
    with torch.device("meta"):
        module = build_model(name, in_channels=3, n_classes=5, image_size=(84, 84), width=64)
    sides = [layer.kernel_size for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert sides.count((3, 3)) == convolutions and sides.count((1, 1)) == 3
    assert sum(value.numel() for value in module.parameters()) == pytest.approx(
        parameters, rel=0.02
    )


@pytest.mark.parametrize("name", NAMES)
def test_batch_statistics_keeps_no_state_and_works_under_vmap(name: str, seed: int) -> None:
    module = made(name, seed, batch_statistics=True, image_size=(12, 12), in_channels=1).train()
    assert list(module.buffers()) == []
    stacked = {key: torch.stack([value, 0.5 * value]) for key, value in module.named_parameters()}
    images = torch.rand(2, 6, 1, 12, 12)
    together = vmap(lambda parameters, images: functional_call(module, parameters, (images,)))(
        stacked, images
    )
    for i in range(2):
        alone = functional_call(
            module, {key: value[i] for key, value in stacked.items()}, (images[i],)
        )
        torch.testing.assert_close(
            together[i], alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item()
        )


@pytest.mark.parametrize("name", NAMES)
def test_served_as_a_black_box_its_batch_norms_are_folded_and_its_scores_the_same(
    name: str, seed: int
) -> None:
    module = made(name, seed)
    images = torch.rand(4, 3, 20, 17)
    with torch.no_grad():
        wanted = module(images)
    scale = wanted.abs().max().item()
    answer = TorchBlackBox(module, APISpec(n_classes=5, image_shape=(3, 20, 17)))(images)
    torch.testing.assert_close(answer, wanted, rtol=0, atol=TOLERANCES["float32"][0] * scale)


@pytest.mark.parametrize("name", NAMES)
def test_its_arguments_build_it_again(name: str, seed: int) -> None:
    module = made(name, seed, width=3)
    arguments = model_arguments(module)
    assert arguments is not None and arguments["name"] == name
    build_model(**arguments).load_state_dict(module.state_dict())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"n_classes": 1}, "n_classes"),
        ({"width": 0}, "width"),
        ({"width": 10**6}, "ResNet10: a network of width=1000000 takes at least .* GB of memory"),
        ({"image_size": (28, 7)}, r"ResNet10: image_size must be at least \(8, 8\)"),
    ],
)
def test_bad_sizes_are_refused(change: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build_model(
            "resnet10", **{"in_channels": 1, "n_classes": 5, "image_size": (28, 28)} | change
        )


@pytest.mark.parametrize("width", [2, 8, 16])
def test_gradients_in_channels_last_are_those_in_the_plain_order(
    width: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Take the path on which a strided 1x1 convolution would write past its memory.

    A smooth function stands in for ReLU, which in float32 may fall on the other side of its kink
    (1.5e-5 at worst over 180 networks).
    """
    monkeypatch.setattr(nn.functional, "relu", nn.functional.softplus)
    gradients = []
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.float64, torch.float32):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            module = made("resnet10", seed, width=width, image_size=(64, 64)).to(dtype)
            module = module.to(memory_format=memory_format)
            logits = module(images.to(dtype).contiguous(memory_format=memory_format))
            logits.square().sum().backward()
            gradients.append([value.grad.double() for value in module.parameters()])
    for wanted, in_float64, *in_float32 in zip(*gradients):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(in_float64, wanted, rtol=0, atol=1e-9 * scale)
        for other in in_float32:
            torch.testing.assert_close(other, wanted, rtol=0, atol=1e-4 * scale)
