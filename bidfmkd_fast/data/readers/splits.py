"""Which class belongs to which split: lists of classes or of images, as CSV, JSON or plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from bidfmkd_fast.data.dataset import SPLITS
from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.json_files import parse_json
from bidfmkd_fast.seeds import torch_generator

SPLIT_NAMES = {name: name for name in SPLITS} | {
    "train": "meta_train", "base": "meta_train", "val": "meta_val", "test": "meta_test", "novel": "meta_test",
}  # fmt: skip
PUBLISHED_LISTS = Path(__file__).parent.parent / "splits"
_KINDS = (".csv", ".json", ".txt")
_IMAGE_KEYS = ("label_names", "image_names", "image_labels")
_WANTED = (
    "train, val, test (or meta_train, meta_val, meta_test; base, val, novel), each as .csv (columns filename,label), "
    ".json (label_names, image_names, image_labels) or .txt (one class a line)"
)


class Row(NamedTuple):
    """One line of a split list: a class, or an image of it, and its split."""

    split: str
    class_name: str
    file: str | None = None


@dataclass(frozen=True)
class Split:
    """`of`: the split of each listed class; an entry may also be a folder of classes ("Angelic" for
    "Angelic/a").

    `images`: (path as listed, class) where the lists name images, else None. `where`: whence all
    this comes.
    """

    where: str
    of: dict[str, str]
    images: list[tuple[str, str]] | None = None

    def of_classes(self, classes: Collection[str]) -> dict[str, str]:
        """The split of each of these classes that is listed. Raises `InputError` for listed ones
        that are absent.
        """
        found: dict[str, str] = {}
        absent = []
        for entry, split in self.of.items():
            named = (
                [entry]
                if entry in classes
                else [name for name in classes if name.startswith(f"{entry}/")]
            )
            if not named:
                absent.append(entry)
            for name in named:
                if found.setdefault(name, split) != split:
                    raise _in_two(self.where, name, found[name], split)
        if absent:
            some = ", ".join(map(repr, absent[:3])) + (
                f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            )
            there = ", ".join(map(repr, sorted(classes)[:3]))
            raise InputError(
                f"convert_dataset: {self.where} names classes that the source lacks: {some}; it has {there}, ..."
            )
        return found


def make_split(where: str, rows: Sequence[Row]) -> Split:
    """The `Split` of these rows. Raises `InputError` when a class is in two splits, or only some
    rows name images.
    """
    of: dict[str, str] = {}
    for row in rows:
        if of.setdefault(row.class_name, row.split) != row.split:
            raise _in_two(where, row.class_name, of[row.class_name], row.split)
    images = [(row.file, row.class_name) for row in rows if row.file is not None]
    if not rows or len(images) not in (0, len(rows)):
        raise InputError(
            f"convert_dataset: {where} must name classes, or an image and its class in every row"
        )
    return Split(where, of, images or None)


def random_split(classes: Collection[str], seed: int) -> Split:
    """64 : 16 : 20 of the classes, as in miniImageNet and CIFAR-FS, drawn by `seed`; one at least
    for meta_test.
    """
    names = sorted(classes)
    n_test, n_val = max(1, round(0.2 * len(names))), round(0.16 * len(names))
    order = torch.randperm(len(names), generator=torch_generator(seed, "convert", "split")).tolist()
    sizes = (len(names) - n_val - n_test, n_val, n_test)
    splits = [split for split, size in zip(SPLITS, sizes) for _ in range(size)]
    return Split(
        f"drawn at random, seed {seed}",
        {names[index]: split for index, split in zip(order, splits)},
    )


def is_split_list(name: str) -> bool:
    """Whether a file is called as the list of a split is."""
    stem, _, ending = name.rpartition("/")[2].lower().rpartition(".")
    return stem in SPLIT_NAMES and f".{ending}" in _KINDS


def read_split(path: Path) -> Split:
    """The split lists at `path`: a folder of three, or one CSV or JSON file for all. Raises
    `InputError`.
    """
    if path.is_dir():
        files = [file.name for file in path.iterdir() if file.is_file()]
        chosen = _choose(files, str(path))
        if not chosen:
            raise InputError(f"convert_dataset: {path} holds no split lists: wanted {_WANTED}")
        return _parse_three(
            str(path), {split: (name, _content(path / name)) for split, name in chosen.items()}
        )
    if path.suffix.lower() not in (".csv", ".json"):
        raise InputError(
            f"convert_dataset: split lists are a folder, a .csv or a .json file; got {path}"
        )
    return make_split(str(path), list(_parse(str(path), path.name, _content(path), None)))


def published_split(name: str) -> Split:
    """A split shipped with the package: "cifar_fs" (Bertinetto et al., 2019) or "omniglot"
    (Vinyals et al., 2016).
    """
    return replace(read_split(PUBLISHED_LISTS / name), where=f"the published split of {name}")


def find_split(tree: Tree) -> Split | None:
    """The split lists inside a source. Raises `InputError` where several folders of it hold
    some.
    """
    folders: dict[str, list[str]] = {}
    for name in tree.names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    found = {
        folder: chosen
        for folder, files in folders.items()
        if (chosen := _choose(files, f"{tree.path}/{folder}"))
    }
    if len(found) > 1:
        where = ", ".join(repr(folder) for folder in sorted(found))
        raise InputError(
            f"convert_dataset: {tree.path} holds split lists in {where}; choose with --split"
        )
    for folder, chosen in found.items():
        names = [f"{folder}/{name}".lstrip("/") for name in chosen.values()]
        contents = dict(zip(chosen, zip(chosen.values(), tree.read(*names))))
        return _parse_three(f"{tree.path}/{folder}".rstrip("/"), contents)
    return None


def _choose(files: Sequence[str], where: str) -> dict[str, str]:
    """The file of each split among these, empty where there is none for meta_train or meta_test."""
    complete = []
    for kind in _KINDS:
        chosen: dict[str, str] = {}
        for file in sorted(files):
            stem, _, ending = file.lower().rpartition(".")
            split = SPLIT_NAMES.get(stem) if f".{ending}" == kind else None
            if split is not None and chosen.setdefault(split, file) != file:
                raise InputError(
                    f"convert_dataset: {where} holds {chosen[split]} and {file}, two lists for {split}; keep one"
                )
        if {"meta_train", "meta_test"} <= set(chosen):
            complete.append(chosen)
    if len(complete) > 1:
        both = " and ".join(chosen["meta_train"] for chosen in complete)
        raise InputError(
            f"convert_dataset: {where} holds split lists of several kinds, {both}; keep one"
        )
    return complete[0] if complete else {}


def _parse_three(where: str, contents: dict[str, tuple[str, bytes]]) -> Split:
    rows = [
        row
        for split in SPLITS
        if split in contents
        for row in _parse(
            f"{where}/{contents[split][0]}", contents[split][0], contents[split][1], split
        )
    ]
    return make_split(where, rows)


def _parse(where: str, name: str, content: bytes, split: str | None) -> Iterator[Row]:
    """The rows of one file; `split` is the one that its name tells, None for a file that must tell
    it itself.
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
            f"convert_dataset: {where}: wanted the columns {['filename', *wanted]}; got {list(columns)}"
        )
    for row in reader:
        its = split or SPLIT_NAMES.get(row["split"] or "")
        if (
            not row["label"]
            or its is None
            or None in row
            or ("filename" in columns and not row["filename"])
        ):
            raise InputError(
                f"convert_dataset: {where}, line {reader.line_num}: wanted {','.join(columns)}; got {row}"
            )
        yield Row(its, row["label"], row.get("filename"))


def _parse_json(where: str, value: object, split: str | None) -> Iterator[Row]:
    if split is None:
        if not isinstance(value, dict) or not value or not set(value) <= set(SPLIT_NAMES):
            raise InputError(
                f"convert_dataset: {where}: wanted {{'meta_train': [classes], 'meta_val': [...], 'meta_test': [...]}}"
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


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"convert_dataset: cannot read the split list {path}: {error.strerror}"
        ) from error


def _in_two(where: str, class_name: str, one: str, other: str) -> InputError:
    return InputError(
        f"convert_dataset: {where}: class {class_name!r} is in {one} and in {other}; no class may be in two splits"
    )
