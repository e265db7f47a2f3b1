"""Plot a sweep: accuracy with confidence interval over the number that varies, or by cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.extras import not_installed
from bidfmkd_fast.files.atomic import written_whole
from bidfmkd_fast.meta import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bidfmkd_fast.experiments.sweep_file import Cell


_MARKERS = "os^DvP"  # a variant is told by its marker as well as by its colour
_CHARACTERS, _HANDLE = 53, 7  # in the width of a panel, and of the line before a legend's text
_LABEL = 0.12  # share of a panel's width that a label of about four digits takes


def need_matplotlib() -> None:
    """Raise InputError if matplotlib is missing, before the hours of computing for the plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise not_installed("sweep", "matplotlib, which the plot needs,", "bench") from None


def plot_sweep(
    cells: Sequence[Cell], evaluations: Sequence[Mapping[str, Sequence[Evaluation]]], path: Path
) -> None:
    """Write the picture of `draw_sweep` as a PNG."""
    figure = draw_sweep(cells, evaluations)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_sweep(
    cells: Sequence[Cell], evaluations: Sequence[Mapping[str, Sequence[Evaluation]]]
) -> Figure:
    """Draw a panel per data set and number of shots.

    `evaluations` holds, for each cell, the evaluations by data set. If the sweep varies a single
    number, that number is the horizontal axis: the ticks are the values that were tried, and the
    axis is logarithmic if `is_logarithmic` says so. Otherwise each cell is a row.
    """
    from matplotlib.figure import Figure

    axis = numeric_axis(cells)
    panels = [(name, i) for name, shots in evaluations[0].items() for i in range(len(shots))]
    height = 3.2 if axis else 1.2 + 0.35 * len(cells)
    figure = Figure(figsize=(4.5 * len(panels), height), layout="constrained")
    for panel, (data_set, position) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        shown = [by_data_set[data_set][position] for by_data_set in evaluations]
        means, widths = [100 * e.mean for e in shown], [100 * e.ci95 for e in shown]
        panel.set_title(f"{data_set}, {shown[0].n_shot}-shot")
        if axis is None:
            panel.errorbar(means, range(len(cells)), xerr=widths, fmt="o", capsize=3)
            panel.set_yticks(range(len(cells)), [cell.name for cell in cells])
            panel.invert_yaxis()
            panel.set_xlabel("accuracy, %")
            continue
        variants = dict.fromkeys(cell.variant for cell in cells)
        for variant, marker in zip(variants, itertools.cycle(_MARKERS)):
            rows = sorted(
                (cell.point[axis], i) for i, cell in enumerate(cells) if cell.variant == variant
            )
            panel.errorbar(
                [value for value, _ in rows],
                [means[i] for _, i in rows],
                [widths[i] for _, i in rows],
                fmt=f"{marker}-",
                capsize=3,
                label=variant or None,
            )
        values = sorted({cell.point[axis] for cell in cells})
        if is_logarithmic(values):
            panel.set_xscale("log")
        upright = {"rotation": 90, "fontsize": 8} if _crowded(values) else {}
        panel.set_xticks(values, [f"{value:g}" for value in values], **upright)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(axis)
        panel.set_ylabel("accuracy, %")
    if axis is not None and any(cell.variant for cell in cells):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        fitting = _CHARACTERS * len(panels) // (max(map(len, labels)) + _HANDLE)
        columns = max(1, min(4, fitting))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)  # covers no data
    return figure


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return True for values above 0 that are fractions or span a factor of 4.

    Fractions are step lengths, learning rates and weights, whose ratios matter.
    """
    fractions = any(isinstance(value, float) for value in values)
    return min(values) > 0 and (fractions or max(values) >= 4 * min(values))


def _crowded(values: Sequence[float]) -> bool:
    """Return True if the labels of two neighbours would run into each other on the axis."""
    places = [math.log(value) for value in values] if is_logarithmic(values) else list(values)
    gaps = [(right - left) / (places[-1] - places[0]) for left, right in itertools.pairwise(places)]
    return min(gaps) < _LABEL


def numeric_axis(cells: Sequence[Cell]) -> str | None:
    """Return the dotted key of the grid if it is the only one and takes at least two numbers."""
    keys = list(cells[0].point)
    if len(keys) != 1:
        return None
    values: set[Any] = {cell.point[keys[0]] for cell in cells}
    numbers = all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )
    return keys[0] if numbers and len(values) > 1 else None
