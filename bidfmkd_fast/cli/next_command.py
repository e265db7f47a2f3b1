"""Compose the last line of a finished command: the next command, which runs as it is printed.

A command never suggests a command that would fail. So that this can be checked, runs and pools keep
in `source.yaml` which images they came from.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.data import Dataset, load_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.extras import installed
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.files.yaml_files import dump_yaml, read_mapping, shortly
from bidfmkd_fast.secrets import scrubbed

SOURCE = "source.yaml"  # in the folder of a run or pool: the pool, and the images behind it
N_WAY, N_SHOTS, N_QUERY = 5, (1, 5), 15  # the defaults of `evaluate`
_SIDES = 4  # height and width of an API's images must be multiples of this
_SMALLEST_SIDE = 16


def source_of(folder: Path) -> dict[str, Any]:
    """Return what `source.yaml` in a folder says; an empty mapping if there is none.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / SOURCE
    return read_mapping(file, "source") if file.is_file() else {}


def write_source(folder: Path, source: dict[str, Any]) -> None:
    """Write the file that `source_of` reads."""
    write_exact(folder / SOURCE, dump_yaml(scrubbed(source)))


def files_of(datasets: Sequence[Dataset], given: Sequence[str]) -> dict[str, str]:
    """Return the paths among the values of `--dataset`, by the names of their data sets."""
    return {
        dataset.name: str(Path(path).expanduser().resolve())
        for dataset, path in zip(datasets, given, strict=True)
        if path.endswith(".npz")
    }


def learned_inverted(source: dict[str, Any]) -> bool:
    """Return True if a run learned from inverted images in all the data sets of its source.

    Raises:
        InputError: the source is damaged.
    """
    known = known_data_sets(source)
    return bool(known) and all(entry["inverted"] is True for entry in known)


def datasets_of(source: dict[str, Any]) -> list[Dataset]:
    """Load the data sets that a run's source names.

    Raises:
        InputError: the source is damaged, or a data set cannot be loaded.
    """
    return [
        load_dataset(entry.get("file", entry["name"]), invert=entry["inverted"])
        for entry in known_data_sets(source)
    ]


def known_data_sets(source: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a run's source about its data sets; none if it has none.

    Raises:
        InputError: the source is damaged.
    """
    known = source.get("data_sets", [])
    if not isinstance(known, list) or not all(
        isinstance(entry, dict) and {"name", "inverted"} <= set(entry) for entry in known
    ):
        raise InputError(
            f"source: data_sets must list mappings with name and inverted; got {shortly(known)}"
        )
    return known


def after_convert(dataset: Dataset, path: Path) -> str:
    """Return the line after a conversion: how to train a pool on it, or why that is impossible."""
    classes = dataset.classes("meta_train")
    single = [dataset.class_names[index] for index in classes if len(dataset.rows_of(index)) < 2]
    _, height, width = dataset.image_shape
    if height % _SIDES or width % _SIDES or min(height, width) < _SMALLEST_SIDE:
        return (
            f"no pool can be trained on images of {height} x {width}: convert again with --size, "
            f"a multiple of {_SIDES} of at least {_SMALLEST_SIDE}, and another --out"
        )
    if len(classes) < 2 or single:
        reason = (
            f"{single[0]!r} has one image" if single else f"meta_train has {len(classes)} class"
        )
        return (
            f"no pool can be trained on it: {reason}, "
            "and an API needs at least two classes of two images each"
        )
    n_way = [] if len(classes) >= N_WAY else ["--n-way", str(len(classes))]
    return "next: " + shlex.join(["bidfmkd", "pool", "--dataset", str(path), *n_way])


def after_pool(folder: Path) -> str:
    """Return the line after a pool was trained: the command that tells what a run would ask."""
    return "next: " + shlex.join(["bidfmkd", "train", "--pool", str(folder), "--dry-run"])


def after_run(folder: Path) -> str:
    """Return the lines after a run: how to meta-test it, or what a meta-test still needs."""
    try:
        datasets = datasets_of(source_of(folder))
        if not datasets:
            raise InputError("data set unknown")
        options = _evaluation(folder, datasets)
        return "next: " + shlex.join(["bidfmkd", "evaluate", "--run", str(folder), *options])
    except InputError as error:
        reason = str(error)
    evaluate = shlex.join(["bidfmkd", "evaluate", "--run", str(folder), "--dataset"])
    return (
        f"to meta-test the run, give images of unseen classes ({reason}): {evaluate} FILE.npz\n"
        f"next: {shlex.join(['bidfmkd', 'status', str(folder)])}"
    )


def after_report(folder: Path) -> str:
    """Return the lines for the page of a run: how to go on with an unfinished run, or as
    `after_run`; a run that was evaluated has no next command.
    """
    from bidfmkd_fast.training.comparison import ACCURACY
    from bidfmkd_fast.training.run_folder import META_MODEL

    if not (folder / META_MODEL).is_file():
        status = shlex.join(["bidfmkd", "status", str(folder)])
        return (
            "the run has not finished; the same `bidfmkd train` command goes on with it\n"
            f"next: {status}"
        )
    if (folder / ACCURACY).is_file():
        adapt = shlex.join(["bidfmkd", "adapt", "--run", str(folder)])
        return f"to learn new classes: {adapt} --pictures FOLDER --out CLASSIFIER.safetensors"
    return after_run(folder)


def after_adapt(classifier: Path, pictures: Path) -> str:
    """Return the line after an adaptation: how to classify pictures, here those of the support."""
    return "next: " + shlex.join(["bidfmkd", "predict", str(classifier), str(pictures)])


def after_predict(classifier: Path) -> str:
    """Return the line after pictures were classified: how to export the classifier.

    It is empty where that command would fail, since a package is missing, the file exists already,
    or its folder cannot be written to.
    """
    out = classifier.with_suffix(".onnx")
    if not installed("export") or out.exists() or not os.access(out.parent, os.W_OK):
        return ""
    return "next: " + shlex.join(["bidfmkd", "export", str(classifier), "--onnx", str(out)])


def _evaluation(folder: Path, datasets: Sequence[Dataset]) -> list[str]:
    """Return the options that `evaluate` needs on these data sets.

    Raises:
        InputError: no options make it work, since the images have another shape than the
            meta-model takes, or meta_test has too few classes or images for an episode.
    """
    from bidfmkd_fast.models import AnySizeConv4, model_arguments
    from bidfmkd_fast.training.run_folder import RunFolder

    module = RunFolder(folder).meta_model().module
    known = model_arguments(module) or {}
    shape = (known.get("in_channels"), *known.get("image_size", ()))
    unseen = []
    for dataset in datasets:
        if not isinstance(module, AnySizeConv4) and dataset.image_shape != shape:
            raise InputError(
                f"those of {dataset.name} have another size or colour than the model takes"
            )
        counts = [len(dataset.rows_of(index)) for index in dataset.classes("meta_test")]
        if len(counts) < 2 or min(counts) < 2:
            raise InputError(f"meta_test of {dataset.name} lacks two classes of two images each")
        unseen.append(counts)
    n_way = min(known["n_classes"], *map(len, unseen))
    fewest = min(map(min, unseen))
    n_shots = [n_shot for n_shot in N_SHOTS if n_shot < fewest]
    n_query = min(N_QUERY, fewest - max(n_shots))
    options = [] if n_way == N_WAY else ["--n-way", str(n_way)]
    options += [] if tuple(n_shots) == N_SHOTS else ["--n-shot", *map(str, n_shots)]
    return options + ([] if n_query == N_QUERY else ["--n-query", str(n_query)])
