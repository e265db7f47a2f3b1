"""`bidfmkd sweep`: BiDf-MKD over a grid of settings, cell by cell, in one table and one plot."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.experiments.compare import Result, difference_text, learn_and_judge, rates_text
from bidfmkd_fast.experiments.config import ExperimentConfig, merged, open_folder, pool_of
from bidfmkd_fast.experiments.methods import Contest
from bidfmkd_fast.experiments.sweep_plot import need_matplotlib, plot_sweep
from bidfmkd_fast.files.atomic import check_writable, write_text
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.files.yaml_files import read_mapping
from bidfmkd_fast.meta import Evaluation
from bidfmkd_fast.runtime.machine import machine_text
from bidfmkd_fast.settings import closest, dotted_keys, named, plain_values, settings_from_values
from bidfmkd_fast.training.tables import Table, markdown_table, text_table

TABLE, PLOT = "sweep.md", "sweep.png"
_KEYS = ("experiment", "variants", "grid")
_SHARED = (
    "evaluation",
    "pool.data_sets",
    "pool.inverted",
    "pool.n_way",
)  # else the episodes would differ


@dataclass(frozen=True)
class Cell:
    """One point of the grid: its `name`, what it changes (dotted keys), its settings, and its
    place in the plot.
    """

    name: str
    variant: str
    point: Mapping[str, Any]
    changes: Mapping[str, Any]
    config: ExperimentConfig

    @property
    def folder_name(self) -> str:
        """The name, as far as it serves as a file's, and a digest of what the cell changes."""
        digest = hashlib.blake2b(
            repr(sorted(self.changes.items())).encode(), digest_size=4
        ).hexdigest()
        return f"{re.sub('[^0-9A-Za-z.=-]+', '_', self.name)[:60]}_{digest}"


