from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import ImageFont

from bidfmkd_fast.data import load_dataset, make_glyphs
from bidfmkd_fast.data.glyphs import CHARACTERS, _affine
from bidfmkd_fast.errors import InputError


def test_the_embedded_set() -> None:
    started = time.process_time()
    glyphs = make_glyphs()
    assert time.process_time() - started < 2
    assert glyphs.image_shape == (1, 28, 28) and len(glyphs.images) == 67 * 40
    assert [len(glyphs.classes(split)) for split in ("meta_train", "meta_val", "meta_test")] == [40, 8, 19]
    assert glyphs.class_names == tuple(CHARACTERS)
    ink = (glyphs.images > 127).flatten(1).float().mean(1)
    assert ink.min() > 0.005 and ink.max() < 0.5  # white on black, none empty
    assert len(np.unique(glyphs.images.flatten(1).numpy(), axis=0)) == 67 * 40
    assert torch.equal(load_dataset("glyphs").images, glyphs.images)


def test_a_function_of_its_arguments_and_the_split_is_fixed(seed: int) -> None:
    first, again, other = make_glyphs(seed=seed), make_glyphs(seed=seed), make_glyphs(seed=seed + 1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.split_of_class == other.split_of_class
    small = make_glyphs(size=20, n_per_class=3)
    assert small.image_shape == (1, 20, 20) and len(small.images) == 201


def test_the_affine_map_is_turn_shear_scale_and_shift(seed: int) -> None:
    numbers = np.random.default_rng(seed).uniform(-1, 1, 5)
    turn, shear, scale, right, down = numbers
    a, b, c, d, e, f = _affine(*numbers)
    angle = np.deg2rad(12 * turn)
    size = 0.9 + 0.25 * (scale + 1) / 2
    for point in ((0.0, 0.0), (32.0, 32.0), (50.0, 9.0)):
        sheared = np.array([point[0] - 32 + 0.15 * shear * (point[1] - 32), point[1] - 32]) * size
        x = np.cos(angle) * sheared[0] - np.sin(angle) * sheared[1] + 32 + 3 * right
        y = np.sin(angle) * sheared[0] + np.cos(angle) * sheared[1] + 32 + 3 * down
        np.testing.assert_allclose((a * x + b * y + c, d * x + e * y + f), point, rtol=0, atol=1e-9)


def test_classes_can_be_told_apart() -> None:
    """A kernel classifier on raw pixels, with no notion of a shift, gets most held-out images; chance is 1.5 %."""
    glyphs = make_glyphs()
    images = glyphs.take(torch.arange(len(glyphs.images))).double().view(67, 40, -1)
    fit, held_out = images[:, :30].flatten(0, 1), images[:, 30:].flatten(0, 1)

    def kernel(points: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(points, fit).square() / 72)

    targets = torch.eye(67, dtype=torch.float64).repeat_interleave(30, 0)
    weights = torch.linalg.solve(kernel(fit) + 0.01 * torch.eye(len(fit)), targets)
    predicted = (kernel(held_out) @ weights).argmax(1).view(67, 10)
    right = (predicted == torch.arange(67)[:, None]).float().mean(1)
    assert right.mean() > 0.88
    assert right.min() >= 0.3


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (7, 65):
        with pytest.raises(InputError, match=f"8..64; got {size}"):
            make_glyphs(size=size)
    with pytest.raises(InputError, match="n_per_class must be at least 1; got 0"):
        make_glyphs(n_per_class=0)
    monkeypatch.setattr(ImageFont, "load_default", lambda size: ImageFont.ImageFont())
    with pytest.raises(InputError, match="FreeType"):
        make_glyphs()
