"""Overlay the loss curves of the three loops before and after the swap, and time their steps.

Usage: `python examples/drop_in/overlay.py --steps 200 --out drop_in.png`. It needs matplotlib.
Contenders take turns; a ratio is the median of the ratios within each turn. "Without the API" is
the time of a step less the time spent in calls of the API.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import bidf_mkd_style
import dfme_style
import maze_style
import torch
from common import Make, black_box, train_api
from torch import Tensor

STYLES: dict[str, Make] = {
    "DFME": dfme_style.make,
    "MAZE": maze_style.make,
    "BiDf-MKD": bidf_mkd_style.make,
}
PLAIN, OURS = "#0072B2", "#D55E00"  # distinguishable by the colour-blind
LABELS = {"plain": "written out", "ours": "after the swap"}


class Timed:
    """An API whose calls are timed."""

    def __init__(self, api: Callable[[Tensor], Tensor]) -> None:
        self.api, self.seconds = api, 0.0

    def __call__(self, images: Tensor) -> Tensor:
        started = time.perf_counter()
        scores = self.api(images)
        self.seconds += time.perf_counter() - started
        return scores


def curve(make: Make, backend: str, seed: int, api: torch.nn.Module, steps: int) -> list[float]:
    step = make(backend, seed, api if backend == "plain" else black_box(api))
    return [step() for _ in range(steps)]


def smooth(losses: list[float], width: int = 15) -> list[float]:
    """Return the running mean over the last `width` steps."""
    return [statistics.fmean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]


def draw(curves: dict[str, dict[str, list[list[float]]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(12, 3.6), layout="constrained")
    for axis, (style, of_backend) in zip(axes, curves.items()):
        for backend, color, line in (("plain", PLAIN, "--"), ("ours", OURS, "-")):
            for seed, losses in enumerate(of_backend[backend]):
                axis.plot(
                    range(1, len(losses) + 1),
                    smooth(losses),
                    line,
                    color=color,
                    linewidth=1.3,
                    label=None
                    if seed
                    else {"plain": "written out", "ours": "after the swap"}[backend],
                )
        axis.set(title=f"{style} style", xlabel="step")
        axis.set_ylabel("objective of the images" if style == "BiDf-MKD" else "student's loss")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("Loss before and after the swap, a line per seed (running mean of 15 steps)")
    figure.savefig(out, dpi=130)


def peak_memory(step: Callable[[], float]) -> float:
    """Return by how many MB a step raises the memory of the process at most (Linux)."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key + ":")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return max(0.0, (status("VmHWM") - before) / 1024)


def time_steps(style: str, make: Make, api: torch.nn.Module, turns: int) -> None:
    """Print time and memory of a step: written out, after the swap, and with a box as the API."""
    apis = {
        "written out": Timed(api),
        "swap": Timed(api),
        "swap, TorchBlackBox": Timed(black_box(api)),
    }
    steps = {n: make("plain" if n == "written out" else "ours", 0, apis[n]) for n in apis}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    whole: dict[str, list[float]] = {name: [] for name in steps}
    rest: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            apis[name].seconds, started = 0.0, time.perf_counter()
            step()
            whole[name].append(1e3 * (time.perf_counter() - started))
            rest[name].append(whole[name][-1] - 1e3 * apis[name].seconds)
    for name in steps:
        ratios = [
            statistics.median(a / b for a, b in zip(of["written out"], of[name]))
            for of in (whole, rest)
        ]
        print(
            f"{style:9}  {name:20} {statistics.median(whole[name]):9.1f} {ratios[0]:8.2f}"
            f" {statistics.median(rest[name]):15.1f} {ratios[1]:8.2f} {memory[name]:10.1f}",
            flush=True,
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("drop_in.png"))
    options = parser.parse_args()
    api = train_api()
    print(
        f"{'style':9}  {'contender':20} {'ms a step':>9} {'times':>8} {'without the API':>15}"
        f" {'times':>8} {'memory, MB':>10}"
    )
    for style, make in STYLES.items():
        time_steps(style, make, api, options.turns)
    curves = {
        style: {
            backend: [
                curve(make, backend, seed, api, options.steps) for seed in range(options.seeds)
            ]
            for backend in ("plain", "ours")
        }
        for style, make in STYLES.items()
    }
    draw(curves, options.out)
    print("\nloss, mean of the last tenth of the steps, by seed")
    last = max(1, options.steps // 10)
    for style, of_backend in curves.items():
        for backend, runs in of_backend.items():
            means = " ".join(f"{statistics.fmean(losses[-last:]):8.3f}" for losses in runs)
            print(f"{style:9}  {backend:6} {means}")
    print(f"plot: {options.out}")


if __name__ == "__main__":
    main()
