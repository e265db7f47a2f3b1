"""Draw the charts of a run's page: accuracy, queries, learning curves, agreement, task memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bidfmkd_fast.reporting.svg import COLOURS, INK, LINES, MARKERS, label, new_figure, svg_of
from bidfmkd_fast.training.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = len(COLOURS)  # more series than this are drawn thin, with their median
_ROW, _FRAME = 0.27, 0.85  # inches of a row of a chart with names, and of what is around the rows
_LEGEND = 56  # letters that fit beside each other into a legend


class Chart(NamedTuple):
    """A chart of the page: its SVG, and the line under it."""

    svg: str
    caption: str


class Series(NamedTuple):
    """Points of one line or one set of dots; `x` and `y` have one length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def accuracy_chart(comparison: Comparison, name: str) -> Chart:
    """Draw the accuracy of each model with its 95 % interval, a marker per number of shots."""
    models = list(comparison.evaluations)
    shots = list(next(iter(comparison.evaluations.values())))
    figure = new_figure(_FRAME + 0.25 + 2 * _ROW * len(models))
    axes = figure.subplots()
    some = next(iter(next(iter(comparison.evaluations.values())).values()))
    axes.axvline(100 / some.n_way, color=INK, linestyle=":", linewidth=1, label="chance")
    for position, n_shot in enumerate(shots):
        kept = [by_shot[n_shot] for by_shot in comparison.evaluations.values()]
        rows = [
            row + 0.5 * (position - (len(shots) - 1) / 2) / len(shots) for row in range(len(kept))
        ]
        axes.errorbar(
            [100 * evaluation.mean for evaluation in kept],
            rows,
            xerr=[_finite(100 * evaluation.ci95) for evaluation in kept],
            color=COLOURS[position % len(COLOURS)],
            marker=MARKERS[position % len(MARKERS)],
            linestyle="none",
            capsize=3,
            label=f"{n_shot}-shot",
        )
    _name_rows(axes, models, 30)
    axes.set_xlabel("accuracy, %")
    _legend_below(figure)
    means = (f"{model}: {', '.join(_percents(comparison, model))}" for model in models)
    return Chart(
        svg_of(figure, name, f"Accuracy in percent. {'; '.join(means)}"),
        "Dots are means over episodes, bars their 95 % intervals; the dotted line is chance.",
    )


def bar_chart(names: Sequence[str], values: Sequence[float], unit: str, name: str) -> Chart:
    """Draw a horizontal bar per name, with its number beside it."""
    figure = new_figure(_FRAME + _ROW * len(names))
    axes = figure.subplots()
    bars = axes.barh(range(len(names)), values, height=0.7, color=COLOURS[0])
    axes.bar_label(bars, [f"{value:,.6g}" for value in values], padding=3, fontsize=10)
    axes.margins(x=0.2)
    _name_rows(axes, names)
    axes.xaxis.set_major_locator(_few_ticks(whole=all(float(v).is_integer() for v in values)))
    axes.set_xlabel(unit)
    about = ", ".join(f"{label(bar)} {value:,.6g}" for bar, value in zip(names, values))
    return Chart(svg_of(figure, name, f"{unit}: {about}"), "")


def dot_chart(names: Sequence[str], kinds: Sequence[Series], unit: str, name: str) -> Chart:
    """Draw a row per name and, for each series, a dot per row: `x` is its value, `y` its row."""
    figure = new_figure(_FRAME + (0.2 * len(kinds) if len(kinds) > 1 else 0) + _ROW * len(names))
    axes = figure.subplots()
    about = []
    for position, kind in enumerate(kinds):
        axes.plot(
            kind.x,
            [row + _offset(position, len(kinds)) for row in kind.y],
            MARKERS[position % len(MARKERS)],
            color=COLOURS[position % len(COLOURS)],
            label=kind.name,
        )
        values = (f"{label(names[int(y)])} {x:.0f}" for x, y in zip(kind.x, kind.y))
        about.append(f"{kind.name}: {', '.join(values)}")
    axes.set_xlim(-3, 103)
    _name_rows(axes, names)
    axes.set_xlabel(unit)
    if len(kinds) > 1:
        _legend_below(figure)
    return Chart(svg_of(figure, name, f"{unit}. {'; '.join(about)}"), "")


