"""Test the jitter of pictures against one written pixel by pixel in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.survey.jitter import N_DRAWS, jittered


def plain_jitter(image: Tensor, draws: list[float], amount: float) -> Tensor:
    """Jitter one image `[C, H, W]`: where each pixel comes from, and what is between its four."""
    _, height, width = image.shape
    turn, stretch, right, down = (amount * (2 * draw - 1) for draw in draws)
    result = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            # In pixels from the centre; the shift is in sides.
            x, y = column - (width - 1) / 2, row - (height - 1) / 2
            from_x = (1 + stretch) * (math.cos(turn) * x - math.sin(turn) * y)
            from_y = (1 + stretch) * (math.sin(turn) * x + math.cos(turn) * y)
            px = mirrored(from_x + 0.6 * right * width + (width - 1) / 2, width)
            py = mirrored(from_y + 0.6 * down * height + (height - 1) / 2, height)
            left, top = math.floor(px), math.floor(py)
            value = torch.zeros_like(image[:, 0, 0])
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                weight = (1 - abs(py - i)) * (1 - abs(px - j))
                if weight > 0:
                    value = value + weight * image[:, i, j]
            result[:, row, column] = value
    return result


def mirrored(position: float, size: int) -> float:
    """Reflect a position at the outer edges of the first and last pixel, into the picture."""
    position = (position + 0.5) % (2 * size)
    position = min(position, 2 * size - position) - 0.5
    return min(max(position, 0.0), size - 1.0)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 13)])
@pytest.mark.parametrize("amount", [0.1, 1.0])
def test_it_is_that_of_the_plain_loop(
    shape: tuple[int, int, int], amount: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, *shape, dtype=torch.float64, generator=generator)
    draws = torch.rand(4, N_DRAWS, dtype=torch.float64, generator=generator)
    wanted = torch.stack(
        [plain_jitter(image, draw.tolist(), amount) for image, draw in zip(images, draws)]
    )
    torch.testing.assert_close(jittered(images, draws, amount), wanted, rtol=1e-9, atol=1e-9)
    in_float32 = jittered(images.float(), draws.float(), amount)
    torch.testing.assert_close(in_float32.double(), wanted, rtol=0, atol=1e-4)


def test_the_middle_of_the_draws_changes_nothing(seed: int) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    same = jittered(images, torch.full((3, N_DRAWS), 0.5), 0.1)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)
