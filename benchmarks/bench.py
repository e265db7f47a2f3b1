"""Run the benchmark cases: `python benchmarks/bench.py --cases 'perturb/*' --threads 1 2`.

`bidfmkd bench` does the same. The rows of each case are printed as it ends and written at once to
`<device>.json` and `.csv` in `--out`, so that a run that is cut off keeps what it has;
`<device>.png` comes at the end. `benchmarks/results` holds the committed results.

With `--compare FILE` our times are compared with older ones. Both are taken in units of the slowest
contender of the case, so that a busy machine is not mistaken for a regression.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    # The tree goes to the end of the path, so that the installed package, which has the native
    # module, comes first; only `benchmarks` is to be found in the tree.
    sys.path.append(str(ROOT))

REGRESSION = 1.25  # a slowdown by more than this is flagged


def device_name() -> str:
    """Return the name of the CPU with its number of cores."""
    import os

    from bidfmkd_fast.runtime.machine import cpu_name

    return f"{cpu_name()} x{os.cpu_count()}"


def run(patterns: list[str], threads: list[int], runs: int) -> Iterator[list[Any]]:
    """Run every matching case at every number of threads; yield the rows of each as it ends."""
    import benchmarks.cases  # noqa: F401  (registers them)
    from benchmarks.harness import CASES, run_case
    from bidfmkd_fast.runtime.progress import Bar

    chosen = [
        case
        for name, case in CASES.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise SystemExit(
            f"bench: no case matches {' '.join(patterns)}; there are: {', '.join(CASES)}"
        )
    with Bar("bench", len(threads) * len(chosen), "cases", True) as bar:
        for count, case in bar.over([(count, case) for count in threads for case in chosen]):
            yield run_case(case, runs, count)


_HEAD = ["case", "contender", "threads", "ms", "± IQR", "x ours", "GB/s", "x limit", "extra MB"]
# Rows are printed case by case; these widths keep them in columns.
_WIDTHS = (34, 26, 7, 9, 8, 7, 6, 7, 8)


def table(rows: list[Any], head: bool = True, least: Sequence[int] = (0,) * len(_HEAD)) -> str:
    """Return an aligned text table; a ratio above 1 means slower than ours.

    `least` has the least widths of the columns; `head` adds the header.
    """
    body = [
        [
            row.case,
            row.contender,
            str(row.threads),
            f"{row.median_ms:.3f}",
            f"{row.iqr_ms:.3f}",
            f"{row.ratio_to_ours:.2f}",
            _number(row.gb_per_s, 1),
            _number(row.ratio_to_limit, 2),
            _number(row.extra_mb, 1),
        ]
        for row in rows
    ]
    body = [_HEAD, *body] if head else body
    widths = [max(least[i], *(len(line[i]) for line in body)) for i in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        )
        for line in body
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]] if head else lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write(rows: list[Any], out: Path, runs: int) -> Path:
    """Write a JSON and a CSV file named after the device, and return the JSON file.

    Cases that were not run now stay in the files as they are.
    """
    import torch

    import bidfmkd_fast
    from benchmarks.harness import Row

    out.mkdir(parents=True, exist_ok=True)
    base = out / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    file = base.with_suffix(".json")
    ran = {(row.case, row.threads) for row in rows}
    before = [Row(**row) for row in json.loads(file.read_text())["rows"]] if file.exists() else []
    rows = [row for row in before if (row.case, row.threads) not in ran] + rows
    meta = {
        "device": device_name(),
        "package": bidfmkd_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native": bidfmkd_fast.ops.backend.build_info(),
        "runs": runs,
    }
    text = json.dumps({"meta": meta, "rows": [asdict(row) for row in rows]}, indent=1)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
    with base.with_suffix(".csv").open("w", newline="", encoding="utf-8") as table_file:
        writer = csv.DictWriter(table_file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return file


def plot(results: Path) -> None:
    """Draw a picture beside a file of results: the time of every baseline in units of ours."""
    import matplotlib

    from benchmarks.harness import Row

    rows = [Row(**row) for row in json.loads(results.read_text())["rows"]]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = ("ours", "store limit")  # also "ours, pairs" and so on
    baselines = [row for row in rows if not row.contender.startswith(own)]
    if not baselines:
        return
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(baselines) + 1.2))
    names = [f"{row.case}, {row.contender}, {row.threads} thr." for row in baselines]
    ratios = [row.ratio_to_ours for row in baselines]
    colours = ["tab:blue" if ratio >= 1 else "tab:red" for ratio in ratios]
    bars = axes.barh(names, ratios, color=colours)
    axes.bar_label(bars, labels=[f"{ratio:.1f}x" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(ratios))  # room for the labels
    axes.margins(y=0.01)
    axes.set_xlabel("time of the baseline / time of ours (above 1: ours is faster)")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(results.with_suffix(".png"), dpi=110)


def compare(rows: list[Any], file: Path) -> tuple[str, bool]:
    """Compare our times now with those in `file`; return a text, and True if any case regressed.

    Times are in units of the slowest contender of the case.
    """
    before = {
        (row["case"], row["contender"], row["threads"]): row
        for row in json.loads(file.read_text())["rows"]
    }
    lines, bad = [], False
    slowest: dict[tuple[str, int], Any] = {}
    for row in rows:
        key = (row.case, row.threads)
        if row.contender != "ours" and (
            key not in slowest or row.ratio_to_ours > slowest[key].ratio_to_ours
        ):
            slowest[key] = row
    for (name, threads), row in slowest.items():
        old = before.get((name, row.contender, threads))
        if old is None:
            lines.append(f"{name} ({threads} threads): not in {file.name}")
            continue
        change = old["ratio_to_ours"] / row.ratio_to_ours
        regressed = change > REGRESSION
        bad |= regressed
        mark = "  REGRESSION" if regressed else ""
        lines.append(
            f"{name} ({threads} threads): {change:.2f}x the time it took, "
            f"against {row.contender}{mark}"
        )
    return "\n".join(lines), bad


def bench(
    cases: list[str], threads: list[int], runs: int, out: Path, against: Path | None, seed: int
) -> int:
    """Run the cases, print and write the rows; return 1 if anything regressed, else 0.

    `seed` is that of the cases' random inputs.
    """
    import torch

    torch.manual_seed(seed)
    rows: list[Any] = []
    for some in run(cases, threads, runs):
        print(table(some, head=not rows, least=_WIDTHS), flush=True)
        rows += some
        file = write(rows, out, runs)  # now, so that a later failure loses nothing
    plot(file)
    print(f"\nwritten: {file}")
    if against is None:
        return 0
    text, bad = compare(rows, against)
    print("\n" + text)
    return int(bad)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the benchmarks."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["*"], help="name patterns; default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each contender")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        help="a results file to compare with; exit code 1 if anything regressed",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    options = parser.parse_args(arguments)
    return bench(
        options.cases, options.threads, options.runs, options.out, options.compare, options.seed
    )


if __name__ == "__main__":
    raise SystemExit(main())
