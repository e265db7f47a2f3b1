"""Meta-test finished runs on the same episodes, and compare those of one side with the other's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from bidfmkd_fast.data import Dataset, EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.differences import difference_cells, difference_header
from bidfmkd_fast.experiments.meta_test import over_seeds
from bidfmkd_fast.meta import Evaluation, MetaModel
from bidfmkd_fast.meta.model_images import module_shape
from bidfmkd_fast.settings import differing_keys
from bidfmkd_fast.training.comparison import compare
from bidfmkd_fast.training.run_folder import RunFolder
from bidfmkd_fast.training.tables import Table, text_table

_ONE_SEED = (
    "One training seed each proves nothing: the interval is over episodes, and runs differ by more."
    "\nGive several runs a side (--a RUN RUN RUN --b RUN RUN RUN) for an interval over seeds."
)


def compare_runs(
    a: Sequence[str | Path],
    b: Sequence[str | Path],
    datasets: Sequence[Dataset],
    *,
    adapt_lr: float | None = None,
    **options: Any,
) -> str:
    """Meta-test the runs of two sides on the same episodes, and return the tables.

    The runs of a side have the same settings under different seeds. Run i of side A is paired with
    run i of side B.

    Args:
        a, b: the folders of finished runs, as many on one side as on the other.
        datasets: where the episodes come from.
        adapt_lr: learning rate of the adaptation of all runs; each has that of its settings if
            None.
        options: what `training.comparison.compare` takes: `n_shots`, `n_way`, `n_query`,
            `n_episodes`, `split`, `seed`, `progress`.

    Raises:
        InputError: a folder holds no finished run; a side has no run, or has other settings from
            run to run, or a seed twice; the sides differ in their number of runs or in the shape of
            their images; or the data sets do not fit. All is found before the first episode.
    """
    sides = {"A": [RunFolder.open(run) for run in a], "B": [RunFolder.open(run) for run in b]}
    if not a or len(a) != len(b):
        raise InputError(
            "compare-runs: give as many runs on one side as on the other, one or more; "
            f"got {len(a)} and {len(b)}"
        )
    for side in sides.values():
        _check_side(side)
    models = {
        f"{name}: {run.path}": run.meta_model() for name, side in sides.items() for run in side
    }
    _check_shapes(models)
    for dataset in datasets:
        EpisodeSampler(
            dataset,
            options["split"],
            options["n_way"],
            max(options["n_shots"]),
            options["n_query"],
            options["seed"],
        )
    if adapt_lr is not None:
        models = {
            name: MetaModel(
                model.module, adapt_steps=model.adapt_steps, adapt_learning_rate=adapt_lr
            )
            for name, model in models.items()
        }
    parts = []
    for dataset in datasets:
        comparison = compare(models, dataset, **options)
        tested = [list(by_shot.values()) for by_shot in comparison.evaluations.values()]
        parts += [comparison.title, *map(text_table, _tables(sides, list(models), tested))]
    parts.append(_settings_text(sides["A"], sides["B"]))
    return "\n\n".join([*parts, _ONE_SEED] if len(a) == 1 else parts)


def _check_side(side: Sequence[RunFolder]) -> None:
    """Raise InputError unless the runs of a side differ in their seeds, and in nothing else."""
    first, seeds = side[0], {side[0].config().seed}
    for run in side[1:]:
        if run.config().seed in seeds:
            raise InputError(
                f"compare-runs: the runs of a side must have different seeds; seed "
                f"{run.config().seed} of {run.path} is there twice"
            )
        seeds.add(run.config().seed)
        if others := [key for key in differing_keys(first.config(), run.config()) if key != "seed"]:
            raise InputError(
                "compare-runs: the runs of a side must differ in the seed alone; "
                f"{first.path} and {run.path} differ in {', '.join(others)}"
            )


def _check_shapes(models: dict[str, MetaModel]) -> None:
    shapes = {name: module_shape(model.module) for name, model in models.items()}
    (first, wanted), *others = shapes.items()
    for name, shape in others:
        if shape != wanted:
            raise InputError(
                "compare-runs: all runs must take images of the same shape (channels, height, "
                f"width); {first} takes {wanted} and {name} {shape}"
            )


def _tables(
    sides: dict[str, list[RunFolder]], names: Sequence[str], tested: Sequence[list[Evaluation]]
) -> list[Table]:
    """Return the accuracies, and the difference of the sides.

    `tested` has an entry per run, in the order of `names`: its evaluations by number of shots.
    """
    runs = [run for side in sides.values() for run in side]
    n_runs, shots = len(runs) // 2, [f"{evaluation.n_shot}-shot" for evaluation in tested[0]]
    rows = [["run", *shots, "queries", "seconds"]]
    by_side = []
    for number, side in enumerate(sides):
        of_side = range(number * n_runs, (number + 1) * n_runs)
        for at in of_side:
            summary = runs[at].summary()
            seconds = sum(summary["seconds"].values())
            rows.append(
                [names[at], *_percent(tested[at]), f"{summary['queries']:,}", f"{seconds:,.0f}"]
            )
        by_shot = [list(of_shot) for of_shot in zip(*(tested[at] for at in of_side), strict=True)]
        by_side.append(by_shot)
        if n_runs > 1:
            means = [over_seeds(of_shot) for of_shot in by_shot]
            rows.append([f"{side}, mean over {n_runs} runs", *_percent(means), "", ""])
    cells = difference_cells(by_side[0], by_side[1], n_runs > 1)
    return [rows, [difference_header(shots, n_runs > 1), ["A less B, paired", *cells]]]


def _percent(evaluations: Iterable[Evaluation]) -> list[str]:
    return [f"{100 * e.mean:.2f} ± {100 * e.ci95:.2f}" for e in evaluations]


def _settings_text(a: Sequence[RunFolder], b: Sequence[RunFolder]) -> str:
    """Return a table of the settings in which the sides differ."""
    ours, theirs = a[0].config(), b[0].config()
    keys = differing_keys(replace(ours, seed=0), replace(theirs, seed=0))
    rows = [[key, *(str(attrgetter(key)(config)) for config in (ours, theirs))] for key in keys]
    seeds = [[run.config().seed for run in side] for side in (a, b)]
    if seeds[0] != seeds[1]:
        rows.insert(0, ["seed", *(", ".join(map(str, of_side)) for of_side in seeds)])
    if not rows:
        return "The settings of both sides are the same."
    return text_table([["settings that differ", "A", "B"], *rows])
