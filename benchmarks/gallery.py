"""Draw the gallery of the procedural pictures: `python benchmarks/gallery.py --out docs/images`.

It writes `pictures.png`: a row for each kind, in colour and grey, and below them the library as it
comes. The kinds show their first pictures of seed 0. docs/pictures.md describes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import bidfmkd_fast as bf
from bidfmkd_fast.priors import KINDS, draw_pictures, library

N_SCENES = 1000  # the kinds show pictures from the first of these, the library those after them
SHAPES = ((3, 32, 32), (1, 28, 28))
NOTES = {"texture": "noise to clouds", "mixture": "of two others"}
COLUMNS, LIBRARY_ROWS = 9, 3
CELL, GAP = 34, 10  # sides of a cell and of the gap between two blocks, in pixels of a picture
LEFT, TOP = 60, 12  # room for the labels, in the same pixels
ZOOM = 2


def blocks(shape: tuple[int, int, int]) -> list[Tensor]:
    """Return the pictures of each row: the first of every kind, then the library's."""
    scenes = torch.arange(N_SCENES)
    kind = library.kinds_of(scenes)
    rows = []
    for number, name in enumerate(KINDS):
        own = scenes[kind == number][:COLUMNS]
        pictures = draw_pictures(own, torch.zeros_like(own), shape)
        rows.append(pictures[smoothness(pictures).argsort()] if name == "texture" else pictures)
    others = bf.procedural_images(COLUMNS * LIBRARY_ROWS, shape, first=N_SCENES)
    return [*rows, *others.split(COLUMNS)]


def smoothness(pictures: Tensor) -> Tensor:
    """Return the correlation of neighbouring pixels, `[n]`: low in noise, high in clouds."""
    grey = pictures.mean(1)
    deviations = grey - grey.mean((1, 2), keepdim=True)
    product = (deviations[:, :, 1:] * deviations[:, :, :-1]).mean((1, 2))
    return product / deviations.square().mean((1, 2))


def canvas() -> Tensor:
    """Lay all pictures out without labels: `[3, height, width]` in [0, 1]."""
    sheets = [blocks(shape) for shape in SHAPES]
    height = TOP + CELL * len(sheets[0]) + GAP
    sheet = torch.full((3, height, LEFT + len(SHAPES) * (COLUMNS * CELL + GAP)), 0.85)
    for column, rows in enumerate(sheets):
        left = LEFT + column * (COLUMNS * CELL + GAP)
        for row, pictures in enumerate(rows):
            for place, picture in enumerate(pictures):
                _, h, w = picture.shape
                y, x = top_of(row) + (CELL - h) // 2, left + place * CELL + (CELL - w) // 2
                sheet[:, y : y + h, x : x + w] = picture
    return sheet


def top_of(row: int) -> int:
    """Return where a row begins; the rows of the library follow those of the kinds with a gap."""
    return TOP + row * CELL + GAP * (row >= len(KINDS))


def draw() -> Image.Image:
    """Return the gallery with its labels."""
    pixels = (canvas() * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image = image.resize((ZOOM * image.width, ZOOM * image.height), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for column, shape in enumerate(SHAPES):
        left = LEFT + column * (COLUMNS * CELL + GAP)
        pen.text((ZOOM * left + 2, 4), "x".join(map(str, shape)), "black", font)
    labels = [*KINDS, "the library", *["" for _ in range(LIBRARY_ROWS - 1)]]
    for row, label in enumerate(labels):
        middle = ZOOM * (top_of(row) + CELL // 2)
        note = NOTES.get(label, "as it comes" if label == "the library" else "")
        pen.text((4, middle - (16 if note else 8)), f"{label}\n{note}", "black", font)
    return image


def main() -> None:
    """Parse the command line and write the gallery."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the picture")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw().save(out / "pictures.png", optimize=True)
    print(f"written: {out / 'pictures.png'}")


if __name__ == "__main__":
    main()
