"""Small images whose pixels tell where they belong, written as the tests of `convert` need them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(number: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    """Image `number`: uint8 `[H, W, 3]`, or `[H, W]` with one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
