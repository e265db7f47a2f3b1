"""Check what a notebook shows of a recovered set."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from bidfmkd_fast.recovery import Recovered


def recovered(images: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Recovered:
    scores = torch.eye(n_classes)[labels]
    return Recovered(images, labels, scores, torch.zeros(len(images)), [], complete=True)


def picture(html: str) -> np.ndarray:
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_stands_in_the_row_of_its_class(channels: int) -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    images = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, channels, 4, 5).clone()
    grid_set = recovered(images, labels, 3)
    html = grid_set._repr_html_()
    assert "Recovered(6 images" in html and "100 % as wanted" in html
    pixels = picture(html).reshape(3 * 6, 3 * 7, -1)
    for row, column, value in (
        (0, 0, 0),
        (0, 1, 51),
        (1, 0, 102),
        (2, 0, 153),
        (2, 1, 204),
        (2, 2, 255),
        (1, 2, 255),
    ):
        tile = pixels[6 * row : 6 * row + 4, 7 * column : 7 * column + 5]
        assert (tile == value).all(), (row, column)


@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 8, 8), (4, 5, 5)])
def test_any_range_shape_and_number(shape: tuple[int, ...]) -> None:
    labels = torch.arange(50).repeat_interleave(14)
    images = 3 * torch.randn(700, *shape)
    images[0, 0, 0, 0] = float("nan")
    pixels = picture(recovered(images, labels, 50)._repr_html_())
    # At most 20 classes and 12 images of each are shown.
    assert pixels.shape[:2] == (20 * (shape[1] + 2), 12 * (shape[2] + 2))
    assert pixels.min() < 60 and pixels.max() == 255
    assert "<img" not in recovered(images[:0], labels[:0], 50)._repr_html_()
    constant = recovered(torch.full((1, 1, 4, 4), 7.0), torch.tensor([0]), 1)._repr_html_()
    assert picture(constant).shape == (6, 6)
