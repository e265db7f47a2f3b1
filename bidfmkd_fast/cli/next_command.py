"""The next command, which the last line of a command names; whatever it says runs as it is printed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.data import Dataset, load_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.files.yaml_files import dump_yaml, read_mapping, shortly
from bidfmkd_fast.secrets import scrubbed

# in the folders of runs and pools: the pool, and where the images behind it come from
SOURCE = "source.yaml"
N_WAY, N_SHOTS, N_QUERY = 5, (1, 5), 15  # what `evaluate` takes unless told
_SIDES = 4  # height and width of images are multiples of it


def source_of(folder: Path) -> dict[str, Any]:
    """Read what `SOURCE` says in a folder; nothing where it is not there. Raises InputError for a
    damaged one.
    """
    file = folder / SOURCE
    return read_mapping(file, "source") if file.is_file() else {}


def write_source(folder: Path, source: dict[str, Any]) -> None:
    """Write what `source_of` reads."""
    write_exact(folder / SOURCE, dump_yaml(scrubbed(source)))


def files_of(datasets: Sequence[Dataset], given: Sequence[str]) -> dict[str, str]:
    """Return the files, by the names of their data sets, that `--dataset` has given as paths."""
    return {
        dataset.name: str(Path(path).expanduser().resolve())
        for dataset, path in zip(datasets, given, strict=True)
        if path.endswith(".npz")
    }


def datasets_of(source: dict[str, Any]) -> list[Dataset]:
    """Load the data sets that a run's source names. Raises InputError as `load_dataset`, and for a
    damaged source.
    """
    known = source.get("data_sets", [])
    if not isinstance(known, list) or not all(
        isinstance(one, dict) and {"name", "inverted"} <= set(one) for one in known
    ):
        raise InputError(
            f"source: data_sets must list mappings with name and inverted; got {shortly(known)}"
        )
    return [load_dataset(one.get("file", one["name"]), invert=one["inverted"]) for one in known]


def after_convert(dataset: Dataset, path: Path) -> str:
    """Return the lines after a conversion: a pool trained on the data set, if one can be."""
    classes = dataset.classes("meta_train")
    single = [dataset.class_names[index] for index in classes if len(dataset.rows_of(index)) < 2]
    _, height, width = dataset.image_shape
    if height % _SIDES or width % _SIDES or min(height, width) < 16:
        return (
            f"no pool can be trained on images of {height} x {width}: give --size, a multiple of {_SIDES} from 16 on, "
            "and another --out"
        )
    if len(classes) < 2 or single:
        reason = (
            f"{single[0]!r} has one image" if single else f"meta_train has {len(classes)} class"
        )
        return f"no pool can be trained on it: {reason}, and an API wants two classes of two images at least"
    n_way = [] if len(classes) >= N_WAY else ["--n-way", str(len(classes))]
    return "next: " + shlex.join(["bidfmkd", "pool", "--dataset", str(path), *n_way])


def after_pool(folder: Path) -> str:
    """Return the line after a pool was trained: what a run on it would ask, before it is asked."""
    return "next: " + shlex.join(["bidfmkd", "train", "--pool", str(folder), "--dry-run"])


def after_run(folder: Path) -> str:
    """Return the lines after a run: its meta-test where its source has images for one, else what
    that would need.
    """
    try:
        datasets, wanted = datasets_of(source_of(folder)), "data set unknown"
    except InputError as error:
        datasets, wanted = [], str(error)
    options = _evaluation(folder, datasets) if datasets else None
    if options is not None:
        return "next: " + shlex.join(["bidfmkd", "evaluate", "--run", str(folder), *options])
    evaluate = shlex.join(["bidfmkd", "evaluate", "--run", str(folder), "--dataset"])
    return (
        f"to meta-test the run, give images of unseen classes ({wanted}): {evaluate} FILE.npz\n"
        f"next: {shlex.join(['bidfmkd', 'status', str(folder)])}"
    )


def _evaluation(folder: Path, datasets: Sequence[Dataset]) -> list[str] | None:
    """Return the options with which `evaluate` can judge a run on these data sets; None if there
    are none.
    """
    from bidfmkd_fast.models import AnySizeConv4, model_arguments
    from bidfmkd_fast.training.run_folder import RunFolder

    module = RunFolder(folder).meta_model().module
    known = model_arguments(module) or {}
    shape = (known.get("in_channels"), *known.get("image_size", ()))
    if not isinstance(module, AnySizeConv4) and any(
        dataset.image_shape != shape for dataset in datasets
    ):
        return None
    unseen = [
        [len(dataset.rows_of(index)) for index in dataset.classes("meta_test")]
        for dataset in datasets
    ]
    n_way = min(known["n_classes"], *map(len, unseen))
    fewest = min((count for counts in unseen for count in counts), default=0)
    n_shots = [n_shot for n_shot in N_SHOTS if n_shot < fewest]
    if n_way < 2 or not n_shots:
        return None
    n_query = min(N_QUERY, fewest - max(n_shots))
    options = [] if n_way == N_WAY else ["--n-way", str(n_way)]
    options += [] if tuple(n_shots) == N_SHOTS else ["--n-shot", *map(str, n_shots)]
    return options + ([] if n_query == N_QUERY else ["--n-query", str(n_query)])
