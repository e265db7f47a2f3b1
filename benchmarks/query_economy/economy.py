"""Draw accuracy against queries and against seconds, and tell the methods' differences over seeds.

    python benchmarks/query_economy/economy.py --out FOLDER results.csv ...

The files are the `results.csv` of sweeps and comparisons of one data set on the same episodes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from bidfmkd_fast.experiments.intervals import mean_and_t95
from bidfmkd_fast.experiments.result_files import CHOSEN
from bidfmkd_fast.reporting.svg import COLOURS, LINES, MARKERS
from bidfmkd_fast.training.tables import markdown_table

REFERENCE = "neither"  # the pictures are neither chosen nor jittered
SHOWN = {REFERENCE: "the survey alone"}

Row = dict[str, str]
# By variant, then by queries: the rows of all seeds.
Points = dict[str, dict[int, list[Row]]]


def read_points(files: list[Path], n_shot: str) -> Points:
    """Read the rows with the rate chosen on meta_val, by variant and total queries."""
    points: defaultdict[str, defaultdict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                if row["rate_protocol"] == CHOSEN and row["n_shot"] == n_shot:
                    rows = points[row["name"].split(", ")[0]][int(row["queries"])]
                    if row["seed"] in {held["seed"] for held in rows}:
                        raise SystemExit(
                            f"economy: {file} has a result that is there already: {row}"
                        )
                    rows.append(row)
    return {variant: dict(by_queries) for variant, by_queries in points.items()}


def values(rows: list[Row], column: str) -> torch.Tensor:
    """Return a column of rows that differ in the seed, in the order of the seeds."""
    return torch.tensor(
        [float(row[column]) for row in sorted(rows, key=lambda row: int(row["seed"]))],
        dtype=torch.float64,
    )


def episodes(rows: list[Row]) -> set[tuple[str, str]]:
    """Return the seeds of the rows and their numbers of episodes, which must agree to subtract."""
    return {(row["seed"], row["n_episodes"]) for row in rows}


def cell(value: torch.Tensor, sign: str = "") -> str:
    """Return mean and t-interval over the seeds, in %; a single seed has no interval."""
    mean, half = mean_and_t95(100 * value)
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if len(value) > 1 else "")


def table(by_shot: dict[str, Points]) -> list[list[str]]:
    """Return a row per variant and number of queries, with the difference to the survey alone.

    A column in which nothing stands is left out.
    """
    head = ["", "queries", "seconds"]
    for n_shot in by_shot:
        head += [f"{n_shot}-shot", "less the survey alone"]
    rows = [head]
    first = next(iter(by_shot.values()))
    for variant, by_queries in first.items():
        for queries in sorted(by_queries):
            row = [
                SHOWN.get(variant, variant),
                f"{queries:,}",
                f"{values(by_queries[queries], 'seconds').median():.0f}",
            ]
            for points in by_shot.values():
                mine = points.get(variant, {}).get(queries, [])
                other = points.get(REFERENCE, {}).get(queries, [])
                own, theirs = values(mine, "accuracy"), values(other, "accuracy")
                same = variant != REFERENCE and mine and episodes(mine) == episodes(other)
                row += [cell(own) if mine else "", cell(own - theirs, "+") if same else ""]
            rows.append(row)
    told = [any(cells) for cells in zip(*rows[1:], strict=True)]  # by column
    return [list(itertools.compress(row, told)) for row in rows]


def table_of_sweeps(results: Path, name: str) -> str:
    """Return the `table` of the committed results whose files begin with a name as Markdown."""
    files = sorted(results.glob(f"{name}*.csv"))
    return markdown_table(table({n_shot: read_points(files, n_shot) for n_shot in ("1", "5")}))


def table_of_methods(file: Path, columns: dict[str, tuple[str, str]]) -> str:
    """Return a comparison as Markdown: a row per method, then the last one less each other.

    Args:
        file: `results.csv` of a comparison whose last method is the one of interest.
        columns: what each column shows, by its title: a data set and a protocol of the rate. Cells
            hold 1-shot and 5-shot.
    """
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    methods = list(dict.fromkeys(row["name"] for row in rows))

    def accuracy(method: str, column: tuple[str, str], n_shot: str) -> torch.Tensor:
        wanted = [method, *column, n_shot]
        keys = ("name", "data_set", "rate_protocol", "n_shot")
        return values([row for row in rows if [row[key] for key in keys] == wanted], "accuracy")

    def line(title: str, method: str, less: str | None = None) -> list[str]:
        cells = []
        for column in columns.values():
            shots = []
            for n_shot in "15":
                own = accuracy(method, column, n_shot)
                shots.append(
                    f"{100 * own.mean():.1f}"
                    if less is None
                    else cell(own - accuracy(less, column, n_shot), "+")
                )
            cells.append(" / ".join(shots))
        return [title, *cells]

    *controls, ours = methods
    means = [line(method, method) for method in methods]
    differences = [line(f"less {control}", ours, control) for control in controls]
    return markdown_table([["1-shot / 5-shot", *columns], *means, *differences])


def apart(numbers: Iterable[int]) -> list[int]:
    """Return rising numbers, without those less than a half above the last one kept."""
    kept: list[int] = []
    for number in sorted(numbers):
        if not kept or number >= 1.5 * kept[-1]:
            kept.append(number)
    return kept


def draw(by_shot: dict[str, Points], path: Path) -> None:
    """Write a panel per number of shots and horizontal axis: queries, and seconds of training.

    Methods that ask nothing are lines across the panels of queries.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, len(by_shot), squeeze=False, sharey="col")
    for column, (n_shot, points) in enumerate(by_shot.items()):
        panels[0][column].set_title(f"{n_shot}-shot")
        for row, (axis, label) in enumerate(
            (("queries", "queries of all APIs together"), ("seconds", "seconds of training"))
        ):
            panel = panels[row][column]
            looks = itertools.cycle(zip(MARKERS, COLOURS, LINES, strict=True))
            for (variant, by_queries), (marker, colour, style) in zip(
                points.items(), looks, strict=False
            ):
                shown = SHOWN.get(variant, variant)
                spots = []
                for _, rows in sorted(by_queries.items()):
                    mean, half = mean_and_t95(100 * values(rows, "accuracy"))
                    spots.append((float(values(rows, axis).median()), mean, half))
                x, y, widths = (list(column) for column in zip(*spots, strict=True))
                if max(x) > 0:
                    panel.errorbar(
                        x, y, widths, color=colour, marker=marker, capsize=3, label=shown
                    )
                else:
                    panel.axhline(y[0], linestyle=style, color=colour, label=shown)
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            if axis == "queries":
                asked = {queries for of_variant in points.values() for queries in of_variant}
                panel.set_xticks(apart(asked - {0}))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            panel.set_xlabel(label)
            panel.set_ylabel("accuracy, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the files; print and write the table, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="+", help="results.csv of sweeps or comparisons")
    parser.add_argument("--out", type=Path, required=True, help="folder of economy.md and .png")
    options = parser.parse_args()
    by_shot = {n_shot: read_points(options.files, n_shot) for n_shot in ("1", "5")}
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown_table(table(by_shot))
    (options.out / "economy.md").write_text(text + "\n", encoding="utf-8")
    draw(by_shot, options.out / "economy.png")
    print(text)


if __name__ == "__main__":
    main()
