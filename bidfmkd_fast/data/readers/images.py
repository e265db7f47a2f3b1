"""Decode image files into arrays of one size."""

from __future__ import annotations

import io
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.progress import Bar

# No format here can start a program, as EPS can.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
HEIF_SUFFIXES = (".heic", ".heif")  # what telephones write; read if pillow-heif is installed
_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".tif",
    ".tiff",
    ".webp",
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_GREY = ("1", "L", "LA", "La")
_TURNS = {  # by orientation mark: what makes the image upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_DAMAGED = (
    "damaged EXIF data; where the orientation mark is lost, the picture is read as it lies"
)


class Wanted(NamedTuple):
    """The form in which images are decoded.

    `size` is (height, width), or one number for both; None keeps those of each image. `mode` is "L"
    (grey), "RGB", or None for the mode of each file. `upright` turns an image as the orientation
    mark of its camera (EXIF) says. `operation` opens the message of every error.
    """

    size: int | tuple[int, int] | None
    resample: Image.Resampling = Image.Resampling.BILINEAR
    mode: str | None = None
    upright: bool = True
    operation: str = "convert_dataset"


@cache
def _reads_heif() -> bool:
    """Register pillow-heif with Pillow; return False if it is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_image_name(name: str) -> bool:
    """Return True if the ending is that of an image file that can be read here."""
    return name.lower().endswith(_SUFFIXES + HEIF_SUFFIXES if _reads_heif() else _SUFFIXES)


def decode(content: bytes, where: str, wanted: Wanted) -> np.ndarray:
    """Decode one image file to uint8 `[H, W]` (grey) or `[H, W, 3]` (RGB), as `to_pixels` does.

    `where` names the file in errors.

    Raises:
        InputError: Pillow cannot read the file as a common image, or as for `to_pixels`.
    """
    formats = (*FORMATS, "HEIF") if _reads_heif() else FORMATS
    operation = wanted.operation
    try:
        with Image.open(io.BytesIO(content), formats=formats) as opened:
            return to_pixels(opened, where, wanted)
    except UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS and not _reads_heif():
            raise InputError(
                f"{operation}: {where} is HEIC; `pip install pillow-heif` makes it readable"
            ) from error
        raise InputError(
            f"{operation}: {where} is not an image (wanted one of {', '.join(formats)}), or a "
            "damaged one"
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{operation}: {where} cannot be read as an image: {error}") from error


def to_pixels(opened: Image.Image, where: str, wanted: Wanted) -> np.ndarray:
    """Bring a Pillow image to the form `wanted`: uint8 `[H, W]` (grey) or `[H, W, 3]` (RGB).

    The only place of this rule, for `convert` and for the pictures of `MetaModel.adapt`: the image
    is turned upright, brought to 8 bits and to grey or RGB, and resized without regard to its
    proportions. Grey images of 16 bits are scaled to 8; transparency is ignored.

    Raises:
        InputError: the image is damaged; it holds floats or 32-bit integers; or it is so large that
            it may be an attack (a decompression bomb).
    """
    try:
        opened.load()
        image = _upright(opened) if wanted.upright else opened
        image = _eight_bits(image, opened, where, wanted.operation)
        image = image.convert(wanted.mode or ("L" if image.mode in _GREY else "RGB"))
    except InputError:
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise InputError(
            f"{wanted.operation}: {where} cannot be read as an image: {error}"
        ) from error
    if wanted.size is not None:
        height, width = (wanted.size,) * 2 if isinstance(wanted.size, int) else wanted.size
        if image.size != (width, height):
            image = image.resize((width, height), wanted.resample)
    return np.asarray(image)


def decode_all(tree: Tree, names: Sequence[str], wanted: Wanted, progress: bool) -> np.ndarray:
    """Decode these files to uint8 `[N, H, W]`, or `[N, H, W, 3]` if at least one has colour.

    Raises:
        InputError: as in `decode`, naming the file; or no size is given and the images differ in
            size.
    """
    row_of = {name: row for row, name in enumerate(names)}
    images: np.ndarray | None = None
    first = ""
    with (
        Bar("convert", len(names), "images", progress) as bar,
        warnings_with_files(wanted.operation),
    ):
        for name, image in _in_threads(tree, names, wanted):
            if images is None:
                images, first = np.empty((len(names), *image.shape), np.uint8), name
            if image.shape[:2] != images.shape[1:3]:
                raise InputError(
                    f"{wanted.operation}: images differ in size: "
                    f"{first} is {images.shape[2]}x{images.shape[1]}, "
                    f"{name} is {image.shape[1]}x{image.shape[0]}; "
                    "give --size, 84 in most papers"
                )
            if image.ndim > images.ndim - 1:
                images = np.repeat(images[..., None], 3, axis=3)
            images[row_of[name]] = image if image.ndim == images.ndim - 1 else image[..., None]
            bar.advance()
    assert images is not None  # the caller has checked that there are images
    return images


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its orientation mark says.

    Pillow's `exif_transpose` is not used, because it also rewrites all other EXIF data, which fails
    if any of them is damaged.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data make Pillow raise nearly anything; the pixels are whole
        warnings.warn(_EXIF_DAMAGED, UserWarning, stacklevel=1)
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, opened: Image.Image, where: str, operation: str) -> Image.Image:
    """Scale grey of 16 bits to 8, 0..65535 to 0..255; return other images as they are."""
    if image.mode[0] not in "IF":
        return image
    if not image.mode.startswith("I;16") and not (
        image.mode == "I" and opened.format in ("PNG", "PPM")
    ):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise InputError(
            f"{operation}: {where} holds {kind}, whose range is unknown; convert it to 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 x 255


_reading = threading.local()  # .name: the file whose image this thread decodes


@contextmanager
def warnings_with_files(operation: str) -> Iterator[None]:
    """Gather the warnings of Pillow in all threads; after the block, warn once per kind of fault.

    Each warning names the files, which Pillow does not know.
    """
    files_of: dict[str, list[str]] = {}

    def note(
        message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any
    ) -> None:
        # Pillow reads EXIF data as the tags of a TIFF file, and warns of each damaged tag by its
        # number.
        text = _EXIF_DAMAGED if "TiffImagePlugin" in filename else " ".join(str(message).split())
        files = files_of.setdefault(text, [])
        if (name := getattr(_reading, "name", "a file")) not in files[-1:]:
            files.append(name)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.showwarning = note
        yield
    for text, names in files_of.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        warnings.warn(
            f"{operation}: {', '.join(names[:3])}{more}: {text}", UserWarning, stacklevel=4
        )


def decode_noted(content: bytes, where: str, wanted: Wanted) -> np.ndarray:
    """Decode as `decode` does, inside `warnings_with_files`, whose warnings then name the file."""
    _reading.name = where
    return decode(content, where, wanted)


def _in_threads(
    tree: Tree, names: Sequence[str], wanted: Wanted
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, image) in the order of the stream, decoded in threads.

    Threads help because Pillow decodes outside Python's global lock.
    """

    workers = torch.get_num_threads()
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, content in tree.stream(names):
            waiting.append(
                (name, pool.submit(decode_noted, content, f"{tree.path}: {name}", wanted))
            )
            if len(waiting) > 4 * workers:  # bounds the images held in memory
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
