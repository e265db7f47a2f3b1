"""Show recovered images in notebooks: a grid as one PNG inside a piece of HTML."""

from __future__ import annotations

import base64
import html
import io

import torch
from torch import Tensor

_COLUMNS, _ROWS = 12, 20  # at most 12 images per class, and 20 classes
_TILE = 48  # pixels: the smallest side of an image as shown
_GAP = 2  # pixels of the grid, white


def grid_html(title: str, images: Tensor, labels: Tensor) -> str:
    """Return HTML that shows `images` `[N, C, H, W]` with labels `[N]`, one row per class.

    The images are in the input range of an API, which is not known here. If any value lies outside
    of [0, 1], all images are scaled alike into this range. Images with neither 1 nor 3 channels are
    shown as the mean of the channels.
    """
    heading = f"<div>{html.escape(title)}</div>"
    classes = labels.unique()[:_ROWS].tolist()
    if not classes:
        return heading
    sheet, width = _sheet(_shown(images), labels.cpu(), classes)
    picture = base64.b64encode(_png(sheet)).decode()
    note = "One row per wanted class. Recovered images need not look like anything."
    return (
        f'{heading}<img alt="recovered images" style="width: {width}px; max-width: 100%; '
        f'image-rendering: pixelated" src="data:image/png;base64,{picture}">'
        f"<div><small>{note}</small></div>"
    )


def _shown(images: Tensor) -> Tensor:
    """Convert images to pixels, uint8 `[N, H, W, 1 or 3]`."""
    images = images.detach().float().cpu().nan_to_num()
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    low, high = images.aminmax()
    if low < 0 or high > 1:
        images = (images - low) / (high - low).clamp_min(1e-12)
    return images.mul(255).round().byte().permute(0, 2, 3, 1)


def _sheet(pixels: Tensor, labels: Tensor, classes: list[int]) -> tuple[Tensor, int]:
    """Lay out the grid; return it, uint8 `[H, W, 1 or 3]`, and the width at which it is shown."""
    rows = [(labels == label).nonzero().flatten()[:_COLUMNS].tolist() for label in classes]
    columns = max(len(row) for row in rows)
    _, height, width, channels = pixels.shape
    sheet = torch.full(
        (len(rows) * (height + _GAP), columns * (width + _GAP), channels), 255, dtype=torch.uint8
    )
    for top, row in enumerate(rows):
        for left, index in enumerate(row):
            y, x = top * (height + _GAP), left * (width + _GAP)
            sheet[y : y + height, x : x + width] = pixels[index]
    zoom = max(1, -(-_TILE // max(height, width)))
    return sheet, sheet.shape[1] * zoom


def _png(sheet: Tensor) -> bytes:
    """Return the grid as a PNG file."""
    from PIL import Image

    array = sheet.numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "PNG")
    return file.getvalue()
