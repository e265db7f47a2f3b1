"""Training the classifiers of a pool: one data set and architecture (API-SS), mixed architectures, or both mixed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable, write_tensors
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.pools.pool import LIST, Pool, PoolEntry, write_list
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import seeded, torch_generator

_MIXED = ("conv4", "resnet10", "resnet18")
ARCHITECTURES = {"ss": ("conv4",), "sh": _MIXED, "mh": _MIXED}
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-3


def train_pool(
    datasets: Dataset | Sequence[Dataset],
    out_dir: str | Path,
    *,
    scenario: str = "ss",
    n_apis: int = 20,
    n_way: int = 5,
    width: int = 32,
    resnet_width: int = 64,
    epochs: int = 30,
    seed: int = 0,
    holdout: float = 0.25,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Pool:
    """Train `n_apis` classifiers and write them, with their list `pool.yaml`, to `out_dir`.

    Scenarios (Hu et al., ICML 2023, arXiv 2305.18413): "ss" is one data set and Conv4 (`width`
    filters); "sh" one data set, and Conv4, ResNet-10 and ResNet-18 (first stage of `resnet_width`
    channels) in turn; "mh" several data sets in turn, and all architectures on each.

    Each API learns its own random `n_way` classes of its data set's meta-train split, from their
    images less the share `holdout` of every class, with Adam in mini-batches of about 32 for
    `epochs` passes. API number i depends on the arguments, the seed and i only. On a CPU as many
    APIs train at once as torch has threads, each on one: measured, several in one grouped network
    are no faster there. They take images in [0, 1] and answer logits. Raises `InputError` when a
    number is out of range, the scenario and the data sets do not go together, a split has too few
    classes, a class too few images, `out_dir` cannot be written to, or it holds a pool already, or
    one in training: nothing is ever overwritten.
    """
    datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    _check_numbers(
        n_apis=n_apis, n_way=n_way, width=width, resnet_width=resnet_width, epochs=epochs
    )
    if not 0 < holdout < 1:
        raise InputError(f"train_pool: holdout must be between 0 and 1; got {holdout}")
    _check_scenario(scenario, datasets, n_apis)
    for dataset in datasets:
        _check_classes(dataset, n_way)
    folder = Path(out_dir)
    _refuse_trained(folder)
    widths = {"conv4": width, "resnet10": resnet_width, "resnet18": resnet_width}
    planned = [_planned(scenario, i, datasets, n_way, widths) for i in range(n_apis)]
    with torch.device("meta"):
        for entry in {replace(entry, file="") for entry in planned}:
            # a size that an architecture refuses fails here, before anything is written
            entry.build()
    with FolderLock(folder):
        _refuse_trained(folder)  # another process may have trained one since
        check_writable(folder / LIST)
        return _train_all(
            planned, datasets, folder, seed, holdout, epochs, torch.device(device), progress
        )


def _train_all(
    planned: list[PoolEntry],
    datasets: list[Dataset],
    folder: Path,
    seed: int,
    holdout: float,
    epochs: int,
    device: torch.device,
    progress: bool,
) -> Pool:
    n_apis = len(planned)

    stop = (
        threading.Event()
    )  # set when one fails or the user interrupts: the others are not waited for

    def train(i: int) -> PoolEntry:
        dataset = datasets[i % len(datasets)]
        return _train_api(
            planned[i], dataset, folder, (seed, "pool", i), holdout, epochs, device, stop
        )

    threads = torch.get_num_threads()
    workers = min(n_apis, threads) if device.type == "cpu" else 1
    entries: dict[int, PoolEntry] = {}
    executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {executor.submit(train, i): i for i in range(n_apis)}
        with Bar("train the APIs", n_apis, "APIs", progress) as bar:
            for future in as_completed(futures):
                entries[futures[future]] = future.result()
                bar.advance()
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads started later take the number that was set last
    ordered = [entries[i] for i in range(n_apis)]
    write_list(folder, ordered)
    return Pool(folder, tuple(ordered))


def _train_api(
    entry: PoolEntry,
    dataset: Dataset,
    folder: Path,
    names: tuple[int, str, int],
    holdout: float,
    epochs: int,
    device: torch.device,
    stop: threading.Event,
) -> PoolEntry:
    generator = torch_generator(*names)
    candidates = dataset.classes("meta_train")
    order = torch.randperm(len(candidates), generator=generator)[: len(entry.class_names)].tolist()
    classes = [candidates[position] for position in order]
    fit, held_out = _divide(dataset, classes, holdout, generator)
    with seeded(*names, "weights"):
        module = entry.build().to(device)
    images, labels = (part.to(device) for part in fit)
    _fit(module, images, labels, epochs=epochs, generator=generator, stop=stop)
    if entry.architecture != "conv4":  # whose running statistics keep up with its weights
        _settle_batch_norm(module, images)
    accuracy = _accuracy(module, *(part.to(device) for part in held_out))
    write_tensors(folder / entry.file, module.state_dict())
    return replace(
        entry, class_names=tuple(dataset.class_names[index] for index in classes), accuracy=accuracy
    )


def _planned(
    scenario: str, i: int, datasets: list[Dataset], n_way: int, widths: dict[str, int]
) -> PoolEntry:
    """API number i: data sets in turn, and for each of them architectures in turn."""
    turn, position = divmod(i, len(datasets))
    dataset, architectures = datasets[position], ARCHITECTURES[scenario]
    architecture = architectures[turn % len(architectures)]
    return PoolEntry(
        file=f"api_{i:03d}.safetensors",
        architecture=architecture,
        width=widths[architecture],
        image_shape=dataset.image_shape,
        class_names=("",) * n_way,
        data_set=dataset.name,
        inverted=dataset.inverted,
        input_range=(0.0, 1.0),
        scores_kind="logits",
        accuracy=0.0,
    )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 2 if name == "n_way" else 1
        if value < least:
            raise InputError(f"train_pool: {name} must be at least {least}; got {value}")


def _check_scenario(scenario: str, datasets: list[Dataset], n_apis: int) -> None:
    if scenario not in ARCHITECTURES:
        raise InputError(
            f"train_pool: scenario must be one of {', '.join(ARCHITECTURES)}; got {scenario!r}"
        )
    if scenario == "mh" and len(datasets) < 2:
        raise InputError(
            f"train_pool: scenario 'mh' mixes data sets, 2 or more; got {len(datasets)}"
        )
    if scenario != "mh" and len(datasets) != 1:
        raise InputError(
            f"train_pool: scenario {scenario!r} takes one data set; got {len(datasets)}; take 'mh'"
        )
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise InputError(f"train_pool: the data sets must have different names; got {names}")
    if n_apis < len(datasets):
        raise InputError(
            f"train_pool: n_apis must be at least {len(datasets)}, one per data set; got {n_apis}"
        )


def _check_classes(dataset: Dataset, n_way: int) -> None:
    candidates = dataset.classes("meta_train")
    if n_way > len(candidates):
        held = f"meta_train of data set {dataset.name!r} has {len(candidates)} classes"
        raise InputError(f"train_pool: {held}; n_way={n_way} needs more")
    for index in candidates:
        if len(dataset.rows_of(index)) < 2:
            raise InputError(
                f"train_pool: class {dataset.class_names[index]!r} has one image; holding out needs two"
            )


def _refuse_trained(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"train_pool: out_dir {folder} is a file; give a folder")
    if (folder / LIST).exists():
        raise InputError(
            f"train_pool: {folder} holds a trained pool already; load it, or give another folder"
        )
    if any(folder.glob("api_*.safetensors")):
        raise InputError(
            f"train_pool: {folder} holds a pool cut off in training; remove it, or give another folder"
        )


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


class _Stopped(Exception):
    """The training of the whole pool has ended while one API was being trained."""


def _fit(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    stop: threading.Event,
) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
    n_batches = max(1, round(len(images) / _BATCH_SIZE))
    module.train()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third less time on a CPU
    images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in order.tensor_split(
            n_batches
        ):  # near-equal parts: a last batch of one would break batch norm
            if stop.is_set():
                raise _Stopped
            optimizer.zero_grad()
            cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
    module.eval()


@torch.no_grad()
def _settle_batch_norm(module: nn.Module, images: Tensor) -> None:
    """Running statistics anew, of the finished weights over all images that they were learned from.

    Those of a deep network lag behind after few steps (ResNet-18 of width 8, Omniglot, 20 epochs:
    32 % accurate on held-out images as trained, 79 % after this).
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    module.train()
    for part in images.tensor_split(-(-len(images) // 256)):
        module(part)
    module.eval()
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


@torch.inference_mode()
def _accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([module(part).argmax(1) for part in images.split(256)])
    return (predicted == labels).double().mean().item()
