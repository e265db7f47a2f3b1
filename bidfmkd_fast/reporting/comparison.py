"""Say what the page of a comparison shows: accuracies, learning curves by method, settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bidfmkd_fast.experiments.finished import FinishedComparison
from bidfmkd_fast.experiments.methods import METHODS
from bidfmkd_fast.experiments.tables import (
    METHOD,
    OWN_RATE,
    by_data_set,
    comparison_tables,
)
from bidfmkd_fast.reporting.charts import Chart, Series, accuracy_chart, curve_chart
from bidfmkd_fast.reporting.curves import finite_number
from bidfmkd_fast.reporting.facts import read_metrics, read_sets
from bidfmkd_fast.reporting.sections import Section
from bidfmkd_fast.settings import plain_values
from bidfmkd_fast.training.comparison import Comparison
from bidfmkd_fast.training.run_folder import METRICS

# Stage, what its accuracy is, what is counted along the axis.
_STAGES = (
    ("survey", "agreement with the APIs in the survey, %", "epoch"),
    ("distillation", "agreement with the APIs in distillation, %", "step"),
    ("replay", "accuracy on the query sets of outer steps, %", "step"),
)


def comparison_sentence(name: str, finished: FinishedComparison) -> str:
    """Say in one sentence what was compared."""
    pool, n_seeds = finished.config.pool, len(finished.seeds)
    return (
        f"Comparison {name!r}: {len(finished.results)} methods from the same start, on "
        f"{pool.n_apis} APIs of {', '.join(pool.data_sets)} (scenario {pool.scenario}), under "
        f"{n_seeds} seed{'' if n_seeds == 1 else 's'}."
    )


def comparison_sections(finished: FinishedComparison) -> list[Section]:
    """Return the sections that have something to show, from top to bottom."""
    made = [*_accuracies(finished), _curves(finished), _settings(finished)]
    return [section for section in made if not section.is_empty]


def _accuracies(finished: FinishedComparison) -> list[Section]:
    """Return a section with the accuracies, and one for each kind of differences."""
    first = Section("accuracy", "Accuracy")
    by_method = {
        METHODS[method][0]: by_data_set(results) for method, results in finished.results.items()
    }
    for number, data_set in enumerate(next(iter(by_method.values()))):
        evaluations = {
            label: {evaluation.n_shot: evaluation for evaluation in held[data_set]}
            for label, held in by_method.items()
        }
        first.charts.append(accuracy_chart(Comparison(evaluations), f"accuracy-{number}"))
    sections = [first]
    for number, (title, rows) in enumerate(comparison_tables(finished.results, finished.seeds)):
        if not rows:
            first.remarks.append(title)
        elif rows[0][0] == METHOD:
            first.notes.append(f"{title}.")
            first.tables.append(rows)
        else:
            what, _, rate = title.partition("; at ")
            heading, _, more = what.partition(": ")
            heading = heading + (", at the own rate" if rate else "")
            notes = [more] if more else []
            notes += [f"at {OWN_RATE}"] if rate else []
            sections.append(
                Section(
                    f"table-{number}",
                    heading[0].upper() + heading[1:],
                    [f"{note[0].upper()}{note[1:]}." for note in notes],
                    tables=[rows],
                )
            )
    first.remarks.append(
        "Intervals in the chart are over episodes. They say nothing about another seed."
    )
    return sections


def _curves(finished: FinishedComparison) -> Section:
    """Draw for each stage the accuracy of every method by steps and by seconds; the recoveries'
    losses by steps.
    """
    metrics = {
        METHODS[method][0]: read_metrics(folder / METRICS)
        for method, folder in finished.folders.items()
    }
    section = Section(
        "curves",
        "Learning curves",
        [f"Seed {finished.seeds[0]}. Seconds are those of the training so far."],
    )
    for stage, title, counted in _STAGES:
        for along, key in ((_axis(stage, counted), counted), ("seconds of training", "seconds")):
            lines = [
                line
                for label, records in metrics.items()
                if (line := _line(label, records, stage, key)) is not None
            ]
            if lines:
                section.charts.append(curve_chart(lines, along, title, f"{stage}-{key}"))
    section.charts += _recoveries(finished.folders)
    queries = {
        label: f"{max(int(record.get('queries', 0)) for record in records):,}"
        for label, records in metrics.items()
        if records
    }
    if queries:
        section.tables.append(
            [["method", "queries for these curves"], *([m, n] for m, n in queries.items())]
        )
    return section


def _axis(stage: str, counted: str) -> str:
    return "epoch" if counted == "epoch" else f"step of the {stage}"


def _line(label: str, records: list[dict[str, Any]], stage: str, key: str) -> Series | None:
    """Return the accuracy of a stage in %; None if it was recorded less than twice.

    Steps count from the first one of the stage, since a run counts them through all its stages.
    """
    points: list[tuple[float, float]] = []
    for number, record in enumerate((r for r in records if r.get("stage") == stage), 1):
        x = float(number) if key == "epoch" else finite_number(record.get(key))
        y = finite_number(record.get("accuracy"))
        if x is None or y is None:
            continue
        points.append((x, 100 * y))
    if len(points) < 2:
        return None
    # A record is of all steps since the one before it.
    before = 2 * points[0][0] - points[1][0] if key == "step" else 0.0
    return Series(label, [x - before for x, _ in points], [y for _, y in points])


def _recoveries(folders: Mapping[str, Path]) -> list[Chart]:
    """Draw the mean loss of the support sets of all APIs by steps of the recovery."""
    lines = []
    for method, folder in folders.items():
        courses, _ = read_sets(sorted((folder / "recovered").glob("api_*.safetensors")))
        by_step: dict[float, list[float]] = {}
        for course in courses:
            if course.part == "support":
                for record in course.history:
                    by_step.setdefault(record["step"], []).append(record["loss"])
        if len(by_step) > 1:
            means = [sum(losses) / len(losses) for losses in by_step.values()]
            lines.append(Series(METHODS[method][0], list(by_step), means))
    title = "loss of the recovery, support sets, mean over the APIs"
    return [curve_chart(lines, "step of the recovery", title, "recovery")] if lines else []


def _settings(finished: FinishedComparison) -> Section:
    rows = list(_flat(plain_values(finished.config)))
    return Section(
        "settings",
        "Settings",
        folded_title="All settings",
        folded=[["setting", "value"], *([key, str(value)] for key, value in rows)],
    )


def _flat(values: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as pairs of dotted key and value."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        inside = isinstance(value, Mapping)
        flat += _flat(value, f"{where}{key}.") if inside else [(f"{where}{key}", value)]
    return flat
