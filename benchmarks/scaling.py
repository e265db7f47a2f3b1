"""Time of perturb + gradient against q, B, d and threads, with the store limit drawn: writes `scaling.png` and `.json`.

`python benchmarks/scaling.py --out docs/images`
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bidfmkd_fast import ops
from bidfmkd_fast.ops import native

CENTRE = {"q": 50, "B": 50, "d": 3072}
SWEEPS = {"q": (10, 20, 50, 100, 200), "B": (10, 20, 50, 100, 200), "d": (784, 3072, 21168, 49152)}
SERIES = ("rademacher", "sphere", "store limit")


def median_ms(functions: list[Callable[[], object]], runs: int) -> list[float]:
    """Medians of functions that take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(runs + 1):
        for own, function in zip(times, functions):
            started = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                own.append(1e3 * (time.perf_counter() - started))
    return [float(torch.tensor(own).median()) for own in times]


def point(q: int, b: int, d: int, runs: int) -> dict[str, float]:
    """One size: ms of each series."""
    x, state = torch.randn(b, d), torch.tensor([0, 0])
    out = torch.empty(1 + q, b, d)
    differences = torch.randn(q, b)

    def estimate(kind: str) -> None:
        ops.perturb(x, state, q, 0.05, kind, out=out)
        ops.estimate_gradient(differences, state, x.shape, 0.05, kind)

    def limit() -> None:
        assert native._C is not None
        native._C.stream_fill(1.0, out.numel(), out.data_ptr(), torch.get_num_threads())

    functions = [lambda: estimate("rademacher"), lambda: estimate("sphere"), limit]
    return dict(zip(SERIES, median_ms(functions, runs)))


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for axis, (name, values) in zip(axes, SWEEPS.items()):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            points = [point(**_sizes(name, value), runs=options.runs) for value in values]
            results += [{"swept": name, "value": v, "threads": threads, **p} for v, p in zip(values, points)]
            for series, colour in zip(SERIES, ("tab:blue", "tab:orange", "black")):
                style = "--" if threads == 1 else "-"
                label = f"{series}, {threads} thread{'s' * (threads > 1)}"
                axis.plot(
                    values, [p[series] for p in points], style, color=colour, marker="o", markersize=3, label=label
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        fixed = ", ".join(f"{other} = {size}" for other, size in CENTRE.items() if other != name)
        axis.set_xlabel(f"{name}   ({fixed})")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("perturb + gradient, ms")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out / "scaling.png", dpi=110)
    (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")


def _sizes(name: str, value: int) -> dict[str, int]:
    sizes = CENTRE | {name: value}
    return {"q": sizes["q"], "b": sizes["B"], "d": sizes["d"]}


if __name__ == "__main__":
    main()
