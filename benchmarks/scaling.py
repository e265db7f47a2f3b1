"""Time and memory of perturb + gradient against q, B, d and threads, with the limits drawn: `scaling.png` and `.json`.

`python benchmarks/scaling.py --out docs/images`; with `--results docs/images/scaling.json` the picture alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.baselines import paper_order  # noqa: E402
from benchmarks.harness import extra_memory  # noqa: E402
from bidfmkd_fast import ops  # noqa: E402
from bidfmkd_fast.ops import backend  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CENTRE = {"q": 50, "B": 50, "d": 3072}
SWEEPS = {"q": (10, 20, 50, 100, 200), "B": (10, 20, 50, 100, 200), "d": (784, 3072, 21168, 49152)}
MEANING = {"q": "random directions per image", "B": "images", "d": "numbers in an image, C x H x W"}
STYLES: dict[str, dict[str, Any]] = {
    "rademacher": {"color": "tab:blue", "marker": "o", "markersize": 4},
    "sphere": {"color": "tab:orange", "marker": "s", "markersize": 4},
    "paper order (a)": {"color": "tab:purple", "marker": "^", "markersize": 5},
    "limit": {"color": "black", "marker": None},
}
MU = 0.05
THREADS = (1, 2)
Curves = dict[str, float]  # "<series>, <threads>" -> ms, and "<series>" -> MB


def times(q: int, b: int, d: int, runs: int) -> Curves:
    """Medians in ms; all series and numbers of threads take turns. The limit is plain stores of
    the same points.
    """
    x, state = torch.randn(b, d), torch.tensor([0, 0])
    out = torch.empty(1 + q, b, d)
    differences = torch.randn(q, b)

    def estimate(kind: str) -> None:
        ops.perturb(x, state, q, MU, kind, out=out)
        ops.estimate_gradient(differences, state, x.shape, MU, kind)

    def limit() -> None:
        assert backend._C is not None
        backend._C.stream_fill(1.0, out.numel(), out.data_ptr(), torch.get_num_threads())

    functions = {
        "rademacher": partial(estimate, "rademacher"),
        "sphere": partial(estimate, "sphere"),
        "limit": limit,
    }
    taken: dict[str, list[float]] = {f"{name}, {n}": [] for name in functions for n in THREADS}
    for turn in range(runs + 1):
        for name, function in functions.items():
            for n in THREADS:
                torch.set_num_threads(n)
                started = time.perf_counter()
                function()
                if turn:  # the first turn warms up
                    taken[f"{name}, {n}"].append(1e3 * (time.perf_counter() - started))
    return {key: float(torch.tensor(own).median()) for key, own in taken.items()}


def memory(q: int, b: int, d: int) -> Curves:
    """Peak in MB, the points included. The limit is the points: the API is to get them, so they
    must be somewhere.
    """
    x, state, differences = torch.randn(b, d), torch.tensor([0, 0]), torch.randn(q, b)
    torch.set_num_threads(max(THREADS))

    def ours(kind: str) -> tuple[Tensor, Tensor]:
        points = ops.perturb(x, state, q, MU, kind)
        return points, ops.estimate_gradient(differences, state, x.shape, MU, kind)

    found = {
        "rademacher": extra_memory(partial(ours, "rademacher"), 0),
        "sphere": extra_memory(partial(ours, "sphere"), 0),
        "paper order (a)": extra_memory(
            partial(paper_order, x, q, MU, "sphere", lambda u: u.mean(2)), 0
        ),
        "limit": (1 + q) * b * d * 4 / 2**20,
    }
    return {name: megabytes for name, megabytes in found.items() if megabytes is not None}


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Two rows of panels, time and memory, a column for each number that was swept; the legends
    stand beside them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.2), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    for (above, below), name in zip(axes.T, SWEEPS):
        swept = [result for result in results if result["swept"] == name]
        values = [result["value"] for result in swept]
        for key in swept[0]["ms"]:
            series, threads = key.split(", ")
            what = "plain stores (the limit)" if series == "limit" else series
            label = f"{what}, {threads} thread{'s' if threads != '1' else ''}"
            line = "--" if threads == "1" else "-"
            above.plot(
                values, [result["ms"][key] for result in swept], line, label=label, **STYLES[series]
            )
        for series in swept[0]["mb"]:
            label = "the points (the limit)" if series == "limit" else series
            wide = {"linewidth": 6, "alpha": 0.3} if series == "limit" else {}  # ours lies on it
            below.plot(
                values,
                [result["mb"][series] for result in swept],
                label=label,
                **STYLES[series] | wide,
            )
        fixed = ", ".join(f"{other} = {size}" for other, size in CENTRE.items() if other != name)
        below.set_xlabel(f"{name}: {MEANING[name]}\n({fixed})")
        for axis in (above, below):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("perturb + gradient, ms")
    axes[1, 0].set_ylabel("peak memory, MB")
    for axis in axes[:, -1]:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument(
        "--results", type=Path, help="draw these results again, a scaling.json, and time nothing"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.results is None:
        results = []
        for name, values in SWEEPS.items():
            all_sizes = [_sizes(name, value) for value in values]
            timed = [times(**sizes, runs=options.runs) for sizes in all_sizes]
            held = [memory(**sizes) for sizes in all_sizes]
            results += [
                {"swept": name, "value": v, "ms": t, "mb": m}
                for v, t, m in zip(values, timed, held)
            ]
        (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    else:
        results = json.loads(options.results.read_text(encoding="utf-8"))
    draw(results).savefig(options.out / "scaling.png", dpi=110)


def _sizes(name: str, value: int) -> dict[str, int]:
    sizes = CENTRE | {name: value}
    return {"q": sizes["q"], "b": sizes["B"], "d": sizes["d"]}


if __name__ == "__main__":
    main()
