"""Draw the learning curves of a run from its metrics and its recovered sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bidfmkd_fast.reporting.charts import Chart, Series, curve_chart
from bidfmkd_fast.reporting.facts import RunFacts

# Stage, what is counted along its axis, label of the loss, label of the accuracy.
_STAGES = (
    ("survey", "epoch", "distillation loss of the survey", "agreement of heads and APIs, %"),
    ("distillation", "outer step", "loss of the bi-level distillation", "agreement, %"),
    ("replay", "outer step", "loss of the replay", "accuracy of replayed tasks, %"),
)


def learning_curves(facts: RunFacts) -> list[Chart]:
    """Return a chart for each quantity that was recorded at least twice, in the order of stages."""
    survey, *later = (_stage_curves(facts, *stage) for stage in _STAGES)
    return [*survey, *_recovery_curves(facts), *(chart for charts in later for chart in charts)]


def _stage_curves(
    facts: RunFacts, stage: str, counted: str, loss: str, accuracy: str
) -> list[Chart]:
    """Return the curves of loss and accuracy of a stage, as far as they were recorded."""
    records = facts.of_stage(stage)
    return [
        *_stage_curve(records, stage, counted, "loss", loss),
        *_stage_curve(records, stage, counted, "accuracy", accuracy),
    ]


def _stage_curve(
    records: Sequence[dict[str, Any]], stage: str, counted: str, key: str, title: str
) -> list[Chart]:
    """Return the curve of one value of a stage, with seconds on top and queries below."""
    points: dict[float, float] = {}
    seconds: dict[float, float] = {}
    queries: list[float] = []
    for number, record in enumerate(records, 1):
        value = finite_number(record.get(key))
        step = float(number) if counted == "epoch" else finite_number(record.get("step"))
        if value is None or step is None:
            continue
        points[step] = 100 * value if key == "accuracy" else value
        if (passed := finite_number(record.get("seconds"))) is not None:
            seconds[step] = passed
        if (asked := finite_number(record.get("queries"))) is not None:
            queries.append(asked)
    if len(points) < 2:
        return []
    caption = ""
    if queries:
        low, high = min(queries), max(queries)
        more = f"from {low:,.0f} to {high:,.0f}" if low < high else f"{high:,.0f}"
        caption = f"Queries asked by then: {more}."
    series = Series(stage, list(points), list(points.values()))
    name, top = f"{stage}-{key}", (seconds, "seconds of the run") if seconds else None
    return [curve_chart([series], counted, title, name, caption, top)]


def _recovery_curves(facts: RunFacts) -> list[Chart]:
    """Return the loss of the recovery over its steps, for each API, by kind of set."""
    charts = []
    for part, title in (("support", "support sets"), ("query", "boundary query sets")):
        lines: list[Series] = []
        by_step: dict[float, float] = {}
        for course in facts.sets:
            if course.part != part or len(course.history) < 2:
                continue
            steps = [record["step"] for record in course.history]
            by_step |= {record["step"]: record["queries"] for record in course.history}
            lines.append(
                Series(course.api_name, steps, [record["loss"] for record in course.history])
            )
        if lines:
            charts.append(
                curve_chart(
                    lines,
                    "step of the recovery",
                    f"loss of the recovery, {title}",
                    f"recovery-{part}",
                    "Each API has a line of its own." if len(lines) > 1 else "",
                    (by_step, "queries for the set"),
                )
            )
    return charts


def finite_number(value: Any) -> float | None:
    """Return a finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
