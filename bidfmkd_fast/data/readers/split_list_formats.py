"""Parse one split list: classes or images, in CSV, JSON or plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

from bidfmkd_fast.data.dataset import SPLITS
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.json_files import parse_json

SPLIT_NAMES = {name: name for name in SPLITS} | {
    "train": "meta_train",
    "base": "meta_train",
    "val": "meta_val",
    "test": "meta_test",
    "novel": "meta_test",
}
_IMAGE_KEYS = ("label_names", "image_names", "image_labels")


class Row(NamedTuple):
    """One line of a split list: the split of a class, or of an image of a class."""

    split: str
    class_name: str
    file: str | None = None


def parse_list(where: str, name: str, content: bytes, split: str | None) -> Iterator[Row]:
    """Yield the rows of one file.

    `split` is the split that the name of the file states; None if the content states it.
    """
    try:
        text = content.decode("utf-8-sig")
        if name.lower().endswith(".csv"):
            yield from _parse_csv(where, text, split)
        elif name.lower().endswith(".json"):
            yield from _parse_json(where, parse_json(text, f"convert_dataset: {where}"), split)
        else:
            yield from (Row(str(split), line.strip()) for line in text.splitlines() if line.strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"convert_dataset: {where} cannot be read as {name.rpartition('.')[2].upper()}: {error}"
        ) from error


def _parse_csv(where: str, text: str, split: str | None) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    columns = reader.fieldnames or ()
    wanted = ["label"] + ["split"] * (split is None)
    if not set(wanted) <= set(columns):
        raise InputError(
            f"convert_dataset: {where}: wanted the columns {['filename', *wanted]}; "
            f"got {list(columns)}"
        )
    for row in reader:
        row_split = split or SPLIT_NAMES.get(row["split"] or "")
        if (
            not row["label"]
            or row_split is None
            or None in row
            or ("filename" in columns and not row["filename"])
        ):
            raise InputError(
                f"convert_dataset: {where}, line {reader.line_num}: "
                f"wanted {','.join(columns)}; got {row}"
            )
        yield Row(row_split, row["label"], row.get("filename"))


def _parse_json(where: str, value: object, split: str | None) -> Iterator[Row]:
    if split is None:
        if not isinstance(value, dict) or not value or not set(value) <= set(SPLIT_NAMES):
            raise InputError(
                f"convert_dataset: {where}: wanted "
                "{'meta_train': [classes], 'meta_val': [...], 'meta_test': [...]}"
            )
        for key, classes in value.items():
            yield from _parse_json(where, classes, SPLIT_NAMES[key])
    elif isinstance(value, list) and all(isinstance(name, str) for name in value):
        yield from (Row(split, name) for name in value)
    elif isinstance(value, dict) and all(isinstance(value.get(key), list) for key in _IMAGE_KEYS):
        names, files, labels = (value[key] for key in _IMAGE_KEYS)
        if len(files) != len(labels):
            raise InputError(
                f"convert_dataset: {where}: {len(files)} image_names but {len(labels)} image_labels"
            )
        for file, label in zip(files, labels):
            if type(label) is not int or not 0 <= label < len(names) or not isinstance(file, str):
                wanted = f"a file name and a number of one of {len(names)} label_names"
                raise InputError(
                    f"convert_dataset: {where}: wanted {wanted}; got {file!r} and {label!r}"
                )
            yield Row(split, str(names[label]), file)
    else:
        raise InputError(
            f"convert_dataset: {where}: wanted a list of class names, or {', '.join(_IMAGE_KEYS)}"
        )
