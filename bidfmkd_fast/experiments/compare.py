"""Run `bidfmkd compare`: methods from the same start, on the same pool and the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig, check_seeds
from bidfmkd_fast.experiments.experiment import Experiment
from bidfmkd_fast.experiments.folder import open_folder, pool_of
from bidfmkd_fast.experiments.meta_test import Result, train_and_test
from bidfmkd_fast.experiments.methods import (
    METHODS,
    OURS,
    USES_OUR_SETS,
    check_recovered,
    default_methods,
)
from bidfmkd_fast.experiments.result_files import CSV, TEX, Tested, write_results
from bidfmkd_fast.experiments.sharing import one_lock, share_out
from bidfmkd_fast.experiments.tables import TitledTable, comparison_tables
from bidfmkd_fast.files.atomic import check_writable, make_folder, write_text
from bidfmkd_fast.runtime.machine import machine_text, usable_device
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.runtime.ranks import alone, current
from bidfmkd_fast.training.tables import Table, markdown_table, text_table

REPORT = "comparison.md"


def run_comparison(
    config: ExperimentConfig,
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> str:
    """Train and meta-test every method under every seed, and return the tables.

    Everything is kept in the folder `out`, the tables in `comparison.md`, for other programs in
    `results.csv` and `results.tex`. A second call with the same folder continues a comparison that
    was cut off: no API, method or meta-test that is finished is made twice. A second call may also
    name other methods or seeds, whose results are added. Without `methods` they are those of
    `default_methods`.

    Raises:
        InputError: a method is unknown, or none is named; a method needs recovered sets and the
            settings recover none; the data sets have too few classes or images for the settings
            (found before anything is trained); or `out` holds another experiment, is in use, or
            cannot be written to.
    """
    chosen = _chosen(default_methods(config.train) if methods is None else methods, config)
    check_seeds("compare", seeds)
    usable_device("compare", device)
    with one_lock(out):
        datasets = config.check()
        folder = Path(out)
        current().first_alone(lambda: _open(folder, config))
        return _compare_in(folder, config, datasets, chosen, seeds, device, progress)


def _open(folder: Path, config: ExperimentConfig) -> None:
    """Open the folder, and check that the report can be written there."""
    open_folder(folder, config)
    check_writable(folder / REPORT, folder / CSV, folder / TEX)


def _chosen(methods: Sequence[str], config: ExperimentConfig) -> list[str]:
    """Return the methods in the order of the table."""
    if not methods:
        raise InputError(f"compare: methods must be one or more of {', '.join(METHODS)}; got none")
    for method in methods:
        if method not in METHODS:
            raise InputError(f"compare: methods must be among {', '.join(METHODS)}; got {method!r}")
    check_recovered("compare", methods, config.train)
    for method in USES_OUR_SETS.intersection(methods):
        if OURS not in methods:
            raise InputError(
                f"compare: {method!r} distils the sets that {OURS!r} recovers; "
                f"add {OURS} to the methods"
            )
    return [method for method in METHODS if method in methods]


def _compare_in(
    folder: Path,
    config: ExperimentConfig,
    datasets: Sequence[Dataset],
    chosen: Sequence[str],
    seeds: Sequence[int],
    device: torch.device | str,
    progress: bool,
) -> str:
    """Share pools and methods out over the ranks; return the tables in rank 0, "" elsewhere."""
    progress = progress and current().first

    def experiment_of(seed: int) -> Experiment:
        pool = pool_of(folder, config.pool, datasets, seed, progress)
        at = folder / f"seed_{seed}"
        make_folder(at)
        return Experiment(pool, datasets, config.with_seed(seed), at / OURS, device, progress)

    def test(method: str, seed: int) -> Result:
        return train_and_test(method, experiment_of(seed), folder / f"seed_{seed}" / method)

    share_out("compare: pools", [partial(experiment_of, seed) for seed in seeds], progress)
    for last in (False, True):
        methods = [method for method in chosen if (method in USES_OUR_SETS) == last]
        parts = [partial(test, method, seed) for seed in seeds for method in methods]
        share_out("compare: methods", parts, progress)
    if not current().first:
        return ""
    results: dict[str, list[Result]] = {method: [] for method in chosen}
    accuracies: list[float] = []
    in_order = sorted(chosen, key=lambda method: method in USES_OUR_SETS)  # those come last
    with alone():  # where several ranks have made the parts, they are read here
        for seed in seeds:
            experiment = experiment_of(seed)
            accuracies.append(experiment.pool.accuracy)
            with Bar(f"compare, seed {seed}", len(in_order), "methods", progress) as bar:
                for method in bar.over(in_order):
                    results[method].append(test(method, seed))
    data_sets, scenario = ", ".join(config.pool.data_sets), config.pool.scenario
    title = (
        f"{len(experiment.pool.entries)} APIs, {data_sets}, scenario {scenario}; "
        f"{100 * sum(accuracies) / len(accuracies):.1f} % accurate on held-out images of their own "
        "classes"
    )
    head = (
        f"# Comparison\n\n{title}.\n\nseeds {', '.join(map(str, seeds))}; {machine_text(device)}.\n"
    )
    tables = list(comparison_tables(results, seeds))
    write_text(folder / REPORT, "\n\n".join([head, *_drawn(tables, markdown_table)]) + "\n")
    tested = [Tested(METHODS[name][0], name, config, results[name]) for name in chosen]
    write_results(folder, tested, tables, seeds, device)
    return "\n\n".join([title, *_drawn(tables, text_table)])


def _drawn(tables: Sequence[TitledTable], draw: Callable[[Table], str]) -> list[str]:
    """Return each table under its title; a title without rows stands alone."""
    return [f"{title}\n\n{draw(rows)}" if rows else title for title, rows in tables]