def curve_chart(
    lines: Sequence[Series],
    x_label: str,
    title: str,
    name: str,
    caption: str = "",
    second: tuple[Mapping[float, float], str] | None = None,
) -> Chart:
    """Draw lines over a common axis.

    More than `MOST_LINES` lines are drawn thin and alike, with their median.

    Args:
        lines: what to draw, with finite values only.
        x_label: of the axis.
        title: what is drawn, with its unit.
        name: as for `svg_of`.
        caption: under the chart.
        second: a second horizontal axis on top: its values by those of the first, and its label.
    """
    named = 1 < len(lines) <= MOST_LINES
    legend = (0.3 + 0.16 * max(0, len(lines) - 2)) if named else 0.3 if len(lines) > 1 else 0
    figure = new_figure(2.7 + legend)
    axes = figure.subplots()
    if len(lines) > MOST_LINES:
        for line in lines:
            axes.plot(line.x, line.y, color=COLOURS[0], alpha=0.3, linewidth=0.8)
        median = _median(lines)
        axes.plot(median.x, median.y, color=COLOURS[1], label="median", linewidth=2)
        axes.plot([], [], color=COLOURS[0], alpha=0.3, linewidth=0.8, label=f"{len(lines)} series")
    else:
        for line, colour, marker, style in zip(lines, COLOURS, MARKERS, LINES):
            every = max(1, len(line.x) // 12)
            axes.plot(
                line.x, line.y, color=colour, marker=marker, linestyle=style, markevery=every,
                label=label(line.name, 28),
            )  # fmt: skip
    axes.set_xlabel(x_label)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=11)
    xs = [x for line in lines for x in line.x]
    axes.xaxis.set_major_locator(_few_ticks(whole=all(float(x).is_integer() for x in xs)))
    if second:
        _second_axis(axes, *second)
    if len(lines) > 1:
        _legend_below(figure)
    last = "; ".join(
        f"{label(line.name, 40)}: from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines[:12]
    )
    return Chart(svg_of(figure, name, f"{title} over {x_label}. {last}"), caption)


def _second_axis(axes: Axes, second: Mapping[float, float], text: str) -> None:
    """Put up to four values of `second` on top of the chart, at the places that they belong to."""
    places = sorted(second)
    chosen = [places[round(i * (len(places) - 1) / 3)] for i in range(4)]
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.grid(False)
    ticks = list(dict.fromkeys(chosen))
    top.set_xticks(ticks, [f"{second[place]:,.4g}" for place in ticks])
    top.set_xlabel(text)


def _median(lines: Sequence[Series]) -> Series:
    """Return the median of the lines, position by position, as far as half of them reach."""
    n = sorted(len(line.x) for line in lines)[len(lines) // 2]
    x, y = [], []
    for position in range(n):
        there = [line for line in lines if len(line.x) > position]
        x.append(sorted(line.x[position] for line in there)[len(there) // 2])
        y.append(sorted(line.y[position] for line in there)[len(there) // 2])
    return Series("median", x, y)


def _name_rows(axes: Axes, names: Sequence[str], most: int = 22) -> None:
    """Put a name beside each row, the first on top."""
    axes.set_yticks(range(len(names)), [label(name, most) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def _legend_below(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    ncols = max(1, _LEGEND // (max(map(len, labels)) + 6))  # six letters for a line and a gap
    figure.legend(handles, labels, loc="outside lower center", ncols=min(ncols, len(labels)))


def _few_ticks(whole: bool) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=whole, min_n_ticks=1)


def _percents(comparison: Comparison, model: str) -> list[str]:
    row = next(row for row in comparison.accuracies[1:] if row[0] == model)
    return [f"{header} {cell}" for header, cell in zip(comparison.accuracies[0][1:], row[1:])]


def _offset(position: int, n: int) -> float:
    """Return how far below the middle of its row the dot `position` of `n` lies."""
    return 0.6 * (position - (n - 1) / 2) / n


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
