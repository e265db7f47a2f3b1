"""Pools of classifiers that stand behind local APIs: their list `pool.yaml`, and how they are loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import read_tensors, write_exact
from bidfmkd_fast.files.yaml_files import dump_yaml, read_yaml
from bidfmkd_fast.models import build_model
from bidfmkd_fast.pools.sources import SourceEntry, build_source, source_entry
from bidfmkd_fast.seeds import seeded

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

LIST = "pool.yaml"
_FORMAT = 1
_MOST_WIDTH = (
    4096  # the widest published ResNet has 2048 channels; more may not even fit into memory
)
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
    """One API of a pool as `pool.yaml` lists it; `file` holds its weights, `accuracy` was measured
    on held-out images.

    `inverted` says that it learned the data set's images inverted (`load_dataset(...,
    invert=True)`).
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
        """What reports call the API."""
        return Path(self.file).stem

    @property
    def spec(self) -> APISpec:
        """What the API tells of itself; it is named after its file. Raises `InputError` when a
        field does not fit.
        """
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
        """A module of its architecture with fresh weights."""
        return build_model(
            self.architecture,
            in_channels=self.image_shape[0],
            n_classes=len(self.class_names),
            image_size=self.image_shape[1:],
            width=self.width,
        )


@dataclass(frozen=True)
class Pool:
    """A pool on disk: the folder that holds `pool.yaml` and the weights, and its entries in
    order.
    """

    folder: Path
    entries: tuple[PoolEntry | SourceEntry, ...]

    @property
    def trained(self) -> tuple[PoolEntry, ...]:
        """Those entries that are classifiers trained for the pool."""
        return tuple(entry for entry in self.entries if isinstance(entry, PoolEntry))

    @property
    def accuracies(self) -> list[float]:
        """Held-out accuracy of the `trained` APIs, in [0, 1]."""
        return [entry.accuracy for entry in self.trained]

    @property
    def accuracy(self) -> float:
        """Mean of `accuracies`; NaN without any."""
        return sum(self.accuracies) / len(self.accuracies) if self.accuracies else math.nan


def read_pool(path: str | Path) -> Pool:
    """The pool listed in `path`, a folder with a `pool.yaml` or that file; no weights are read.

    Raises `InputError` when there is none, it lists no API, or it is not in this package's form.
    """
    where = Path(path).expanduser()
    file = where / LIST if where.is_dir() else where
    if not file.is_file():
        raise InputError(
            f"load_pool: there is no pool list {file}; train one with `bidfmkd pool` or train_pool"
        )
    content = read_yaml(file, "load_pool")
    if (
        not isinstance(content, dict)
        or set(content) != {"format", "apis"}
        or content["format"] != _FORMAT
    ):
        raise InputError(
            f"load_pool: {file} must have exactly the keys 'format' (the number {_FORMAT}) and 'apis'"
        )
    if not isinstance(content["apis"], list) or not content["apis"]:
        raise InputError(f"load_pool: {file} must list at least one API under 'apis'")
    entries = tuple(_entry(item, f"{file}, API {i}", i) for i, item in enumerate(content["apis"]))
    number_of: dict[str, int] = {}
    for i, entry in enumerate(entries):
        if (first := number_of.setdefault(entry.name, i)) != i:
            wanted = (
                "give one of them another name in its spec; reports and recovered sets go by names"
            )
            raise InputError(
                f"load_pool: {file}: APIs {first} and {i} are both called {entry.name!r}; {wanted}"
            )
    return Pool(file.parent, entries)


def load_modules(path: str | Path) -> list[nn.Module]:
    """The pool's classifiers as open modules in `eval()`, for white-box comparisons; arguments as
    for `read_pool`.

    Raises `InputError` as `read_pool` does, for a weights file that is missing, damaged or does not
    fit, and for an API that is no module here.
    """
    pool = read_pool(path)
    modules = []
    for i, entry in enumerate(pool.entries):
        if isinstance(entry, SourceEntry):
            raise InputError(
                f"load_modules: API {i} of {path} is of kind {entry.kind!r}; only local APIs can be opened"
            )
        modules.append(_load(pool.folder, entry))
    return modules


def load_pool(path: str | Path) -> list[BlackBox]:
    """The pool's APIs: its classifiers as closed `TorchBlackBox`es named after their files, ONNX
    files and services.

    Raises `InputError` as `read_pool` does, and for a file or setting that is missing, damaged or
    does not fit; `APIUnavailable` where a service is not there that has to tell `n_classes` and
    `image_shape`.
    """
    from bidfmkd_fast.black_box.local.torch_module import TorchBlackBox

    pool = read_pool(path)
    return [
        build_source(entry, pool.folder, f"{path}, API {i}")
        if isinstance(entry, SourceEntry)
        else TorchBlackBox(_load(pool.folder, entry), entry.spec)
        for i, entry in enumerate(pool.entries)
    ]


def write_list(folder: Path, entries: list[PoolEntry]) -> None:
    """Written last and moved into place whole: a folder with a list is a finished pool."""
    listed: list[dict[str, Any]] = [asdict(entry) for entry in entries]
    for item in listed:
        item.update(
            {key: list(value) for key, value in item.items() if isinstance(value, tuple)}
        )  # YAML has no tuples
    content = dump_yaml({"format": _FORMAT, "apis": listed}, default_flow_style=None, width=1000)
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
    if not 1 <= item["width"] <= _MOST_WIDTH:
        raise InputError(
            f"load_pool: {where}: width must be in 1..{_MOST_WIDTH:,}; got {item['width']}"
        )
    if Path(item["file"]).name != item["file"]:
        raise InputError(
            f"load_pool: {where}: file must be a name inside the pool's folder; got {item['file']!r}"
        )
    if item["scores_kind"] != "logits":
        came = repr(item["scores_kind"])
        raise InputError(
            f"load_pool: {where}: scores_kind must be 'logits', what the models give; got {came}"
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


def _load(folder: Path, entry: PoolEntry) -> nn.Module:
    file = folder / entry.file
    if not file.is_file():
        raise InputError(f"load_pool: the weights {file} are missing")
    with seeded(
        0
    ):  # the weights are replaced at once; the caller's random numbers stay as they were
        module = entry.build()
    try:
        module.load_state_dict(read_tensors(file)[0])
    except (InputError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"load_pool: the weights {file} are damaged or of another model; {reason}"
        ) from None
    return module.eval()
