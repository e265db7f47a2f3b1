"""Train the classifiers of a pool.

They share one data set and architecture (API-SS), or mix architectures (API-SH), or both (API-MH).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.pools.classifier_fit import (
    fit_classifier,
    held_out_accuracy,
    settle_batch_norm,
)
from bidfmkd_fast.pools.pool import LIST, Pool, PoolEntry, write_list
from bidfmkd_fast.pools.unfinished import (
    begin,
    check_unfinished,
    end,
    keep_trained,
    trained_accuracy,
)
from bidfmkd_fast.runtime.machine import usable_device
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import seeded, torch_generator
from bidfmkd_fast.settings import MOST_WIDTH

_MOST_APIS = 100_000  # a thousand times the paper's
_MIXED = ("conv4", "resnet10", "resnet18")
ARCHITECTURES = {"ss": ("conv4",), "sh": _MIXED, "mh": _MIXED}


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
    filters); "sh" is one data set, with Conv4, ResNet-10 and ResNet-18 (first stage of
    `resnet_width` channels) in turn; "mh" is several data sets in turn, with all architectures on
    each.

    Each API learns its own random `n_way` classes of its data set's meta-train split, with Adam in
    mini-batches of about 32 for `epochs` passes. The share `holdout` of the images of each class is
    kept back to measure the accuracy. The APIs take images in [0, 1] and answer logits. API number
    i depends only on the arguments, the seed and i.

    A pool that was cut off is continued by the same call: no API that is trained is trained again.

    On a CPU as many APIs train at once as torch has threads, each on one thread. Training several
    APIs in one grouped network was measured to be no faster there.

    Raises:
        InputError: a number is out of range, the scenario does not go with the data sets, a split
            has too few classes, a class has too few images, `out_dir` cannot be written to, or it
            holds a pool that is finished, in training, or cut off with other settings. Nothing is
            ever overwritten.
    """
    datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    check_integer("train_pool", "n_way", n_way, 2)
    check_integer("train_pool", "n_apis", n_apis, 1, _MOST_APIS)
    for name, value in (("width", width), ("resnet_width", resnet_width)):
        check_integer("train_pool", name, value, 1, MOST_WIDTH)
    check_integer("train_pool", "epochs", epochs, 1)
    if not 0 < holdout < 1:
        raise InputError(f"train_pool: holdout must be between 0 and 1; got {holdout}")
    _check_scenario(scenario, datasets, n_apis)
    for dataset in datasets:
        _check_classes(dataset, n_way)
    folder = Path(out_dir)
    device = usable_device("train_pool", device)
    settings = {
        "scenario": scenario,
        "n_apis": int(n_apis),
        "n_way": int(n_way),
        "width": int(width),
        "resnet_width": int(resnet_width),
        "epochs": int(epochs),
        "seed": int(seed),
        "holdout": float(holdout),
        "data_sets": [_digest(dataset) for dataset in datasets],
    }
    _refuse_trained(folder, settings)
    widths = {"conv4": width, "resnet10": resnet_width, "resnet18": resnet_width}
    planned = [_planned(scenario, i, datasets, n_way, widths) for i in range(n_apis)]
    with torch.device("meta"):
        for entry in {replace(entry, file="") for entry in planned}:
            # An image size that an architecture refuses fails here, before anything is written.
            entry.build()
    with FolderLock(folder):
        # Another process may have trained a pool here since the last check.
        _refuse_trained(folder, settings)
        check_writable(folder / LIST)
        begin(folder, settings)
        try:
            return _train_all(planned, datasets, folder, seed, holdout, epochs, device, progress)
        finally:
            end(folder)


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
    """Train the planned APIs in threads and write `pool.yaml` last."""
    n_apis = len(planned)
    stop = threading.Event()  # set when one API fails or the user interrupts: the others give up

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
        torch.set_num_threads(threads)  # torch gives new threads the number set last
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
    """Train one API and write its weights; return its entry with classes and accuracy filled in.

    `names` are the seed and the names from which its random numbers are derived.
    """
    generator = torch_generator(*names)
    candidates = dataset.classes("meta_train")
    order = torch.randperm(len(candidates), generator=generator)[: len(entry.class_names)].tolist()
    classes = [candidates[position] for position in order]
    named = replace(entry, class_names=tuple(dataset.class_names[index] for index in classes))
    if (accuracy := trained_accuracy(folder / entry.file)) is not None:
        return replace(named, accuracy=accuracy)
    fit, held_out = _divide(dataset, classes, holdout, generator)
    with seeded(*names, "weights"):
        module = entry.build().to(device)
    images, labels = (part.to(device) for part in fit)
    fit_classifier(module, images, labels, epochs=epochs, generator=generator, stop=stop)
    if entry.architecture != "conv4":  # a shallow Conv4's running statistics keep up by themselves
        settle_batch_norm(module, images)
    accuracy = held_out_accuracy(module, *(part.to(device) for part in held_out))
    keep_trained(folder / entry.file, module.state_dict(), accuracy)
    return replace(named, accuracy=accuracy)


def _planned(
    scenario: str, i: int, datasets: list[Dataset], n_way: int, widths: dict[str, int]
) -> PoolEntry:
    """Return the entry of API number i before its training.

    Data sets take turns, and for each data set the architectures take turns.
    """
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
            f"train_pool: scenario {scenario!r} takes one data set; got {len(datasets)}; "
            "for several, use 'mh'"
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
                f"train_pool: class {dataset.class_names[index]!r} has one image; "
                "at least two are needed, because some are held out"
            )


def _refuse_trained(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError unless a pool of `settings` may be trained, or continued, in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"train_pool: out_dir {folder} is a file; give a folder")
    if (folder / LIST).exists():
        raise InputError(
            f"train_pool: {folder} holds a trained pool already; load it, or give another folder"
        )
    check_unfinished(folder, settings)


def _digest(dataset: Dataset) -> str:
    """Return the name of a data set, and a checksum of its images and labels."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (dataset.images, dataset.labels):
        digest.update(f"{list(part.shape)} {dataset.inverted}".encode())
        digest.update(part.contiguous().numpy().data)
    return f"{dataset.name} {digest.hexdigest()}"


def _divide(
    dataset: Dataset, classes: list[int], holdout: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Divide the images of the classes into those to learn from and those held out, with labels.

    Each class gets at least one image of either kind.
    """
    fit, held_out = [], []
    for class_index in classes:
        rows = dataset.rows_of(class_index)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n_held = min(max(1, round(holdout * len(rows))), len(rows) - 1)
        held_out.append(rows[:n_held])
        fit.append(rows[n_held:])
    return _together(dataset, fit), _together(dataset, held_out)


def _together(dataset: Dataset, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    labels = [torch.full((len(of_class),), label) for label, of_class in enumerate(rows)]
    return dataset.take(torch.cat(rows)), torch.cat(labels)
