"""Pools of classifiers that stand behind local APIs: same data set, same architecture (API-SS)."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import build_model
from bidfmkd_fast.scenarios.sources import SourceEntry, build_source, source_entry
from bidfmkd_fast.seeds import seeded, torch_generator

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

_LIST = "pool.yaml"
_FORMAT = 1
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-3
_KINDS = {"file": str, "architecture": str, "width": int, "class_names": list, "inverted": bool, "accuracy": float}


@dataclass(frozen=True)
class PoolEntry:
    """One API of a pool as `pool.yaml` lists it; `file` holds its weights, `accuracy` was measured on held-out images.

    `inverted` says that it learned the data set's images inverted (`load_dataset(..., invert=True)`).
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
    def spec(self) -> APISpec:
        """What the API tells of itself; it is named after its file. Raises `InputError` when a field does not fit."""
        return APISpec(
            n_classes=len(self.class_names),
            image_shape=self.image_shape,
            input_range=self.input_range,
            scores_kind=self.scores_kind,
            class_names=self.class_names,
            data_set=self.data_set,
            name=Path(self.file).stem,
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
    """A pool on disk: the folder that holds `pool.yaml` and the weights, and its entries in order."""

    folder: Path
    entries: tuple[PoolEntry | SourceEntry, ...]

    @property
    def accuracies(self) -> list[float]:
        """Held-out accuracy of the APIs that were trained for the pool, in [0, 1]."""
        return [entry.accuracy for entry in self.entries if isinstance(entry, PoolEntry)]

    @property
    def accuracy(self) -> float:
        """Mean of `accuracies`; NaN without any."""
        return sum(self.accuracies) / len(self.accuracies) if self.accuracies else math.nan


def train_pool(
    dataset: Dataset,
    out_dir: str | Path,
    *,
    n_apis: int = 20,
    n_way: int = 5,
    width: int = 32,
    epochs: int = 30,
    seed: int = 0,
    holdout: float = 0.25,
    architecture: str = "conv4",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Pool:
    """Train `n_apis` classifiers and write them, with their list `pool.yaml`, to `out_dir`.

    Each learns its own random `n_way` classes of the meta-train split, from their images less the share `holdout` of
    every class, with Adam in mini-batches of about 32 for `epochs` passes. API number i depends on the seed and i only.
    They take images in [0, 1] and answer logits.
    Raises `InputError` when a number is out of range, the split has too few classes, a class too few images, or
    `out_dir` holds a pool already: nothing is ever overwritten.
    """
    for name, value, least in (("n_apis", n_apis, 1), ("n_way", n_way, 2), ("width", width, 1), ("epochs", epochs, 1)):
        if value < least:
            raise InputError(f"train_pool: {name} must be at least {least}; got {value}")
    if not 0 < holdout < 1:
        raise InputError(f"train_pool: holdout must be between 0 and 1; got {holdout}")
    candidates = dataset.classes("meta_train")
    if n_way > len(candidates):
        held = f"meta_train of data set {dataset.name!r} has {len(candidates)} classes"
        raise InputError(f"train_pool: {held}; n_way={n_way} needs more")
    for index in candidates:
        if len(dataset.rows_of(index)) < 2:
            raise InputError(f"train_pool: class {dataset.class_names[index]!r} has one image; holding out needs two")
    folder = Path(out_dir)
    _refuse_trained(folder)
    drawn = PoolEntry(
        file="",
        architecture=architecture,
        width=width,
        image_shape=dataset.image_shape,
        class_names=("",) * n_way,
        data_set=dataset.name,
        inverted=dataset.inverted,
        input_range=(0.0, 1.0),
        scores_kind="logits",
        accuracy=0.0,
    )
    with torch.device("meta"):
        drawn.build()  # an unknown architecture or a size it refuses fails here, before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"train_pool: cannot make the folder {folder}: {error.strerror}") from None

    entries = []
    for i in tqdm(range(n_apis), desc="training APIs", unit="API", disable=None if progress else True):
        generator = torch_generator(seed, "pool", i)
        order = torch.randperm(len(candidates), generator=generator)[:n_way].tolist()
        classes = [candidates[position] for position in order]
        fit, held_out = _divide(dataset, classes, holdout, generator)
        with seeded(seed, "pool", i, "weights"):
            module = drawn.build().to(device)
        _fit(module, *(part.to(device) for part in fit), epochs=epochs, generator=generator)
        entry = replace(
            drawn,
            file=f"api_{i:03d}.safetensors",
            class_names=tuple(dataset.class_names[index] for index in classes),
            accuracy=_accuracy(module, *(part.to(device) for part in held_out)),
        )
        save_file({key: value.cpu().contiguous() for key, value in module.state_dict().items()}, folder / entry.file)
        entries.append(entry)
    _write_list(folder, entries)
    return Pool(folder, tuple(entries))


def read_pool(path: str | Path) -> Pool:
    """The pool listed in `path`, a folder with a `pool.yaml` or that file; no weights are read.

    Raises `InputError` when there is none, it lists no API, or it is not in this package's form.
    """
    where = Path(path).expanduser()
    file = where / _LIST if where.is_dir() else where
    if not file.is_file():
        raise InputError(f"load_pool: there is no pool list {file}; train one with `bidfmkd pool` or train_pool")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"load_pool: {file} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or set(content) != {"format", "apis"} or content["format"] != _FORMAT:
        raise InputError(f"load_pool: {file} must have exactly the keys 'format' (the number {_FORMAT}) and 'apis'")
    if not isinstance(content["apis"], list) or not content["apis"]:
        raise InputError(f"load_pool: {file} must list at least one API under 'apis'")
    return Pool(file.parent, tuple(_entry(item, f"{file}, API {i}", i) for i, item in enumerate(content["apis"])))


def load_modules(path: str | Path) -> list[nn.Module]:
    """The pool's classifiers as open modules in `eval()`, for white-box comparisons; arguments as for `read_pool`.

    Raises `InputError` as `read_pool` does, for a weights file that is missing, damaged or does not fit, and for an
    API that is no module here.
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
    """The pool's APIs: its classifiers as closed `TorchBlackBox`es named after their files, ONNX files and services.

    Raises `InputError` as `read_pool` does, and for a file or setting that is missing, damaged or does not fit;
    `APIUnavailable` where a service is not there that has to tell `n_classes` and `image_shape`.
    """
    from bidfmkd_fast.black_box.local import TorchBlackBox

    pool = read_pool(path)
    return [
        build_source(entry, pool.folder, f"API {i}")
        if isinstance(entry, SourceEntry)
        else TorchBlackBox(_load(pool.folder, entry), entry.spec)
        for i, entry in enumerate(pool.entries)
    ]


def _refuse_trained(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"train_pool: out_dir {folder} is a file; give a folder")
    if (folder / _LIST).exists():
        raise InputError(f"train_pool: {folder} holds a trained pool already; load it, or give another folder")
    if any(folder.glob("api_*.safetensors")):
        raise InputError(f"train_pool: {folder} holds a pool cut off in training; remove it, or give another folder")


def _divide(
    dataset: Dataset, classes: list[int], holdout: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to learn from, and those held out; at least one of each per class."""
    fit, held_out = [], []
    for class_index in classes:
        rows = dataset.rows_of(class_index)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n_held = min(max(1, round(holdout * len(rows))), len(rows) - 1)
        held_out.append(rows[:n_held])
        fit.append(rows[n_held:])
    return _together(dataset, fit), _together(dataset, held_out)


def _together(dataset: Dataset, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    labels = [torch.full((len(its),), label) for label, its in enumerate(rows)]
    return dataset.take(torch.cat(rows)), torch.cat(labels)


def _fit(module: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
    n_batches = max(1, round(len(images) / _BATCH_SIZE))
    module.train()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third less time on a CPU
    images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in order.tensor_split(n_batches):  # near-equal parts: a last batch of one would break batch norm
            optimizer.zero_grad()
            cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
    module.eval()


@torch.inference_mode()
def _accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([module(part).argmax(1) for part in images.split(256)])
    return (predicted == labels).double().mean().item()


def _write_list(folder: Path, entries: list[PoolEntry]) -> None:
    """Written last and moved into place whole: a folder with a list is a finished pool."""
    listed: list[dict[str, Any]] = [asdict(entry) for entry in entries]
    for item in listed:
        item.update({key: list(value) for key, value in item.items() if isinstance(value, tuple)})  # YAML has no tuples
    partial = folder / f"{_LIST}.partial"
    content = yaml.safe_dump({"format": _FORMAT, "apis": listed}, sort_keys=False, default_flow_style=None, width=1000)
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, folder / _LIST)


def _entry(item: Any, where: str, number: int) -> PoolEntry | SourceEntry:
    if isinstance(item, dict) and "kind" in item:
        return source_entry(item, where, number)
    names = {field.name for field in fields(PoolEntry)}
    if not isinstance(item, dict) or set(item) != names:
        came = sorted(map(str, item)) if isinstance(item, dict) else repr(item)
        raise InputError(f"load_pool: {where}: wanted exactly the keys {sorted(names)}; got {came}")
    for key, kind in _KINDS.items():
        if not isinstance(item[key], kind):
            raise InputError(f"load_pool: {where}: {key} must be of type {kind.__name__}; got {item[key]!r}")
    if Path(item["file"]).name != item["file"]:
        raise InputError(f"load_pool: {where}: file must be a name inside the pool's folder; got {item['file']!r}")
    if item["scores_kind"] != "logits":
        came = repr(item["scores_kind"])
        raise InputError(f"load_pool: {where}: scores_kind must be 'logits', what the models give; got {came}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
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
    with seeded(0):  # the weights are replaced at once; the caller's random numbers stay as they were
        module = entry.build()
    try:
        module.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"load_pool: the weights {file} are damaged or of another model; {reason}") from None
    return module.eval()
