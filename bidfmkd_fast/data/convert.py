"""Convert published data sets and folders of images into one `.npz` that `load_dataset` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.data.load import load_dataset
from bidfmkd_fast.data.readers import PUBLISHED, READERS
from bidfmkd_fast.data.readers.images import Wanted, decode_all
from bidfmkd_fast.data.readers.left_out import left_out_lines
from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.splits import find_split, random_split, read_split
from bidfmkd_fast.data.readers.tree import open_tree
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable, written_whole

LAYOUTS = ("auto", *READERS)
RANDOM = "random"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        dataset: the data set as loaded from `path`.
        path: the file that was written.
        layout: the layout by which the source was read.
        split: where the split comes from, in words.
        left_out: the number of classes that are in no split.
        passed_over: a line for each kind of file that was not read, and for folders without an
            image. Empty for the archives of publishers, which hold much besides images.
    """

    dataset: Dataset
    path: Path
    layout: str
    split: str
    left_out: int
    passed_over: tuple[str, ...] = ()


def convert_dataset(
    source: str | Path,
    out: str | Path | None = None,
    *,
    layout: str = "auto",
    split: str | Path | None = None,
    size: int | None = None,
    seed: int = 0,
    upright: bool = True,
    progress: bool = False,
) -> Converted:
    """Read a folder, zip or tar archive of images and write `images`, `labels`, `class_names`,
    `split_of_class`.

    Classes and their images are ordered by name, so the result does not depend on the file system.

    Args:
        source: the folder or archive.
        out: the file to write, by default `<data set>.npz` in the current folder. It appears when
            it is complete.
        layout: one of `LAYOUTS`. "auto" recognises the layout by the names of the files; any other
            layout is used, or refused if the source does not have it.
        split: a path to split lists, or "random" (64 : 16 : 20 of the classes, drawn by `seed`).
            None takes the published split, else split lists in the source, else its split folders,
            else a random split.
        size: makes images `size` x `size`. None takes the size that the papers use for the data
            set, else the size that all images have.
        seed: seed of a random split.
        upright: turns pictures as the orientation mark of their camera (EXIF) says.
        progress: shows a progress bar.

    Raises:
        InputError: an argument is wrong, or the source is missing, damaged or of another layout.
    """
    if layout not in LAYOUTS:
        raise InputError(
            f"convert_dataset: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}"
        )
    if size is not None and not 1 <= size <= 1024:
        raise InputError(f"convert_dataset: size must be in 1..1024; got {size}")
    tree = open_tree(Path(source).expanduser())
    random = str(split) == RANDOM
    given = None if split is None or random else read_split(Path(split).expanduser())
    if layout == "auto":
        layout = next((name for name, matches in PUBLISHED.items() if matches(tree)), layout)
    if layout == "image_lists" or (layout in ("auto", "class_folders") and not random):
        given = given or find_split(tree)
    if layout == "auto":
        layout = "class_folders" if given is None or given.images is None else "image_lists"
    listing = READERS[layout](tree, given)
    path = Path(f"{listing.name}.npz" if out is None else out).expanduser()
    _refuse_out(path)
    names = sorted(set(listing.classes))
    if not names:
        raise InputError(f"convert_dataset: {layout}: {tree.path} has no images")
    rule = given or listing.split
    if rule is None or random:
        rule = random_split(names, seed)
    split_of_class = rule.of_classes(set(names))
    kept = [name for name in names if name in split_of_class]
    if len(kept) < 2:
        raise InputError(
            f"convert_dataset: {layout}: {tree.path} has one class, {kept[0]!r}; "
            "few-shot tasks need at least two"
        )
    rows = _rows(listing, set(kept))
    index = {name: number for number, name in enumerate(kept)}
    with _errors_named():
        check_writable(path)
    images = _images(listing, rows, size, upright, progress)
    with _errors_named(), written_whole(path) as file:
        np.savez_compressed(
            file,
            images=images,
            labels=np.array([index[listing.classes[row]] for row in rows], np.int64),
            class_names=np.array(kept),
            split_of_class=np.array([split_of_class[name] for name in kept]),
        )
    dataset = load_dataset(path)
    # Archives of publishers hold much besides images; only what a user may miss is worth a line.
    users_own = layout in ("class_folders", "image_lists")
    passed_over = left_out_lines(tree, listing.files or ()) if users_own else ()
    return Converted(dataset, path, layout, rule.where, len(names) - len(kept), passed_over)


@contextmanager
def _errors_named() -> Iterator[None]:
    """Put "convert_dataset" in front of an error about the file to write."""
    try:
        yield
    except InputError as error:
        raise InputError(f"convert_dataset: {error}") from None


def _refuse_out(path: Path) -> None:
    if path.suffix != ".npz":
        raise InputError(f"convert_dataset: the file to write must end in .npz; got {path}")
    if path.exists():
        raise InputError(f"convert_dataset: {path} exists already; give another --out")


def _rows(listing: Listing, kept: set[str]) -> list[int]:
    """Return the rows of the images in `kept` classes, ordered by class and then by file name.

    Sources that hold arrays have no file names; their images keep the order of the source.
    """

    def place(row: int) -> tuple[str, str]:
        return listing.classes[row], listing.files[row] if listing.files else ""

    return sorted((row for row, name in enumerate(listing.classes) if name in kept), key=place)


def _images(
    listing: Listing, rows: list[int], size: int | None, upright: bool, progress: bool
) -> np.ndarray:
    """Return the images of these rows, uint8 `[N, H, W]` or `[N, H, W, 3]`."""
    size = listing.size if size is None else size
    if listing.pixels is None:
        assert listing.files is not None
        files = [listing.files[row] for row in rows]
        return decode_all(
            listing.tree, files, Wanted(size, listing.resample, listing.mode, upright), progress
        )
    pixels = listing.pixels[rows]
    if size is None or pixels.shape[1:3] == (size, size):
        return pixels
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((size, size), listing.resample))
            for image in pixels
        ]
    )
