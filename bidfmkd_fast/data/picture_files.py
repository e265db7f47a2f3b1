"""Find picture files and their labels, and read them for a model that takes one image shape."""

from __future__ import annotations

import csv
import io
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from bidfmkd_fast.data.readers.images import (
    Wanted,
    decode_noted,
    is_image_name,
    warnings_with_files,
)
from bidfmkd_fast.data.readers.left_out import endings
from bidfmkd_fast.data.readers.tree import MAX_FILE_BYTES, Tree, is_visible, open_tree
from bidfmkd_fast.errors import InputError

_COLUMNS = ("file", "label")
_MODES = {1: "L", 3: "RGB"}  # by channels


class LabelledFiles(NamedTuple):
    """Picture files, and the label of each."""

    files: list[Path]
    labels: list[str]


def labelled_files(operation: str, source: Path) -> LabelledFiles:
    """List the pictures of a folder with a folder per class, or of a CSV with `file,label`.

    The label of a picture in a folder is the name of its class folder, as in the layout
    `class_folders` of `convert`: folders above all pictures are ignored, and the names of deeper
    folders are joined by "/". Paths in a CSV are relative to its folder. `operation` opens the
    message of an error.

    Raises:
        InputError: there is no picture, a picture lies in no class folder, a class folder is empty,
            two classes have the same name but for capitals and blanks, or the CSV is damaged.
    """
    if source.is_dir():
        found = _of_class_folders(operation, source)
    elif source.suffix.lower() == ".csv":
        found = _of_csv(operation, source)
    else:
        what = "is a file" if source.exists() else "does not exist"
        raise InputError(
            f"{operation}: wanted a folder with a folder of pictures per class, or a CSV with the "
            f"columns file,label; {source} {what}"
        )
    seen: dict[str, str] = {}
    for label in found.labels:
        key = unicodedata.normalize("NFKC", label).strip().casefold()
        if seen.setdefault(key, label) != label:
            raise InputError(
                f"{operation}: {source} has two classes of one name, {seen[key]!r} and {label!r}; "
                "merge or rename them"
            )
    return found


def picture_files(operation: str, source: Path) -> list[Path]:
    """List the pictures below the folder `source`, ordered by name; or the file `source` itself.

    Raises:
        InputError: there is no such file or folder, or the folder holds no picture.
    """
    if not source.is_dir():
        if not source.exists():
            raise InputError(f"{operation}: there is no file or folder {source}")
        return [source]
    tree = _tree(operation, source)
    return [source / name for name in _pictures_in(operation, tree)]


def read_pictures(
    operation: str, files: Sequence[Path], image_shape: tuple[int, int, int] | None
) -> list[np.ndarray]:
    """Read pictures as uint8 `[H, W]` (grey) or `[H, W, 3]` (RGB), by the rule of `convert`.

    Pictures are brought to `image_shape`, (C, H, W), as `readers.images.to_pixels` does; with None
    they keep their own size and colours.

    Raises:
        InputError: a file is missing, damaged or no picture; the message names it. Or `image_shape`
            has neither 1 nor 3 channels.
    """
    wanted = wanted_form(operation, image_shape)

    def read(file: Path) -> np.ndarray:
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise InputError(
                    f"{operation}: {file} holds {file.stat().st_size:,} bytes; no picture exceeds "
                    f"{MAX_FILE_BYTES:,}"
                )
            if not file.is_file():  # a pipe would never end
                raise InputError(f"{operation}: {file} is not a picture file")
            content = file.read_bytes()
        except OSError as error:
            raise InputError(
                f"{operation}: cannot read {file}: {error.strerror or error}"
            ) from None
        return decode_noted(content, str(file), wanted)

    # Threads help because Pillow decodes outside Python's global lock.
    with warnings_with_files(operation), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(read, files))


def wanted_form(operation: str, image_shape: tuple[int, int, int] | None) -> Wanted:
    """Return the form in which pictures are read for a model of this image shape, (C, H, W).

    Raises:
        InputError: C is neither 1 nor 3.
    """
    if image_shape is None:
        return Wanted(None, operation=operation)
    channels, height, width = image_shape
    if channels not in _MODES:
        raise InputError(
            f"{operation}: pictures have 1 or 3 channels, and the model takes {channels}; "
            f"give tensors [N, {channels}, {height}, {width}]"
        )
    return Wanted((height, width), mode=_MODES[channels], operation=operation)


def _tree(operation: str, folder: Path) -> Tree:
    try:
        return open_tree(folder)
    except InputError as error:  # a folder below may not be looked into
        reason = str(error).removeprefix("convert_dataset: ")
        raise InputError(f"{operation}: {reason}") from None


def _pictures_in(operation: str, tree: Tree) -> list[str]:
    names = [name for name in tree.names if is_image_name(name)]
    if not names:
        held = f"; it holds {endings(tree.names)}" if tree.names else ""
        raise InputError(f"{operation}: {tree.path} holds no pictures that can be read{held}")
    return names


def _of_class_folders(operation: str, source: Path) -> LabelledFiles:
    tree = _tree(operation, source)
    names = _pictures_in(operation, tree)
    folders = [posixpath.dirname(name) for name in names]
    top = posixpath.commonpath(folders) if len(set(folders)) > 1 else posixpath.dirname(folders[0])
    with_pictures = set(folders) | {
        parent.as_posix() for folder in folders for parent in PurePosixPath(folder).parents
    }
    for path in sorted(path for path in (source / top).iterdir() if path.is_dir()):
        below = path.relative_to(source).as_posix()
        if is_visible(path.name) and below not in with_pictures:
            raise InputError(
                f"{operation}: the class folder {path} holds no picture that can be read; "
                "add pictures or remove it"
            )
    labels = ["" if folder == top else posixpath.relpath(folder, top or ".") for folder in folders]
    if "" in labels:
        raise InputError(
            f"{operation}: {source / names[labels.index('')]} lies in no class folder; "
            "wanted a folder for each class"
        )
    return LabelledFiles([source / name for name in names], labels)


def _of_csv(operation: str, source: Path) -> LabelledFiles:
    found = LabelledFiles([], [])
    try:
        text = source.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise InputError(f"{operation}: {source} cannot be read as CSV: it holds a NUL byte")
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        columns = list(reader.fieldnames or ())
        if not set(_COLUMNS) <= set(columns):
            raise InputError(
                f"{operation}: {source}: wanted the columns {','.join(_COLUMNS)}; got "
                f"{','.join(columns) or 'an empty file'}"
            )
        if doubled := [name for name in _COLUMNS if columns.count(name) > 1]:
            raise InputError(f"{operation}: {source} has the column {doubled[0]} twice")
        for row in reader:
            if None in row:  # an unquoted comma in a file name or label
                raise InputError(
                    f"{operation}: {source}, line {reader.line_num}: wanted {len(columns)} fields; "
                    f"got {len(columns) + len(row[None])}; quote a field that holds a comma"
                )
            if not row["file"] or not row["label"]:
                raise InputError(
                    f"{operation}: {source}, line {reader.line_num}: wanted a file and a label; "
                    f"got {row['file']!r} and {row['label']!r}"
                )
            found.files.append(source.parent / row["file"])
            found.labels.append(row["label"])
    except OSError as error:
        raise InputError(f"{operation}: cannot read {source}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{operation}: {source} cannot be read as CSV: {error}") from None
    if not found.files:
        raise InputError(f"{operation}: {source} lists no pictures")
    twice = [file for file, count in Counter(found.files).items() if count > 1]
    if twice:
        raise InputError(f"{operation}: {source} lists the picture {twice[0]} twice")
    return found
