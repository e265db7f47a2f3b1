"""The layouts that `convert` understands: how to read each, and how to recognise publishers'."""

from __future__ import annotations

from collections.abc import Callable

from bidfmkd_fast.data.readers import cifar100, class_folders, cub, image_lists, omniglot
from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.splits import Split
from bidfmkd_fast.data.readers.tree import Tree

READERS: dict[str, Callable[[Tree, Split | None], Listing]] = {
    "class_folders": class_folders.read,
    "image_lists": image_lists.read,
    "cifar100": cifar100.read,
    "cub": cub.read,
    "omniglot": omniglot.read,
}
# Recognised by the names of their files alone, and split as published unless the caller has split
# lists.
PUBLISHED: dict[str, Callable[[Tree], bool]] = {
    "cifar100": cifar100.matches,
    "cub": cub.matches,
    "omniglot": omniglot.matches,
}
