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
from bidfmkd_fast.settings import flat_values
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
    n_methods = len(finished.results)
    return (
        f"Comparison {name!r}: {n_methods} method{'' if n_methods == 1 else 's'} from the same "
        f"start, on {pool.n_apis} APIs of {', '.join(pool.data_sets)} (scenario {pool.scenario}), "
        f"under {n_seeds} seed{'' if n_seeds == 1 else 's'}."
    )


def comparison_sections(finished: FinishedComparison) -> list[Section]:
    """Return the sections that have something to show, from top to bottom."""
    made = [*_accuracies(finished), _curves(finished), _settings(finished)]
    return [section for section in made if not section.is_empty]


def _accuracies(finished: FinishedComparison) -> list[Section]:
    """Return a section for each table, those of accuracies with a chart."""
    by_method = {
        METHODS[method][0]: by_data_set(results) for method, results in finished.results.items()
    }
    data_sets = list(next(iter(by_method.values())))
    untold = iter(data_sets)  # the tables of accuracies come in their order
    sections: list[Section] = []
    for number, (title, rows) in enumerate(comparison_tables(finished.results, finished.seeds)):
        if not rows:
            sections[0].remarks.append(title)
        elif rows[0][0] == METHOD:
            data_set = next(untold)
            evaluations = {
                label: {evaluation.n_shot: evaluation for evaluation in held[data_set]}
                for label, held in by_method.items()
            }
            chart = accuracy_chart(Comparison(evaluations), f"accuracy-chart-{number}")
            heading = "Accuracy" if len(data_sets) == 1 else f"Accuracy, {data_set}"
            anchor = f"accuracy-{number}" if number else "accuracy"
            sections.append(Section(anchor, heading, [f"{title}."], charts=[chart], tables=[rows]))
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
    sections[0].remarks += [
        "Intervals in the chart are over episodes. They say nothing about another seed.",
        *finished.left_out,
    ]
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
        label: f"{max(finite_number(record.get('queries')) or 0.0 for record in records):,.0f}"
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

    Steps are those of the stage: a run counts the outer steps of distillation and replay together,
    and makes a record for each of the former.
    """
    is_run = any(record.get("stage") == "survey" for record in records) or any(
        "set" in record for record in records
    )
    points: list[tuple[float, float]] = []
    n_distilled = n_of_stage = 0
    for record in records:
        n_distilled += record.get("stage") == "distillation"
        if record.get("stage") != stage:
            continue
        n_of_stage += 1
        x = finite_number(record.get(key))
        if key == "epoch" or (key == "step" and stage == "distillation" and is_run):
            x = float(n_of_stage)
        elif key == "step" and stage == "replay" and x is not None:
            x -= n_distilled
        y = finite_number(record.get("accuracy"))
        if x is not None and y is not None:
            points.append((x, 100 * y))
    if len(points) < 2:
        return None
    return Series(label, [x for x, _ in points], [y for _, y in points])


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
        most = max(map(len, by_step.values()), default=0)
        # A budget may have ended some sets early: steps that all have.
        whole = sorted(step for step, losses in by_step.items() if len(losses) == most)
        if len(whole) > 1:
            means = [sum(by_step[step]) / most for step in whole]
            lines.append(Series(METHODS[method][0], whole, means))
    title = "loss of the recovery, support sets, mean over the APIs"
    return [curve_chart(lines, "step of the recovery", title, "recovery")] if lines else []


def _settings(finished: FinishedComparison) -> Section:
    # The settings of a comparison leave the seed out.
    rows = flat_values(finished.config) | {"train.seed": ", ".join(map(str, finished.seeds))}
    return Section(
        "settings",
        "Settings",
        folded_title="All settings",
        folded=[["setting", "value"], *([key, str(value)] for key, value in rows.items())],
    )
