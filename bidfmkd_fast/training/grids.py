"""Draw grids of recovered images, or of a survey's pictures, for a person to look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidfmkd_fast.files.atomic import written_whole
from bidfmkd_fast.priors import draw_pictures
from bidfmkd_fast.survey.answers import KeptAnswers, read_answers, told
from bidfmkd_fast.training.run import RecoveredSet, Run
from bidfmkd_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from PIL import Image

_TILE = 48  # pixels: the smallest side of an image in a grid
_COLUMNS, _ROWS = 12, 20  # at most 12 images per class, and 20 classes
# Blue and orange, which colour-blind people can tell apart.
_RIGHT, _WRONG = (0, 114, 178), (230, 120, 0)


def write_grids(run: Run, folder: RunFolder, n_apis: int = 4) -> list[Path]:
    """Draw the sets of the first `n_apis` APIs into `grids/api_000.png` and so on.

    The boundary query set stands beside the support set. A run that recovered nothing has
    `grids/survey.png` instead: pictures of its survey, and what the APIs answered.
    """
    by_api: dict[int, list[RecoveredSet]] = {}
    for recovered_set in run.recovered:
        by_api.setdefault(recovered_set.api_index, []).append(recovered_set)
    paths = []
    for index, sets in list(by_api.items())[:n_apis]:
        path = folder.path / "grids" / f"api_{index:03d}.png"
        save_grid(sets, path)
        paths.append(path)
    if not paths and (asked := first_answers(folder, n_apis, _COLUMNS)):
        paths.append(folder.path / "grids" / "survey.png")
        with written_whole(paths[0]) as file:
            draw_survey(asked).save(file, format="PNG")
    return paths


def first_answers(folder: RunFolder, n_apis: int, most: int) -> list[KeptAnswers]:
    """Read up to `most` answers of each of the first `n_apis` APIs that have answered anything.

    They are to pictures of the first round: which were chosen for the second, answers do not say.
    Raises InputError if a file is damaged.
    """
    files = sorted((folder.path / "survey").glob("*.answers"))
    kept = (read_answers(file, min(most, folder.config().survey.n_first)) for file in files)
    return list(itertools.islice((one for one in kept if one is not None), n_apis))


def picture_of(image: Tensor) -> Image.Image:
    """Return an image `[C, H, W]` in [0, 1], C 1 or 3, as a Pillow image, grey or in colours."""
    from PIL import Image

    pixels = image.detach().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def draw_survey(asked: Sequence[KeptAnswers]) -> Image.Image:
    """Draw a row per API: the pictures that it was asked about, each above its answer."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    rows = []
    for kept in asked:
        zoom = max(1, -(-_TILE // max(kept.image_shape[1:])))
        height, width = (zoom * side for side in kept.image_shape[1:])
        cell = max(width, int(font.getlength("class 10, 100 %"))) + 8
        numbers = kept.numbers.tolist()
        row = Image.new("RGB", (cell * len(numbers) + 8, height + 44), "white")
        draw = ImageDraw.Draw(row)
        draw.text((8, 4), kept.name, fill="black", font=font)
        pictures = draw_pictures(
            kept.numbers, torch.zeros_like(kept.numbers), kept.image_shape, kept.pictures
        )
        for column, number in enumerate(numbers):
            left = 8 + cell * column
            image = picture_of(pictures[column]).resize((width, height), Image.Resampling.NEAREST)
            row.paste(image.convert("RGB"), (left, 20))
            draw.text((left, height + 24), told(kept, number), fill="black", font=font)
        rows.append(row)
    size = (max(row.width for row in rows), sum(row.height for row in rows))
    sheet, top = Image.new("RGB", size, "white"), 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def save_grid(sets: Sequence[RecoveredSet], path: Path) -> None:
    """Write the picture of `draw_grid` as a PNG."""
    sheet = draw_grid(sets)
    with written_whole(path) as file:
        sheet.save(file, format="PNG")


def draw_grid(sets: Sequence[RecoveredSet]) -> Image.Image:
    """Draw the sets of one API side by side, with a labelled row per class.

    The images are enlarged without smoothing. The frame of an image is blue if the API classifies
    it as wanted; else it is orange and its upper right corner is filled, so that the two kinds
    differ in shape as well.
    """
    from PIL import Image

    panels = [_panel(recovered_set) for recovered_set in sets]
    gap = 16
    size = (sum(panel.width + gap for panel in panels) - gap, max(panel.height for panel in panels))
    sheet = Image.new("RGB", size, "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + gap
    return sheet


def _panel(recovered_set: RecoveredSet) -> Image.Image:
    """Draw one set: a title, and a row of framed images per class."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    height, width = recovered_set.images.shape[-2:]
    zoom = max(1, -(-_TILE // max(height, width)))
    border = 2 * (2 + 1)  # on both sides a frame of 2 pixels and a gap of 1
    cell_width, cell_height = width * zoom + border, height * zoom + border
    names = recovered_set.class_names[:_ROWS]
    per_class = [
        (recovered_set.recovered.labels == label).nonzero().flatten()[:_COLUMNS].tolist()
        for label in range(len(names))
    ]
    columns = max(len(rows) for rows in per_class)
    matched = recovered_set.matched.tolist()
    part = "boundary query set" if recovered_set.part == "query" else "support set"
    title = f"{recovered_set.api_name}, {part}: {100 * sum(matched) / len(matched):.0f} % as wanted"
    margin, head = 8 + int(max(font.getlength(name) for name in names)), 24
    size = (
        max(margin + columns * cell_width, int(font.getlength(title)) + 8),
        head + len(names) * cell_height,
    )
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    draw.text((4, 4), title, fill="black", font=font)
    for row, (name, indices) in enumerate(zip(names, per_class, strict=True)):
        top = head + row * cell_height
        draw.text((4, top + cell_height // 2), name, fill="black", font=font, anchor="lm")
        for column, index in enumerate(indices):
            left = margin + column * cell_width
            frame = (left + 1, top + 1, left + cell_width - 2, top + cell_height - 2)
            draw.rectangle(frame, fill=_RIGHT if matched[index] else _WRONG)
            image = picture_of(recovered_set.images[index])
            enlarged = image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            panel.paste(enlarged.convert("RGB"), (left + 3, top + 3))
            if not matched[index]:
                right, side = frame[2], cell_width // 4
                draw.polygon(
                    [(right - side, top + 1), (right, top + 1), (right, top + 1 + side)],
                    fill=_WRONG,
                )
    return panel
