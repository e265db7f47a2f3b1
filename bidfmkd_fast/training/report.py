"""Write `report.md`, the page about a finished run: accuracy, spending, recovered images, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.black_box.spec import NOTHING_RECOVERED
from bidfmkd_fast.files.atomic import write_text
from bidfmkd_fast.training.comparison import CONTROL, ZERO_QUERY, Comparison, controls_of
from bidfmkd_fast.training.run_folder import CONFIG, METRICS, RunFolder
from bidfmkd_fast.training.spending import read_spending
from bidfmkd_fast.training.tables import Table, markdown_table

REPORT = "report.md"
ABOUT_CONTROLS = {
    CONTROL: f"The {CONTROL} is the same run without a survey, on images of untrained generators; "
    "it shows what learning to adapt achieves without recovery.",
    ZERO_QUERY: "zero_query replays pseudo-tasks of procedural pictures: no API is asked and no "
    "real picture is used, so it is the bar for whoever pays for queries.",
}


def outcome_rows(
    summary: Mapping[str, Any], extra_seconds: Mapping[str, float] | None = None
) -> Table:
    """Return a table of a run's summary: APIs, images, and wall time per stage."""
    matched = [
        [f"recovered as wanted, {part} sets", f"{100 * share:.0f} %"]
        for part, share in summary["matched"].items()
        if share is not None
    ]
    labels_only = summary.get("labels_only", ())
    seconds = {**(extra_seconds or {}), **summary["seconds"]}
    return [
        ["run", ""],
        ["APIs", f"{summary['apis']:,}"],
        *([["APIs of labels only", f"{len(labels_only):,}"]] if labels_only else []),
        ["images recovered", f"{summary['images']:,}"],
        *matched,
        *([f"seconds, {stage}", f"{value:.1f}"] for stage, value in seconds.items()),
    ]


def _asked(ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what each API was asked and answered, if the two differ or money was spent."""
    if all(row["queries"] == row["answered_queries"] and not row["cost"] for row in ledger):
        return ["Every request was answered."]
    header = ["API", "queries sent", "answered", "requests sent", "answered", "cost at most"]
    counts = ("queries", "answered_queries", "requests", "answered_requests")
    rows = [
        [row["name"], *(f"{row[count]:,}" for count in counts), f"{row['cost']:,.4g}"]
        for row in ledger
    ]
    note = (
        "A request that was sent again after a failure counts again, since a service may bill it "
        "twice."
    )
    return [markdown_table([header, *rows]), "", note]


def write_report(
    folder: RunFolder,
    comparisons: Sequence[Comparison] = (),
    *,
    extra_seconds: Mapping[str, float] | None = None,
) -> Path:
    """Write `report.md` into the folder of a finished run; return its path.

    It links to the controls of the run that are there.

    Args:
        folder: the run.
        comparisons: accuracies of its models to show.
        extra_seconds: wall time of stages outside of the run, by name.
    """
    summary = folder.summary()
    lines = [f"# Run `{folder.path.name}`", ""]
    if summary["budget_ended"] or not (summary["complete"] or summary["skipped"]):
        lines += [
            "**A budget ended before every API was recovered in full; the sets so far were used.**",
            "",
        ]
    for name, reason in summary["skipped"].items():
        lines += [f"**{name} was left out: {reason}**", ""]
    for name in summary.get("labels_only", ()):
        lines += [f"{name} gives labels only: {NOTHING_RECOVERED}.", ""]
    for comparison in comparisons:
        lines += ["## Accuracy"] if comparison is comparisons[0] else []
        lines += ["", f"{comparison.title}.", "", markdown_table(comparison.accuracies), ""]
        if len(comparison.differences) > 1:
            lines += [markdown_table(comparison.differences), ""]
    if comparisons:
        shown = comparisons[0].evaluations
        notes = [text for model, text in ABOUT_CONTROLS.items() if model in shown]
        notes.append("Batch norm sees a whole query set at once (transductive evaluation).")
        lines += [" ".join(notes), ""]
    lines += ["## Spending", "", markdown_table(read_spending(folder.path).rows()), ""]
    lines += [*_asked(summary.get("ledger", ())), ""]
    lines += ["## The run", "", markdown_table(outcome_rows(summary, extra_seconds)), ""]
    pictures = sorted((folder.path / "grids").glob("*.png"))
    if pictures:
        lines += [
            "## Recovered images",
            "",
            "A row per class. Blue frame: the API classifies the image as wanted; orange frame "
            "with a filled corner: it does not. Recovered images need not look like anything, "
            "since they are optimised for the API and not for the eye; the accuracy shows whether "
            "they help.",
            "",
        ]
        for picture in pictures:
            lines += [f"![{picture.stem}](grids/{picture.name})", ""]
    files = [CONFIG, METRICS, *(control.path.name for control in controls_of(folder).values())]
    lines += ["## Files", "", ", ".join(f"[{name}]({name})" for name in files), ""]
    path = folder.path / REPORT
    write_text(path, "\n".join(lines))
    return path
