"""The embedded data set: characters of the font inside Pillow, each drawn a little differently every time."""

from __future__ import annotations

import math

import numpy as np
import torch

from bidfmkd_fast.data.dataset import SPLITS, Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import torch_generator

# What stays apart when size and position vary: of c/C, o/O/0, s/S, l/I and their like, only one.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ123456789abdefghjmnqrty#$%&()*+<=>?@[]{}~"
CLASSES_PER_SPLIT = (40, 8, 19)
_CANVAS = 64
_FONT_SIZE = 48
_STROKES = (0, 1, 2)


def make_glyphs(size: int = 28, n_per_class: int = 40, seed: int = 0) -> Dataset:
    """67 classes of white characters on black, `n_per_class` images `[1, size, size]` each, split 40 / 8 / 19.

    Drawn on 64 x 64 pixels with stroke width 0-2, turned by up to 12 degrees, sheared by up to 0.15, scaled by 0.9-1.15
    and shifted by up to 3 pixels, then reduced with antialiasing. The images are a function of the arguments (and of
    Pillow's font renderer); which class is in which split never changes.
    Raises `InputError` for a size below 8 or above 64, `n_per_class` below 1, or a Pillow without FreeType.
    """
    if not 8 <= size <= _CANVAS:
        raise InputError(f"make_glyphs: size must be in 8..{_CANVAS}; got {size}")
    if n_per_class < 1:
        raise InputError(f"make_glyphs: n_per_class must be at least 1; got {n_per_class}")
    from PIL import Image

    n_classes = len(CHARACTERS)
    generator = torch_generator(seed, "glyphs")
    uniform = torch.rand(n_classes, n_per_class, 6, generator=generator, dtype=torch.float64).mul_(2).sub_(1).numpy()
    images = np.empty((n_classes, n_per_class, size, size), dtype=np.uint8)
    for index, character in enumerate(CHARACTERS):
        drawings = _draw(character)
        for image, (*geometry, stroke) in zip(images[index], uniform[index]):
            drawing = drawings[min(int((stroke + 1) / 2 * len(drawings)), len(drawings) - 1)]
            moved = drawing.transform(
                drawing.size, Image.Transform.AFFINE, _affine(*geometry), Image.Resampling.BILINEAR
            )
            image[:] = np.asarray(moved.resize((size, size), Image.Resampling.BOX))
    split_of_class = [""] * n_classes
    order = torch.randperm(n_classes, generator=torch_generator(0, "glyphs", "split")).tolist()
    for split, count in zip(SPLITS, CLASSES_PER_SPLIT):
        for _ in range(count):
            split_of_class[order.pop()] = split
    return Dataset(
        "glyphs",
        torch.from_numpy(images).flatten(0, 1).unsqueeze(1),
        torch.arange(n_classes).repeat_interleave(n_per_class),
        tuple(CHARACTERS),
        tuple(split_of_class),
    )


def _draw(character: str) -> list:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("make_glyphs: this Pillow lacks FreeType and its font; install an ordinary Pillow wheel")
    drawings = []
    for stroke in _STROKES:
        drawing = Image.new("L", (_CANVAS, _CANVAS))
        centre = (_CANVAS / 2, _CANVAS / 2)
        ImageDraw.Draw(drawing).text(centre, character, fill=255, font=font, anchor="mm", stroke_width=stroke)
        drawings.append(drawing)
    return drawings


def _affine(turn: float, shear: float, scale: float, right: float, down: float) -> tuple[float, ...]:
    """Pillow's six numbers (output pixel -> input pixel) from five numbers in [-1, 1]."""
    angle = math.radians(12) * turn
    zoom = 1.025 + 0.125 * scale
    forward = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = forward @ np.array([[1.0, 0.15 * shear], [0.0, 1.0]]) * zoom
    back = np.linalg.inv(forward)
    centre = np.full(2, _CANVAS / 2)
    offset = centre - back @ (centre + 3 * np.array([right, down]))
    return back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1]
