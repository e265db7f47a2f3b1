"""Image files into arrays of one size."""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.progress import Bar

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # none of them can start a program, as EPS does
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
_GREY = ("1", "L", "LA", "La")


def is_image_name(name: str) -> bool:
    """Whether the ending is that of an image file."""
    return name.lower().endswith(_SUFFIXES)


def decode(content: bytes, where: str, size: int | None, resample: Image.Resampling, mode: str | None) -> np.ndarray:
    """One image as uint8 `[H, W]` (grey) or `[H, W, 3]` (RGB), squeezed to `size` x `size` unless that is None.

    `mode` is "L", "RGB" or None for what the file is; transparency and the camera's orientation do not count.
    Raises `InputError` for what Pillow cannot read as a common image of 8 bits, or is too large to be meant.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise InputError(f"convert_dataset: {where} has more than 8 bits per channel; make it 8 bits first")
            image = image.convert(mode or ("L" if image.mode in _GREY else "RGB"))
    except UnidentifiedImageError as error:
        raise InputError(f"convert_dataset: {where} is no image (wanted one of {', '.join(FORMATS)})") from error
    except InputError:
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise InputError(f"convert_dataset: {where} cannot be read as an image: {error}") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample)
    return np.asarray(image)


def decode_all(
    tree: Tree, names: Sequence[str], size: int | None, resample: Image.Resampling, mode: str | None, progress: bool
) -> np.ndarray:
    """The images of these files, uint8 `[N, H, W]`, or `[N, H, W, 3]` as soon as one of them has colour.

    Without a `size` all must have the same one. Raises `InputError` as `decode` does, naming the file.
    """
    row_of = {name: row for row, name in enumerate(names)}
    images: np.ndarray | None = None
    first = ""
    with Bar("convert", len(names), "images", progress) as bar, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name, image in _in_threads(tree, names, size, resample, mode):
            if images is None:
                images, first = np.empty((len(names), *image.shape), np.uint8), name
            if image.shape[:2] != images.shape[1:3]:
                sizes = f"{first} is {images.shape[2]}x{images.shape[1]}, {name} is {image.shape[1]}x{image.shape[0]}"
                raise InputError(f"convert_dataset: images differ in size: {sizes}; give --size, 84 in most papers")
            if image.ndim > images.ndim - 1:
                images = np.repeat(images[..., None], 3, axis=3)
            images[row_of[name]] = image if image.ndim == images.ndim - 1 else image[..., None]
            bar.advance()
    assert images is not None  # the caller has checked that there are some
    return images


def _in_threads(
    tree: Tree, names: Sequence[str], size: int | None, resample: Image.Resampling, mode: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Decoded images in the order of the stream; Pillow works outside Python's lock, so threads help."""
    workers = torch.get_num_threads()
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, content in tree.stream(names):
            waiting.append((name, pool.submit(decode, content, f"{tree.path}: {name}", size, resample, mode)))
            if len(waiting) > 4 * workers:  # no more than these are held in memory at once
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
