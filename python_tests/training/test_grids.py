"""Check the grids of recovered images pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bidfmkd_fast.recovery import Recovered
from bidfmkd_fast.training import RecoveredSet
from bidfmkd_fast.training.grids import save_grid

BLUE, ORANGE = (0, 114, 178), (230, 120, 0)


def recovered_set(
    images: Tensor, labels: list[int], answers: list[int], part: str = "support"
) -> RecoveredSet:
    n_classes = max(labels) + 1
    scores = torch.eye(n_classes)[answers]
    recovered = Recovered(images, torch.tensor(labels), scores, torch.zeros(len(labels)), [], True)
    return RecoveredSet(
        0, "the api", tuple(f"class {k}" for k in range(n_classes)), part, recovered
    )


def test_a_grid_shows_every_image_enlarged_in_its_row_and_framed(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, 16, 16, generator=draws)
    images[0] += 3  # out of range: shown as white
    grid_set = recovered_set(images, [0, 0, 1, 1], [0, 1, 1, 0])
    save_grid([grid_set], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    zoom, cell, head = 3, 16 * 3 + 6, 24
    left = int((pixels[head + 2] == BLUE).all(axis=1).argmax()) - 1  # where the first frame starts
    for position in range(4):
        top, start = head + (position // 2) * cell, left + (position % 2) * cell
        shown = pixels[top + 3 : top + 3 + 48 : zoom, start + 3 : start + 3 + 48 : zoom]
        wanted = (images[position].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        right = position in (0, 2)
        rows, columns = np.indices((16, 16))
        # The filled corner hides the rest.
        seen = np.ones((16, 16), bool) if right else columns - rows < 10
        assert np.abs(shown - wanted)[seen].max() <= 0.5
        assert tuple(pixels[top + 2, start + 2]) == (BLUE if right else ORANGE)
        # The kinds differ in shape as well, for people who cannot tell the colours apart.
        corner = pixels[top + 3 : top + 7, start + 47 : start + 51]
        assert (corner == ORANGE).all() == (not right)
    names = pixels[head:, :left]
    assert (names.min(axis=(1, 2)) < 128).any(), "the class names are missing"


def test_both_sets_stand_side_by_side_and_large_sets_are_cut(tmp_path: Path) -> None:
    labels = [label for label in range(30) for _ in range(15)]
    grid_set = recovered_set(torch.zeros(450, 1, 8, 8), labels, labels)
    save_grid([grid_set], tmp_path / "one.png")
    save_grid([grid_set, grid_set], tmp_path / "two.png")
    width, height = Image.open(tmp_path / "one.png").size
    assert Image.open(tmp_path / "two.png").size == (2 * width + 16, height)
    assert height == 24 + 20 * 54
    assert width < 12 * 54 + 100
