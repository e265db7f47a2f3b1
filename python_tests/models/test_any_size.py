"""Check the Conv4 for any image size, and `fit_images`."""

from __future__ import annotations

import pytest
import torch

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import Conv4, build_model, fit_images, model_arguments


def test_it_is_a_conv4_of_fitted_images(seed: int) -> None:
    torch.manual_seed(seed)
    arguments = {
        "in_channels": 3,
        "n_classes": 4,
        "image_size": (16, 24),
        "width": 3,
        "batch_statistics": True,
    }
    module = build_model("conv4_any_size", **arguments)
    plain = Conv4(3, 4, (16, 24), 3, batch_statistics=True)
    plain.load_state_dict(module.state_dict())
    for shape in ((3, 16, 24), (3, 40, 30), (1, 12, 50)):
        images = torch.rand(5, *shape)
        assert torch.equal(module(images), plain(fit_images(images, (3, 16, 24))))
    assert model_arguments(module) == {"name": "conv4_any_size"} | arguments


def test_images_that_fit_are_returned_as_they_are() -> None:
    images = torch.rand(2, 3, 8, 9)
    assert fit_images(images, (3, 8, 9)) is images


def test_one_channel_is_repeated() -> None:
    images = torch.rand(2, 4, 1, 8, 8)
    fitted = fit_images(images, (3, 8, 8))
    assert fitted.shape == (2, 4, 3, 8, 8)
    for channel in range(3):
        assert torch.equal(fitted[:, :, channel], images[:, :, 0])


def test_enlarging_and_shrinking_by_two_against_the_weights_by_hand() -> None:
    """Compare with the weights of bilinear interpolation.

    Enlarged by 2, an inner pixel is 3/4 of the nearest and 1/4 of the next; halved, the smoothing
    has the weights 1 3 3 1.
    """
    row = torch.tensor([0.0, 1.0, 0.0, 0.0])
    wide = fit_images(row.expand(1, 1, 4, 4), (1, 4, 8))[0, 0, 0]
    torch.testing.assert_close(wide, torch.tensor([0.0, 0.25, 0.75, 0.75, 0.25, 0.0, 0.0, 0.0]))
    long = torch.zeros(8)
    long[3] = 1
    short = fit_images(long.expand(1, 1, 8, 8), (1, 8, 4))[0, 0, 0]
    torch.testing.assert_close(short, torch.tensor([0.0, 3 / 8, 1 / 8, 0.0]))


def test_values_stay_in_range(seed: int) -> None:
    torch.manual_seed(seed)
    for size in (5, 16, 40):
        fitted = fit_images(torch.rand(3, 1, size, size).round(), (3, 16, 16))
        assert fitted.min() >= 0 and fitted.max() <= 1 + 1e-6


def test_colours_do_not_become_grey() -> None:
    with pytest.raises(InputError, match=r"1 channel; got \[2, 3, 8, 8\]"):
        fit_images(torch.rand(2, 3, 8, 8), (1, 8, 8))
