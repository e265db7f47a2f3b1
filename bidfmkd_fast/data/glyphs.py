"""Draw the embedded data set: characters of Pillow's font, bent differently in each image."""

from __future__ import annotations

import math

import numpy as np
import torch

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.data.dataset import SPLITS, Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import torch_generator

# Characters that differ even when size and position vary. Of characters that would not, such as c
# and C, only one is here; the same holds for o/O/0, s/S and l/I.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ123456789abdefghjmnqrty#$%&()*+<=>?@[]{}~"
CLASSES_PER_SPLIT = (40, 8, 19)
_CANVAS = 64
_FONT_SIZE = 48
_STROKES = (0, 1, 2)
_CELLS = 4  # of the mesh that bends a drawing, per axis


def make_glyphs(size: int = 28, n_per_class: int = 40, seed: int = 0) -> Dataset:
    """Draw 67 classes of white characters on black, `n_per_class` images `[1, size, size]` each.

    The classes are split 40 / 8 / 19. Each image is drawn on 64 x 64 pixels with a stroke width of
    0 to 2, turned by up to 20 degrees, sheared by up to 0.3, scaled by 0.775 to 1.175 and shifted
    by up to 4 pixels. It is then bent: the corners of a mesh of 4 x 4 cells move by up to 3 pixels
    each. In the end it is reduced with antialiasing. The images depend only on the arguments (and
    on Pillow's font renderer); the split of a class never changes.

    Raises:
        InputError: the size is below 8 or above 64, `n_per_class` is below 1, or Pillow was built
            without FreeType.
    """
    if not 8 <= size <= _CANVAS:
        raise InputError(f"make_glyphs: size must be in 8..{_CANVAS}; got {size}")
    check_integer("make_glyphs", "n_per_class", n_per_class, 1)
    from PIL import Image

    n_classes = len(CHARACTERS)
    generator = torch_generator(seed, "glyphs")
    n_numbers = 6 + 2 * (_CELLS + 1) ** 2
    drawn = torch.rand(n_classes, n_per_class, n_numbers, generator=generator, dtype=torch.float64)
    uniform = drawn.mul_(2).sub_(1).numpy()
    images = np.empty((n_classes, n_per_class, size, size), dtype=np.uint8)
    for index, character in enumerate(CHARACTERS):
        drawings = _draw(character)
        for image, numbers in zip(images[index], uniform[index]):
            drawing = drawings[min(int((numbers[5] + 1) / 2 * len(drawings)), len(drawings) - 1)]
            mesh = _mesh(
                _corners(*numbers[:5]) + 3 * numbers[6:].reshape(_CELLS + 1, _CELLS + 1, 2)
            )
            moved = drawing.transform(
                drawing.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR
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
    """Return Pillow images of a character, one per stroke width."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError(
            "make_glyphs: this Pillow lacks FreeType and its font; install an ordinary Pillow wheel"
        )
    drawings = []
    for stroke in _STROKES:
        drawing = Image.new("L", (_CANVAS, _CANVAS))
        centre = (_CANVAS / 2, _CANVAS / 2)
        ImageDraw.Draw(drawing).text(
            centre, character, fill=255, font=font, anchor="mm", stroke_width=stroke
        )
        drawings.append(drawing)
    return drawings


def _corners(turn: float, shear: float, scale: float, right: float, down: float) -> np.ndarray:
    """Return where in the drawing each corner of the mesh is taken from, before it is bent.

    The result is `[cells + 1, cells + 1, 2]`, x and y. The five numbers are in [-1, 1]; if all are
    0, only the size of the drawing changes.
    """
    angle = math.radians(20) * turn
    zoom = 0.975 + 0.2 * scale
    forward = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = forward @ np.array([[1.0, 0.3 * shear], [0.0, 1.0]]) * zoom
    ticks = np.linspace(-_CANVAS / 2, _CANVAS / 2, _CELLS + 1)
    corners = np.stack(np.meshgrid(ticks, ticks), axis=-1) - 4 * np.array([right, down])
    return corners @ np.linalg.inv(forward).T + _CANVAS / 2


def _mesh(corners: np.ndarray) -> list[tuple[tuple[int, int, int, int], tuple[float, ...]]]:
    """Return the mesh as Pillow takes it.

    Each cell is a box of the result and the four corners in the drawing that fill it,
    counter-clockwise from the top left.
    """
    side, cells = _CANVAS // _CELLS, range(_CELLS)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in cells for x in cells]
    quads = np.stack(
        [corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]], axis=2
    ).reshape(-1, 8)
    return list(zip(boxes, map(tuple, quads.tolist())))
