from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from bidfmkd_fast.data import load_dataset, make_glyphs
from bidfmkd_fast.data.glyphs import CHARACTERS, _corners, _mesh
from bidfmkd_fast.errors import InputError


def test_the_embedded_set() -> None:
    started = time.process_time()
    glyphs = make_glyphs()
    assert time.process_time() - started < 2
    assert glyphs.image_shape == (1, 28, 28) and len(glyphs.images) == 67 * 40
    assert [len(glyphs.classes(split)) for split in ("meta_train", "meta_val", "meta_test")] == [
        40,
        8,
        19,
    ]
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


def test_the_mesh_is_turn_shear_scale_and_shift(seed: int) -> None:
    """Find each corner of the result again from the point that it comes from."""
    numbers = np.random.default_rng(seed).uniform(-1, 1, 5)
    turn, shear, scale, right, down = numbers
    corners = _corners(*numbers)
    assert corners.shape == (5, 5, 2)
    angle = np.deg2rad(20 * turn)
    size = 0.775 + 0.4 * (scale + 1) / 2
    for row in range(5):
        for column in range(5):
            x, y = corners[row, column] - 32
            sheared = np.array([x + 0.3 * shear * y, y]) * size
            moved_x = np.cos(angle) * sheared[0] - np.sin(angle) * sheared[1] + 32 + 4 * right
            moved_y = np.sin(angle) * sheared[0] + np.cos(angle) * sheared[1] + 32 + 4 * down
            np.testing.assert_allclose(
                (moved_x, moved_y), (16 * column, 16 * row), rtol=0, atol=1e-9
            )


def test_an_unmoved_mesh_changes_nothing() -> None:
    side = np.arange(5.0) * 16
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    mesh = _mesh(np.stack(np.meshgrid(side, side), axis=-1))
    same = picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(same), np.asarray(picture))


def test_classes_can_be_told_apart() -> None:
    """Check that a kernel classifier on raw pixels classifies most held-out images correctly.

    Chance is 1.5 %, and the classifier has no notion of a shift. A small convolutional network,
    trained for half a minute, reaches 96 %.
    """
    glyphs = make_glyphs()
    images = glyphs.take(torch.arange(len(glyphs.images))).double().view(67, 40, -1)
    fit, held_out = images[:, :30].flatten(0, 1), images[:, 30:].flatten(0, 1)

    def kernel(points: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(points, fit).square() / 72)

    targets = torch.eye(67, dtype=torch.float64).repeat_interleave(30, 0)
    weights = torch.linalg.solve(kernel(fit) + 0.01 * torch.eye(len(fit)), targets)
    predicted = (kernel(held_out) @ weights).argmax(1).view(67, 10)
    right = (predicted == torch.arange(67)[:, None]).float().mean(1)
    assert right.mean() > 0.55


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (7, 65):
        with pytest.raises(InputError, match=f"8..64; got {size}"):
            make_glyphs(size=size)
    with pytest.raises(InputError, match="n_per_class must be at least 1; got 0"):
        make_glyphs(n_per_class=0)
    monkeypatch.setattr(ImageFont, "load_default", lambda size: ImageFont.ImageFont())
    with pytest.raises(InputError, match="FreeType"):
        make_glyphs()
