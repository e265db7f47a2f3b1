"""Read what a comparison has finished so far; nothing is trained, tested or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.folder import EXPERIMENT
from bidfmkd_fast.experiments.meta_test import EVALUATION, Result, kept_meta_tests
from bidfmkd_fast.experiments.methods import METHODS
from bidfmkd_fast.settings import settings_from_yaml
from bidfmkd_fast.training.run_folder import RunFolder


@dataclass(frozen=True, eq=False)
class FinishedComparison:
    """The finished part of a comparison.

    Attributes:
        config: its settings.
        seeds: those under which as many methods were meta-tested as under any.
        results: by method, in the order of the tables, one per seed.
        folders: by method, the folder under the first of these seeds.
        left_out: a sentence for each other seed.
    """

    config: ExperimentConfig
    seeds: list[int]
    results: dict[str, list[Result]]
    folders: dict[str, Path]
    left_out: list[str]


def is_experiment(folder: Path) -> bool:
    """Return True for a folder that `compare` or `sweep` has written."""
    return (folder / EXPERIMENT).is_file()


def read_finished(folder: Path) -> FinishedComparison:
    """Read the results in the folder of a comparison.

    Raises:
        InputError: the folder is that of a sweep, or nothing is finished in it, or a file is
            damaged.
    """
    if (folder / "cells").is_dir():
        raise InputError(
            f"report: {folder} is a sweep, whose table and plot are sweep.md and sweep.png; give a "
            "run in cells/NAME/seed_NUMBER, or a comparison"
        )
    tested = {
        int(at.name.removeprefix("seed_")): {
            method: at / method for method in METHODS if (at / method / EVALUATION).is_file()
        }
        for at in folder.glob("seed_*")
        if at.name.removeprefix("seed_").isdecimal()
    }
    begun = sorted(seed for seed, methods in tested.items() if methods)
    if not begun:
        raise InputError(
            f"report: no method of {folder} is finished; the same `bidfmkd compare` or `bidfmkd "
            "sweep` command goes on with it"
        )
    fullest = max(begun, key=lambda seed: len(tested[seed]))  # the first of those
    methods = tested[fullest]
    seeds = [seed for seed in begun if tested[seed].keys() >= methods.keys()]
    left_out = [
        f"Left out: seed {seed}, not finished are "
        f"{', '.join(method for method in methods if method not in tested[seed])}."
        for seed in begun
        if seed not in seeds
    ]
    results = {
        method: [_result(tested[seed][method]) for seed in seeds]
        for method in METHODS
        if method in methods
    }
    config = settings_from_yaml(ExperimentConfig, folder / EXPERIMENT)
    return FinishedComparison(config, seeds, results, tested[seeds[0]], left_out)


def _result(folder: Path) -> Result:
    summary = RunFolder(folder).summary()
    seconds = sum(summary["seconds"].values())
    return Result(kept_meta_tests(folder), summary["queries"], seconds)
