"""What a person reads of a run: accuracy tables with paired differences, costs, `report.md`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import write_text
from bidfmkd_fast.meta import Evaluation, MetaModel, evaluate, paired_difference
from bidfmkd_fast.training.run_folder import CONFIG, METRICS, RunFolder
from bidfmkd_fast.training.spending import read_spending

REPORT = "report.md"
RANDOM, CONTROL, LEARNED = "random initialisation", "no-recovery control", "BiDf-MKD"

Table = list[list[str]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models judged on the same episodes: `evaluations[model][n_shot]`, the model that matters
    last.
    """

    evaluations: Mapping[str, Mapping[int, Evaluation]]

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        one = self._first
        return (
            f"{one.n_way}-way accuracy on {len(one.per_episode)} episodes of unseen classes "
            f"({one.dataset} {one.split}), in %, with 95 % CI"
        )

    @property
    def accuracies(self) -> Table:
        """One row per model."""
        rows = [
            [model, *(f"{100 * e.mean:.2f} ± {100 * e.ci95:.2f}" for e in by_shot.values())]
            for model, by_shot in self.evaluations.items()
        ]
        return [self._header("model"), *rows]

    @property
    def differences(self) -> Table:
        """The last model less each of the others, in points, paired by episode; only a header if
        there is one model.
        """
        *others, last = self.evaluations
        rows = []
        for other in others:
            pairs = zip(
                self.evaluations[last].values(), self.evaluations[other].values(), strict=True
            )
            pairs_told = [paired_difference(a, b) for a, b in pairs]
            rows.append(
                [
                    f"{last} less {other}",
                    *(f"{100 * d.mean:+.2f} ± {100 * d.ci95:.2f}" for d in pairs_told),
                ]
            )
        return [self._header("difference paired by episode"), *rows]

    def __str__(self) -> str:
        parts = [self.title, "", text_table(self.accuracies)]
        if len(self.differences) > 1:
            parts += ["", text_table(self.differences)]
        return "\n".join(parts)

    @property
    def _first(self) -> Evaluation:
        return next(iter(next(iter(self.evaluations.values())).values()))

    def _header(self, first: str) -> list[str]:
        shots = next(iter(self.evaluations.values()))
        return [first, *(f"{n_shot}-shot" for n_shot in shots)]


def compare(
    models: Mapping[str, MetaModel],
    dataset: Dataset,
    *,
    n_shots: Sequence[int] = (1, 5),
    n_way: int = 5,
    n_query: int = 15,
    n_episodes: int = 600,
    split: str = "meta_test",
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Every model on the same episodes, for every number of shots. Raises InputError as `evaluate`
    does.
    """
    if not models or not n_shots:
        raise InputError("compare: give at least one model and one n_shot")
    return Comparison(
        {
            name: {
                n_shot: evaluate(
                    model,
                    dataset,
                    n_way=n_way,
                    n_shot=n_shot,
                    n_query=n_query,
                    n_episodes=n_episodes,
                    split=split,
                    seed=seed,
                    progress=progress,
                )
                for n_shot in n_shots
            }
            for name, model in models.items()
        }
    )


def text_table(rows: Table) -> str:
    """Rows in aligned columns, the first to the left, under a ruled header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Table) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def outcome_rows(
    summary: Mapping[str, Any], extra_seconds: Mapping[str, float] | None = None
) -> Table:
    """Return what a run came to, from its summary: APIs, images, and wall time per stage."""
    matched = [
        [f"recovered as wanted, {part} sets", f"{100 * share:.0f} %"]
        for part, share in summary["matched"].items()
        if share is not None
    ]
    seconds = {**(extra_seconds or {}), **summary["seconds"]}
    return [
        ["run", ""],
        ["APIs", f"{summary['apis']:,}"],
        ["images recovered", f"{summary['images']:,}"],
        *matched,
        *([f"seconds, {stage}", f"{value:.1f}"] for stage, value in seconds.items()),
    ]


def _asked(ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each API was asked and answered, where the two differ or money was spent."""
    if all(row["queries"] == row["answered_queries"] and not row["cost"] for row in ledger):
        return ["Every request was answered."]
    header = ["API", "queries sent", "answered", "requests sent", "answered", "cost at most"]
    counts = ("queries", "answered_queries", "requests", "answered_requests")
    rows = [
        [row["name"], *(f"{row[count]:,}" for count in counts), f"{row['cost']:,.4g}"]
        for row in ledger
    ]
    told = "A request that was sent again after a failure counts again, since a service may bill it twice."
    return [markdown_table([header, *rows]), "", told]


def write_report(
    folder: RunFolder,
    comparisons: Sequence[Comparison] = (),
    *,
    control: RunFolder | None = None,
    extra_seconds: Mapping[str, float] | None = None,
) -> Path:
    """Write `report.md` into a finished run's folder: accuracy, cost, pictures, settings; the path
    of the report.
    """
    summary = folder.summary()
    lines = [f"# Run `{folder.path.name}`", ""]
    if summary["budget_ended"] or not (summary["complete"] or summary["skipped"]):
        lines += [
            "**A budget ended before every API was recovered in full; what there is was used.**",
            "",
        ]
    for name, reason in summary["skipped"].items():
        lines += [f"**{name} was left out: {reason}**", ""]
    for comparison in comparisons:
        lines += ["## Accuracy"] if comparison is comparisons[0] else []
        lines += ["", f"{comparison.title}.", "", markdown_table(comparison.accuracies), ""]
        if len(comparison.differences) > 1:
            lines += [markdown_table(comparison.differences), ""]
    if comparisons:
        lines += [
            f"The {CONTROL} is the same run on images of untrained generators: what learning to adapt gives by "
            "itself. Batch norm sees a whole query set at once (transductive evaluation).",
            "",
        ]
    lines += ["## Spending", "", markdown_table(read_spending(folder.path).rows()), ""]
    lines += [*_asked(summary["ledger"]), ""]
    lines += ["## The run", "", markdown_table(outcome_rows(summary, extra_seconds)), ""]
    pictures = sorted((folder.path / "grids").glob("*.png"))
    if pictures:
        lines += [
            "## Recovered images",
            "",
            "A row per class. Blue frame: the API gives the image the label that was wanted; orange frame with a "
            "filled corner: another label. Recovered images need not look like anything: they are made for the API, "
            "not for the eye, and what they are worth shows in the accuracy.",
            "",
        ]
        for picture in pictures:
            lines += [f"![{picture.stem}](grids/{picture.name})", ""]
    files = [
        CONFIG,
        METRICS,
        *([os.path.relpath(control.path, folder.path)] if control is not None else []),
    ]
    lines += ["## Files", "", ", ".join(f"[{name}]({name})" for name in files), ""]
    path = folder.path / REPORT
    write_text(path, "\n".join(lines))
    return path