@dataclass(frozen=True)
class Sweep:
    """The settings that the cells share, and the cells, of which the first is what the others are
    compared with.
    """

    base: ExperimentConfig
    cells: tuple[Cell, ...]


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file: `experiment`, a file of `configs/` relative to this one;
    `variants`, named sets of dotted keys and values; `grid`, dotted keys with lists of values. The
    cells are all variants at all grid points.

    Raises InputError for a file that is missing or not of this form, unknown settings or values out
    of range.
    """
    file = Path(path)
    content = read_mapping(file, "sweep")
    if unknown := [str(key) for key in content if key not in _KEYS]:
        raise InputError(
            f"sweep: {file}: wanted the keys {', '.join(_KEYS)}; got {', '.join(unknown)}"
        )
    if not isinstance(content.get("experiment"), str):
        raise InputError(f"sweep: {file} must name a file of settings under 'experiment'; got none")
    base = read_mapping(file.parent / content["experiment"], "sweep")
    with named(f"sweep: {file.parent / content['experiment']}"):
        config = settings_from_values(ExperimentConfig, base)
    variants, grid = content.get("variants") or {"": {}}, content.get("grid") or {}
    for name, its in (("variants", variants), ("grid", grid)):
        if not isinstance(its, dict):
            raise InputTypeError(f"sweep: {file}: {name} must be settings by name; got {its!r}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputTypeError(
                f"sweep: {file}: grid must give a list of values for {key}; got {values!r}"
            )
    cells = []
    for variant, changes in variants.items():
        if not isinstance(changes, dict):
            raise InputTypeError(
                f"sweep: {file}: variant {variant!r} must be dotted keys and values; got {changes!r}"
            )
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values))
            with named(f"sweep: {file}"):
                cells.append(_cell(base, str(variant), changes, point))
    if len({cell.folder_name for cell in cells}) < len(cells):
        raise InputError(f"sweep: {file} has the same cell twice")
    return Sweep(config, tuple(cells))


def run_sweep(
    path: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> str:
    """Train and judge every cell under every seed in the folder `out`; the table, also in
    `sweep.md` with `sweep.png`.

    A sweep that was cut off goes on with the cell it was in; one whose file has grown keeps what it
    has. Raises InputError as `read_sweep`, before anything is trained, and for a folder of another
    experiment, of one that is under way, or that cannot be written to.
    """
    need_matplotlib()
    sweep = read_sweep(path)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"sweep: seeds must be one or more different numbers; got {list(seeds)}")
    with FolderLock(out):
        datasets = sweep.base.check()
        folder = open_folder(out, plain_values(sweep.base.with_seed(0)))
        check_writable(folder / TABLE, folder / PLOT)
        return _sweep_in(folder, Path(path).name, sweep, datasets, seeds, device, progress)


def _sweep_in(
    folder: Path,
    name: str,
    sweep: Sweep,
    datasets: Sequence[Dataset],
    seeds: Sequence[int],
    device: torch.device | str,
    progress: bool,
) -> str:
    results: list[list[Result]] = []
    for number, cell in enumerate(sweep.cells):
        results.append([])
        for seed in seeds:
            if progress:
                print(
                    f"cell {number + 1} of {len(sweep.cells)}: {cell.name}, seed {seed}", flush=True
                )
            config = cell.config.with_seed(seed)
            pool = pool_of(folder, config.pool, datasets, seed, progress)
            at = folder / "cells" / cell.folder_name / f"seed_{seed}"
            contest = Contest(pool, datasets, config, at, device, progress)
            results[-1].append(learn_and_judge("bidf_mkd", contest, at))
    told = list(_tables(sweep, results, seeds))
    plot_sweep(sweep.cells, [_by_data_set(its) for its in results], folder / PLOT)
    head = f"# Sweep `{name}`\n\nseeds {', '.join(map(str, seeds))}; {machine_text(device)}.\n"
    report = [
        head,
        *(f"{title}\n\n{markdown_table(rows)}" for title, rows in told),
        "![sweep](sweep.png)",
    ]
    write_text(folder / TABLE, "\n\n".join(report) + "\n")
    return "\n\n".join(
        [*(f"{title}\n\n{text_table(rows)}" for title, rows in told), f"plot: {folder / PLOT}"]
    )


def _tables(
    sweep: Sweep, results: Sequence[Sequence[Result]], seeds: Sequence[int]
) -> Iterator[tuple[str, Table]]:
    by_cell = [_by_data_set(its) for its in results]
    first = results[0][0].judged
    for data_set, reference in by_cell[0].items():
        at = [position for position, one in enumerate(first) if one.evaluation.dataset == data_set]
        shots = [f"{evaluation.n_shot}-shot" for evaluation in reference]
        rows: Table = [
            [
                "cell",
                *shots,
                *(f"{shot} less the first" for shot in shots),
                "queries",
                "seconds",
                "adapt lr",
            ]
        ]
        for number, (cell, its) in enumerate(zip(sweep.cells, by_cell)):
            evaluations = its[data_set]
            rows.append(
                [
                    cell.name,
                    *(f"{100 * e.mean:.2f} ± {100 * e.ci95:.2f}" for e in evaluations),
                    *(
                        difference_text(e, r) if number else ""
                        for e, r in zip(evaluations, reference)
                    ),
                    f"{sum(result.queries for result in results[number]) // len(seeds):,}",
                    f"{sum(result.seconds for result in results[number]) / len(seeds):,.0f}",
                    rates_text(results[number], at),
                ]
            )
        one = reference[0]
        title = (
            f"{one.n_way}-way accuracy in %, 95 % CI, {len(one.per_episode)} episodes of unseen classes ({data_set} "
            f"{one.split}) over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; differences paired by episode"
        )
        yield title, rows


def _by_data_set(results: Sequence[Result]) -> dict[str, list[Evaluation]]:
    """Of each data set one evaluation per number of shots, over all seeds."""
    told: dict[str, list[Evaluation]] = {}
    for position, one in enumerate(results[0].judged):
        evaluation = merged([result.judged[position].evaluation for result in results])
        told.setdefault(one.evaluation.dataset, []).append(evaluation)
    return told


def _cell(
    base: Mapping[str, Any], variant: str, changes: Mapping[str, Any], point: Mapping[str, Any]
) -> Cell:
    every = {**changes, **point}
    values, known = _copied(base), dotted_keys(ExperimentConfig)
    for key, value in every.items():
        if str(key).split(".")[0] not in known:
            raise InputError(f"unknown key {key!r}; {closest(str(key), known)}")
        if any(key == shared or str(key).startswith(f"{shared}.") for shared in _SHARED):
            raise InputError(
                f"{key} must be the same for all cells, or their episodes would differ; got {value}"
            )
        *where, last = str(key).split(".")
        inside = values
        for name in where:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise InputError(f"there are no settings under {name!r} in {key!r}")
        inside[last] = value
    told = ", ".join(
        [
            *([variant] if variant else []),
            *(f"{key.split('.')[-1]}={value}" for key, value in point.items()),
        ]
    )
    return Cell(
        told or "as it is", variant, point, every, settings_from_values(ExperimentConfig, values)
    )


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, dict) else value for key, value in values.items()
    }
