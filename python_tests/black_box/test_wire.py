"""Check what a service receives against arithmetic by hand: size, channels, bytes and files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.black_box.wire import through_wire, wire_array, wire_files, wire_tensor
from bidfmkd_fast.errors import InputError


def images_of(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def test_plain_images_are_sent_as_they_are(seed: int) -> None:
    images = images_of(seed, 4, 3, 6, 5)
    assert np.array_equal(wire_array(images, APISpec(2, (3, 6, 5))), images.numpy())
    turned = wire_array(images, APISpec(2, (3, 6, 5), layout="NHWC"))
    assert turned.flags["C_CONTIGUOUS"] and np.array_equal(
        turned, images.permute(0, 2, 3, 1).numpy()
    )


def test_normalised_by_us(seed: int) -> None:
    images = images_of(seed, 2, 3, 4, 4)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    wanted = (images.double().numpy() - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    sent = wire_array(images, APISpec(2, (3, 4, 4), mean=mean, std=std))
    assert sent.dtype == np.float32
    np.testing.assert_allclose(sent, wanted, rtol=1e-5, atol=1e-5)


def test_bytes_are_rounded_and_held_in_range(seed: int) -> None:
    spec = APISpec(2, (1, 2, 2), (-1.0, 1.0), dtype="uint8")
    images = torch.tensor([-1.0, 1.0, -1.3, 1.3]).reshape(1, 1, 2, 2)
    assert wire_array(images, spec).tolist() == [[[[0, 255], [0, 255]]]]
    images = images_of(seed, 5, 1, 2, 2, low=-1.0, high=1.0)
    wanted = np.rint((images.double().numpy() + 1) * 127.5)
    assert (
        np.abs(wire_array(images, spec).astype(float) - wanted).max() <= 1
    )  # an exact half may go either way
    assert (wire_array(images, spec) == wanted).mean() > 0.8


def test_channels_and_size_are_the_services(seed: int) -> None:
    grey = images_of(seed, 2, 1, 4, 4)
    three = wire_array(grey, APISpec(2, (1, 4, 4), server_shape=(3, 4, 4)))
    assert all(np.array_equal(three[:, channel], grey[:, 0].numpy()) for channel in range(3))
    colour = images_of(seed, 2, 3, 4, 4)
    luma = wire_array(colour, APISpec(2, (3, 4, 4), server_shape=(1, 4, 4)))
    weights = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    np.testing.assert_allclose(luma[:, 0], (colour.double().numpy() * weights).sum(1), rtol=1e-5)
    # A linear ramp stays one under bilinear resampling, away from the border.
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    double = wire_array(ramp, APISpec(2, (1, 16, 16), (0.0, 15.0), server_shape=(1, 32, 32)))
    np.testing.assert_allclose(double[0, 0, 5, 2:30], (np.arange(2, 30) + 0.5) / 2 - 0.5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 9, 7)])
def test_png_files_hold_the_bytes(shape: tuple[int, int, int], seed: int) -> None:
    images = images_of(seed, 3, *shape)
    spec = APISpec(2, shape, encoding="png")
    for file, pixels in zip(wire_files(images, spec), wire_array(images, spec), strict=True):
        opened = Image.open(io.BytesIO(file))
        assert opened.format == "PNG" and opened.mode == ("L" if shape[0] == 1 else "RGB")
        assert np.array_equal(np.asarray(opened).reshape(9, 7, shape[0]).transpose(2, 0, 1), pixels)


@pytest.mark.parametrize("shape", [(1, 16, 8), (3, 16, 8)])
@pytest.mark.parametrize(
    ("fields", "worst"),
    [({"dtype": "uint8"}, 0.5), ({"encoding": "png"}, 0.5), ({"encoding": "jpeg"}, 30)],
)
def test_what_is_left_after_the_wire(
    shape: tuple[int, int, int], fields: dict[str, Any], worst: float, seed: int
) -> None:
    spec = APISpec(2, shape, (-1.0, 1.0), **fields)
    smooth = torch.nn.functional.interpolate(
        images_of(seed, 2, shape[0], 2, 2, low=-1, high=1), size=shape[1:]
    )
    left = through_wire(smooth, spec)
    assert left.shape == smooth.shape and left.dtype == torch.float32
    off = (left - smooth).abs().max() * 127.5
    assert 0 < off <= worst + 1e-3
    torch.testing.assert_close(
        through_wire(left, APISpec(2, shape, (-1.0, 1.0), dtype="uint8")), left
    )
    assert through_wire(smooth, APISpec(2, shape)) is smooth


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_tensor_on_the_wire_is_the_array(layout: str, seed: int) -> None:
    images = images_of(seed, 3, 3, 6, 5, low=-1.0, high=1.0)
    for fields in (
        {"server_shape": (1, 4, 4)},
        {"server_shape": (3, 9, 7), "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)},
    ):
        spec = APISpec(2, (3, 6, 5), (-1.0, 1.0), layout=layout, **fields)  # type: ignore[arg-type]
        assert np.array_equal(wire_tensor(images, spec).numpy(), wire_array(images, spec))
    coarse = APISpec(2, (3, 6, 5), (-1.0, 1.0), layout=layout, dtype="uint8")
    np.testing.assert_allclose(
        (wire_tensor(images, coarse).numpy() + 1) * 127.5, wire_array(images, coarse), atol=1e-4
    )


def test_a_local_api_sees_what_its_spec_lets_through(seed: int) -> None:
    images, seen = images_of(seed, 4, 1, 4, 4), []

    def function(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1)[:, :2]

    spec = APISpec(2, (1, 4, 4), dtype="uint8", decimals=1)
    scores = FunctionBlackBox(function, spec)(images)
    torch.testing.assert_close(seen[0], (images * 255).round() / 255)
    torch.testing.assert_close(scores, (seen[0].flatten(1)[:, :2] * 10).round() / 10)
    with pytest.raises(InputError, match="are for services and functions.*use FunctionBlackBox"):
        TorchBlackBox(torch.nn.Flatten(), APISpec(2, (1, 4, 4), layout="NHWC"))
