"""Image files into arrays of one size."""

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

FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "PPM",
    "TIFF",
    "WEBP",
)  # none of them can start a program, as EPS does
HEIF_SUFFIXES = (".heic", ".heif")  # what telephones write; read where pillow-heif is installed
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
_TURNS = {  # what makes an image upright, by its orientation mark; 1 is upright
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
    """How images are to come.

    `size` is their height and width, None for their own. `mode` is "L", "RGB" or None for what each
    file is. `upright` turns an image as the orientation mark of its camera (EXIF) says.
    """

    size: int | None
    resample: Image.Resampling = Image.Resampling.BILINEAR
    mode: str | None = None
    upright: bool = True


@cache
def _reads_heif() -> bool:
    """Register the reader of HEIC files with Pillow, where it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_image_name(name: str) -> bool:
    """Whether the ending is that of an image file that can be read here."""
    return name.lower().endswith(_SUFFIXES + HEIF_SUFFIXES if _reads_heif() else _SUFFIXES)


def decode(content: bytes, where: str, wanted: Wanted) -> np.ndarray:
    """One image as uint8 `[H, W]` (grey) or `[H, W, 3]` (RGB), turned upright and squeezed to the
    size wanted.

    Grey images of 16 bits are scaled to 8; transparency does not count. Raises `InputError` for
    what Pillow cannot read as a common image, for floats and 32-bit integers, and for what is too
    large to be meant.
    """
    try:
        with Image.open(
            io.BytesIO(content), formats=(*FORMATS, "HEIF") if _reads_heif() else FORMATS
        ) as opened:
            opened.load()
            image = _upright(opened) if wanted.upright else opened
            image = _eight_bits(image, opened, where)
            image = image.convert(wanted.mode or ("L" if image.mode in _GREY else "RGB"))
    except UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
            raise InputError(
                f"convert_dataset: {where} is HEIC; `pip install pillow-heif` makes it readable"
            ) from error
        raise InputError(
            f"convert_dataset: {where} is no image (wanted one of {', '.join(FORMATS)})"
        ) from error
    except InputError:
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise InputError(f"convert_dataset: {where} cannot be read as an image: {error}") from error
    if wanted.size is not None and image.size != (wanted.size, wanted.size):
        image = image.resize((wanted.size, wanted.size), wanted.resample)
    return np.asarray(image)


def decode_all(tree: Tree, names: Sequence[str], wanted: Wanted, progress: bool) -> np.ndarray:
    """The images of these files, uint8 `[N, H, W]`, or `[N, H, W, 3]` as soon as one of them has
    colour.

    Without a size all must have the same one. Raises `InputError` as `decode` does, naming the
    file.
    """
    row_of = {name: row for row, name in enumerate(names)}
    images: np.ndarray | None = None
    first = ""
    with Bar("convert", len(names), "images", progress) as bar, _warnings_with_files():
        for name, image in _in_threads(tree, names, wanted):
            if images is None:
                images, first = np.empty((len(names), *image.shape), np.uint8), name
            if image.shape[:2] != images.shape[1:3]:
                sizes = f"{first} is {images.shape[2]}x{images.shape[1]}, {name} is {image.shape[1]}x{image.shape[0]}"
                raise InputError(
                    f"convert_dataset: images differ in size: {sizes}; give --size, 84 in most papers"
                )
            if image.ndim > images.ndim - 1:
                images = np.repeat(images[..., None], 3, axis=3)
            images[row_of[name]] = image if image.ndim == images.ndim - 1 else image[..., None]
            bar.advance()
    assert images is not None  # the caller has checked that there are some
    return images


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its orientation mark says.

    Pillow's `exif_transpose` writes all other EXIF data anew, which fails where one of them is
    damaged.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (
        Exception
    ):  # damaged data make Pillow raise nearly anything; the pixels are there all the same
        warnings.warn(_EXIF_DAMAGED, UserWarning, stacklevel=1)
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, opened: Image.Image, where: str) -> Image.Image:
    """Scale grey of 16 bits to 8, the whole range onto the whole range."""
    if image.mode[0] not in "IF":
        return image
    if not image.mode.startswith("I;16") and not (
        image.mode == "I" and opened.format in ("PNG", "PPM")
    ):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise InputError(
            f"convert_dataset: {where} holds {kind}, whose range it does not tell; make it 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 x 255


_reading = threading.local()  # .name: the file whose image this thread decodes


@contextmanager
def _warnings_with_files() -> Iterator[None]:
    """Inside the block gather what Pillow warns of, in all threads; then warn once of each fault,
    naming the files.
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
            f"convert_dataset: {', '.join(names[:3])}{more}: {text}", UserWarning, stacklevel=4
        )


def _in_threads(
    tree: Tree, names: Sequence[str], wanted: Wanted
) -> Iterator[tuple[str, np.ndarray]]:
    """Decoded images in the order of the stream; Pillow works outside Python's lock, so threads
    help.
    """

    def decoded(content: bytes, name: str) -> np.ndarray:
        _reading.name = f"{tree.path}: {name}"
        return decode(content, _reading.name, wanted)

    workers = torch.get_num_threads()
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, content in tree.stream(names):
            waiting.append((name, pool.submit(decoded, content, name)))
            if len(waiting) > 4 * workers:  # no more than these are held in memory at once
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
