"""Check the grids of recovered images pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.recovery import Recovered
from bidfmkd_fast.survey.answers import KeptAnswers
from bidfmkd_fast.training import RecoveredSet
from bidfmkd_fast.training.grids import draw_survey, save_grid

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


def test_a_survey_is_shown_with_what_the_apis_answered() -> None:
    """Two APIs of different sizes: a row each, every picture in its place above its answer."""
    scores = torch.tensor([[0.0, 9.0], [9.0, 0.0], [9.0, 0.0]])
    numbers = torch.tensor([0, 1, 4])
    small = KeptAnswers("small", "logits", (1, 16, 16), 7, numbers, scores)
    large = KeptAnswers("large", "labels", (3, 64, 40), 7, numbers[:2], scores[:2])
    sheet = np.asarray(draw_survey([small, large]))
    heights = [3 * 16 + 44, 64 + 44]  # pictures are enlarged to a side of at least 48
    assert sheet.shape[0] == sum(heights)
    for kept, top, zoom in ((small, 0, 3), (large, heights[0], 1)):
        _, height, width = kept.image_shape
        drawn = procedural_images(5, kept.image_shape, seed=7)[kept.numbers]
        wanted = (255 * drawn).round().byte().permute(0, 2, 3, 1).numpy()
        cell = (sheet.shape[1] - 8) // 3
        for column, picture in enumerate(wanted):
            left = 8 + column * cell
            found = sheet[top + 20 : top + 20 + zoom * height, left : left + zoom * width]
            assert (found[::zoom, ::zoom] == picture).all()
