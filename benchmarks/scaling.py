"""Time and memory of perturb + gradient against q, B, d and threads, with the limits drawn: `scaling.png` and `.json`.

`python benchmarks/scaling.py --out docs/images`
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.baselines import paper_order  # noqa: E402
from benchmarks.harness import extra_memory  # noqa: E402
from bidfmkd_fast import ops  # noqa: E402
from bidfmkd_fast.ops import native  # noqa: E402

CENTRE = {"q": 50, "B": 50, "d": 3072}
SWEEPS = {"q": (10, 20, 50, 100, 200), "B": (10, 20, 50, 100, 200), "d": (784, 3072, 21168, 49152)}
COLOURS = {"rademacher": "tab:blue", "sphere": "tab:orange", "paper order (a)": "tab:red", "limit": "black"}
MU = 0.05
THREADS = (1, 2)
Curves = dict[str, float]  # "<series>, <threads>" -> ms, and "<series>" -> MB


def times(q: int, b: int, d: int, runs: int) -> Curves:
    """Medians in ms; all series and numbers of threads take turns. The limit is plain stores of the same points."""
    x, state = torch.randn(b, d), torch.tensor([0, 0])
    out = torch.empty(1 + q, b, d)
    differences = torch.randn(q, b)

    def estimate(kind: str) -> None:
        ops.perturb(x, state, q, MU, kind, out=out)
        ops.estimate_gradient(differences, state, x.shape, MU, kind)

    def limit() -> None:
        assert native._C is not None
        native._C.stream_fill(1.0, out.numel(), out.data_ptr(), torch.get_num_threads())

    functions = {"rademacher": partial(estimate, "rademacher"), "sphere": partial(estimate, "sphere"), "limit": limit}
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
    """Peak in MB, the points included. The limit is the points: the API is to get them, so they must be somewhere."""
    x, state, differences = torch.randn(b, d), torch.tensor([0, 0]), torch.randn(q, b)
    torch.set_num_threads(max(THREADS))

    def ours(kind: str) -> tuple[Tensor, Tensor]:
        points = ops.perturb(x, state, q, MU, kind)
        return points, ops.estimate_gradient(differences, state, x.shape, MU, kind)

    found = {
        "rademacher": extra_memory(partial(ours, "rademacher"), 0),
        "sphere": extra_memory(partial(ours, "sphere"), 0),
        "paper order (a)": extra_memory(partial(paper_order, x, q, MU, "sphere", lambda u: u.mean(2)), 0),
        "limit": (1 + q) * b * d * 4 / 2**20,
    }
    return {name: megabytes for name, megabytes in found.items() if megabytes is not None}


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
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), sharex="col", sharey="row")
    for (above, below), (name, values) in zip(axes.T, SWEEPS.items()):
        all_sizes = [_sizes(name, value) for value in values]
        timed = [times(**sizes, runs=options.runs) for sizes in all_sizes]
        held = [memory(**sizes) for sizes in all_sizes]
        results += [{"swept": name, "value": v, "ms": t, "mb": m} for v, t, m in zip(values, timed, held)]
        for key in timed[0]:
            series, threads = key.split(", ")
            what = "plain stores: the limit" if series == "limit" else series
            label = f"{what}, {threads} thread{'s' if threads != '1' else ''}"
            style = "--" if threads == "1" else "-"
            above.plot(values, [t[key] for t in timed], style, color=COLOURS[series], marker="o", ms=3, label=label)
        for series in held[0]:
            label = "the points: the limit" if series == "limit" else series
            wide = {"linewidth": 6, "alpha": 0.3} if series == "limit" else {}  # ours lies on it
            below.plot(values, [m[series] for m in held], color=COLOURS[series], marker="o", ms=3, label=label, **wide)
        fixed = ", ".join(f"{other} = {size}" for other, size in CENTRE.items() if other != name)
        below.set_xlabel(f"{name}   ({fixed})")
        for axis in (above, below):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("perturb + gradient, ms")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out / "scaling.png", dpi=110)
    (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")


def _sizes(name: str, value: int) -> dict[str, int]:
    sizes = CENTRE | {name: value}
    return {"q": sizes["q"], "b": sizes["B"], "d": sizes["d"]}


if __name__ == "__main__":
    main()
