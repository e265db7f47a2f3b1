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
        seeds: the first seed, and the others under which the same methods were meta-tested.
        results: by method, in the order of the tables, one per seed.
        folders: by method, the folder under the first seed.
    """

    config: ExperimentConfig
    seeds: list[int]
    results: dict[str, list[Result]]
    folders: dict[str, Path]


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
            f"report: {folder} is a sweep, whose table and plot are sweep.md and sweep.png; give "
            "the folder of a cell in cells/, or of a run or a comparison"
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
            f"report: no method of the comparison {folder} is finished; the same `bidfmkd compare` "
            "command goes on with it"
        )
    methods = tested[begun[0]]
    seeds = [seed for seed in begun if tested[seed].keys() >= methods.keys()]
    results = {method: [_result(tested[seed][method]) for seed in seeds] for method in methods}
    config = settings_from_yaml(ExperimentConfig, folder / EXPERIMENT)
    return FinishedComparison(config, seeds, results, methods)


def _result(folder: Path) -> Result:
    summary = RunFolder(folder).summary()
    seconds = sum(summary["seconds"].values())
    return Result(kept_meta_tests(folder), summary["queries"], seconds)
