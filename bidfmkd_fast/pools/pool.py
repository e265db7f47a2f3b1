"""Read and write a pool: its list `pool.yaml`, and the weights of its classifiers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.files.tensors import read_tensors
from bidfmkd_fast.files.yaml_files import dump_yaml, read_yaml
from bidfmkd_fast.models import build_model
from bidfmkd_fast.pools.sources import SourceEntry, build_source, source_entry
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.settings import MOST_WIDTH

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

LIST = "pool.yaml"
_FORMAT = 1
_MOST_LINES = 200  # APIs of a list that people may want to edit
_KINDS = {
    "file": str,
    "architecture": str,
    "width": int,
    "class_names": list,
    "inverted": bool,
    "accuracy": float,
}


@dataclass(frozen=True)
class PoolEntry:
    """A classifier of a pool as `pool.yaml` lists it.

    `file` holds its weights. `accuracy` was measured on held-out images. `inverted` is True if it
    learned the data set's images inverted (`load_dataset(..., invert=True)`).
    """

    file: str
    architecture: str
    width: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    data_set: str
    inverted: bool
    input_range: tuple[float, float]
    scores_kind: str
    accuracy: float

    @property
    def name(self) -> str:
        """Return the name of the API in reports, which is the name of its file."""
        return Path(self.file).stem

    @cached_property
    def spec(self) -> APISpec:
        """Return the public description of the API. Raises InputError if a field does not fit."""
        return APISpec(
            n_classes=len(self.class_names),
            image_shape=self.image_shape,
            input_range=self.input_range,
            scores_kind=self.scores_kind,
            class_names=self.class_names,
            data_set=self.data_set,
            name=self.name,
        )

    def build(self) -> nn.Module:
        """Return a module of this architecture with fresh weights."""
        return build_model(
            self.architecture,
            in_channels=self.image_shape[0],
            n_classes=len(self.class_names),
            image_size=self.image_shape[1:],
            width=self.width,
        )


@dataclass(frozen=True)
class Pool:
    """A pool on disk: its entries in order, and the folder of `pool.yaml` and the weights."""

    folder: Path
    entries: tuple[PoolEntry | SourceEntry, ...]

    @property
    def trained(self) -> tuple[PoolEntry, ...]:
        """Return the entries that are classifiers trained for the pool, not files or services."""
        return tuple(entry for entry in self.entries if isinstance(entry, PoolEntry))

    @property
    def accuracies(self) -> list[float]:
        """Return the accuracy of each of the `trained` APIs on held-out images, in [0, 1]."""
        return [entry.accuracy for entry in self.trained]

    @property
    def accuracy(self) -> float:
        """Return the mean of `accuracies`; NaN if there are none."""
        return sum(self.accuracies) / len(self.accuracies) if self.accuracies else math.nan


def read_pool(path: str | Path) -> Pool:
    """Read the list of a pool; `path` is its folder or its `pool.yaml`. No weights are read.

    Raises:
        InputError: there is no list, it has no API, or it is not of this package's form.
    """
    where = Path(path).expanduser()
    file = where / LIST if where.is_dir() else where
    if not file.is_file():
        raise InputError(
            f"load_pool: there is no pool list {file}; train one with `bidfmkd pool` or train_pool"
        )
    return pool_of_list(read_yaml(file, "load_pool"), file)


def pool_of_list(content: Any, file: Path) -> Pool:
    """Return the pool that the `content` of the list `file` describes.

    Raises InputError if the list has no API, or is not of this package's form.
    """
    if (
        not isinstance(content, dict)
        or set(content) != {"format", "apis"}
        or content["format"] != _FORMAT
    ):
        raise InputError(
            f"load_pool: {file} must have exactly the keys 'format' (the number {_FORMAT}) "
            "and 'apis'"
        )
    if not isinstance(content["apis"], list) or not content["apis"]:
        raise InputError(f"load_pool: {file} must list at least one API under 'apis'")
    entries = tuple(_entry(item, f"{file}, API {i}", i) for i, item in enumerate(content["apis"]))
    number_of: dict[str, int] = {}
    for i, entry in enumerate(entries):
        if (first := number_of.setdefault(entry.name, i)) != i:
            raise InputError(
                f"load_pool: {file}: APIs {first} and {i} are both called {entry.name!r}; "
                "give one of them another name in its spec, because reports and recovered sets "
                "tell APIs apart by name"
            )
    return Pool(file.parent, entries)


def load_modules(path: str | Path) -> list[nn.Module]:
    """Load the pool's classifiers as open modules in `eval()`, for white-box comparisons.

    Raises:
        InputError: as in `read_pool`; a file of weights is missing, damaged or of another model; or
            the pool has an API that is no module, such as a service.
    """
    pool = read_pool(path)
    modules = []
    for i, entry in enumerate(pool.entries):
        if isinstance(entry, SourceEntry):
            raise InputError(
                f"load_modules: API {i} of {path} is of kind {entry.kind!r}; "
                "only local APIs can be opened"
            )
        modules.append(_load(pool.folder, entry))
    return modules


def load_pool(path: str | Path) -> list[BlackBox]:
    """Load the pool's APIs as black boxes: trained classifiers, ONNX files and services.

    Raises:
        InputError: as in `read_pool`; or a file or setting is missing, damaged or does not fit.
        APIUnavailable: the list leaves out `n_classes` or `image_shape` of a service, and the
            service does not answer when it is asked for them.
    """
    return boxes_of(read_pool(path), path)


def boxes_of(pool: Pool, path: str | Path) -> list[BlackBox]:
    """Return the APIs of a pool as black boxes, as `load_pool`; `path` stands in errors.

    Of a pool with more than `MOST_LOADED` classifiers the modules are read when they are asked.
    """
    from bidfmkd_fast.black_box.local.torch_module import TorchBlackBox
    from bidfmkd_fast.pools import stored_box
    from bidfmkd_fast.pools.stored_box import Loaded, StoredBlackBox

    most = stored_box.MOST_LOADED
    loaded, stored = Loaded(most), len(pool.trained) > most

    def box(number: int, entry: PoolEntry | SourceEntry) -> BlackBox:
        if isinstance(entry, SourceEntry):
            return build_source(entry, pool.folder, f"{path}, API {number}")
        if not stored:
            return TorchBlackBox(_load(pool.folder, entry), entry.spec)
        _check_weights(pool.folder, entry)
        return StoredBlackBox(partial(_load, pool.folder, entry), entry.spec, loaded, number)

    return [box(number, entry) for number, entry in enumerate(pool.entries)]


def write_list(folder: Path, entries: list[PoolEntry]) -> None:
    """Write `pool.yaml`; it is written last, so a folder that holds it is a finished pool.

    A long list is written as JSON, which is YAML too and is read faster.
    """
    listed = [
        {
            key: list(value) if isinstance(value, tuple) else value  # YAML has no tuples
            for key, value in asdict(entry).items()
        }
        for entry in entries
    ]
    if len(listed) > _MOST_LINES:
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in listed)
        content = f'{{"format": {_FORMAT}, "apis": [\n{lines}\n]}}\n'
    else:
        content = dump_yaml(
            {"format": _FORMAT, "apis": listed}, default_flow_style=None, width=1000
        )
    write_exact(folder / LIST, content)


def _entry(item: Any, where: str, number: int) -> PoolEntry | SourceEntry:
    if isinstance(item, dict) and "kind" in item:
        return source_entry(item, where, number)
    names = {field.name for field in fields(PoolEntry)}
    if not isinstance(item, dict) or set(item) != names:
        came = sorted(map(str, item)) if isinstance(item, dict) else repr(item)
        raise InputError(f"load_pool: {where}: wanted exactly the keys {sorted(names)}; got {came}")
    for key, kind in _KINDS.items():
        if not isinstance(item[key], kind):
            raise InputError(
                f"load_pool: {where}: {key} must be of type {kind.__name__}; got {item[key]!r}"
            )
    if not 1 <= item["width"] <= MOST_WIDTH:
        raise InputError(
            f"load_pool: {where}: width must be in 1..{MOST_WIDTH:,}; got {item['width']}"
        )
    if Path(item["file"]).name != item["file"]:
        raise InputError(
            f"load_pool: {where}: file must be a name inside the pool's folder; "
            f"got {item['file']!r}"
        )
    if item["scores_kind"] not in ("logits", "labels"):
        came = repr(item["scores_kind"])
        raise InputError(
            f"load_pool: {where}: scores_kind must be 'logits', what the models give, or 'labels', "
            f"their highest alone; got {came}"
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in item.items()
    }
    entry = PoolEntry(**values)
    try:
        _ = entry.spec
    except InputError as error:
        raise InputError(f"load_pool: {where}: {error}") from None
    return entry


def _check_weights(folder: Path, entry: PoolEntry) -> None:
    """Raise InputError if the file with the weights is missing."""
    file = folder / entry.file
    if not file.is_file():
        raise InputError(f"load_pool: the weights {file} are missing")


def _load(folder: Path, entry: PoolEntry) -> nn.Module:
    _check_weights(folder, entry)
    file = folder / entry.file
    with seeded(0):  # keeps the caller's random numbers; these weights are replaced at once
        module = entry.build()
    try:
        module.load_state_dict(read_tensors(file)[0])
    except (InputError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"load_pool: the weights {file} are damaged or of another model; {reason}"
        ) from None
    return module.eval()
