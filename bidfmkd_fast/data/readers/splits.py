"""Find out which class belongs to which split: from split lists, or at random."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bidfmkd_fast.data.dataset import SPLITS
from bidfmkd_fast.data.readers.split_list_formats import SPLIT_NAMES, Row, parse_list
from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import torch_generator

PUBLISHED_LISTS = Path(__file__).parent.parent / "splits"
_KINDS = (".csv", ".json", ".txt")
_WANTED = (
    "train, val, test (or meta_train, meta_val, meta_test; base, val, novel), "
    "each as .csv (columns filename,label), .json (label_names, image_names, image_labels) "
    "or .txt (one class a line)"
)


@dataclass(frozen=True)
class Split:
    """The split of classes, as lists give it.

    Attributes:
        where: where the lists come from, in words.
        of: the split of each listed class. An entry may also be a folder of classes, such as
            "Angelic" for "Angelic/a".
        images: (path as listed, class) of each image, if the lists name images; else None.
    """

    where: str
    of: dict[str, str]
    images: list[tuple[str, str]] | None = None

    def of_classes(self, classes: Collection[str]) -> dict[str, str]:
        """Return the split of each of these classes that is listed.

        Raises:
            InputError: a listed class is not among `classes`, or is in two splits.
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
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            there = ", ".join(map(repr, sorted(classes)[:3]))
            raise InputError(
                f"convert_dataset: {self.where} names classes that the source lacks: "
                f"{', '.join(map(repr, absent[:3]))}{more}; it has {there}, ..."
            )
        return found


def make_split(where: str, rows: Sequence[Row]) -> Split:
    """Return the `Split` of these rows.

    Raises:
        InputError: a class is in two splits, or only some rows name images.
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
    """Draw a split of 64 : 16 : 20 of the classes, as in miniImageNet and CIFAR-FS, by `seed`.

    meta_test gets at least one class.
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
    """Return True if the name of a file is that of a split list, such as `train.csv`."""
    stem, _, ending = name.rpartition("/")[2].lower().rpartition(".")
    return stem in SPLIT_NAMES and f".{ending}" in _KINDS


def read_split(path: Path) -> Split:
    """Read split lists: a folder with one for each split, or one CSV or JSON file for all.

    Raises:
        InputError: `path` is none of these, or a list is damaged or contradicts another.
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
    return make_split(str(path), list(parse_list(str(path), path.name, _content(path), None)))


def published_split(name: str) -> Split:
    """Return a split that comes with the package.

    `name` is "cifar_fs" (Bertinetto et al., 2019) or "omniglot" (Vinyals et al., 2016).
    """
    return replace(read_split(PUBLISHED_LISTS / name), where=f"the published split of {name}")


def find_split(tree: Tree) -> Split | None:
    """Return the split of the lists inside a source; None if it holds none.

    Raises:
        InputError: several folders hold split lists.
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
    """Return the file of each split; empty unless both meta_train and meta_test have one."""
    complete = []
    for kind in _KINDS:
        chosen: dict[str, str] = {}
        for file in sorted(files):
            stem, _, ending = file.lower().rpartition(".")
            split = SPLIT_NAMES.get(stem) if f".{ending}" == kind else None
            if split is not None and chosen.setdefault(split, file) != file:
                raise InputError(
                    f"convert_dataset: {where} holds {chosen[split]} and {file}, "
                    f"two lists for {split}; keep one"
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
        for row in parse_list(
            f"{where}/{contents[split][0]}", contents[split][0], contents[split][1], split
        )
    ]
    return make_split(where, rows)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"convert_dataset: cannot read the split list {path}: {error.strerror}"
        ) from error


def _in_two(where: str, class_name: str, first: str, second: str) -> InputError:
    return InputError(
        f"convert_dataset: {where}: class {class_name!r} is in {first} and in {second}; "
        "no class may be in two splits"
    )
