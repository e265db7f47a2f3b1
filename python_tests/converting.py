"""Share between the tests of `convert`: small images of known pixels, and checks of results."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bidfmkd_fast.data.convert import Converted, convert_dataset
from bidfmkd_fast.errors import InputError


def pixels(number: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    """Return image `number`: uint8 `[H, W, 3]`, or `[H, W]` with one channel."""
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


def stored(converted: Converted) -> dict[str, np.ndarray]:
    with np.load(converted.path, allow_pickle=False) as archive:
        return dict(archive)


def splits(converted: Converted) -> dict[str, str]:
    return dict(zip(converted.dataset.class_names, converted.dataset.split_of_class))


def refused(*args: object, **options: object) -> str:
    """Return the error of a refused conversion: one line, and no file is left behind."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError) as caught:
        convert_dataset(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and str(caught.value).startswith("convert_dataset: ")
    assert sorted(Path().rglob("*")) == before
    return str(caught.value)
