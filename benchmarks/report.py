"""Write the committed results into the pages: `docs/performance.md` and `docs/query_economy.md`.

Usage: `python benchmarks/report.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.query_economy import economy  # noqa: E402

# The rows of the table in short: case, contender, and the text of the row.
HIGHLIGHTS = [
    (
        "estimate/rademacher/150x3072x100",
        "store limit",
        "plain stores of the same 184 MB (the limit)",
    ),
    ("estimate/rademacher/150x3072x100", "best eager (b)", "estimate with signs: best eager torch"),
    (
        "estimate/rademacher/150x3072x100",
        "torch.compile (c)",
        "estimate with signs: `torch.compile`",
    ),
    (
        "estimate/rademacher/150x3072x100",
        "paper order (a)",
        "estimate with signs: eager torch in the paper's order",
    ),
    (
        "estimate/sphere/150x3072x100",
        "best eager (b)",
        "estimate with sphere directions: best eager torch",
    ),
    (
        "estimate/sphere/150x3072x100",
        "paper order (a)",
        "estimate with sphere directions: eager torch in the paper's order",
    ),
    ("black_box/conv4_32/2000x28x28", "plain module", "local Conv4 API: the module called plainly"),
    (
        "recovery/paper_settings",
        "plain, 5 splits (a)",
        "recovery step, the paper's settings: plain torch",
    ),
    (
        "recovery/defaults_5_steps",
        "plain, one call",
        "five recovery steps, our defaults: plain torch",
    ),
    (
        "recovery/defaults_5_steps",
        "plain, 5 splits (a)",
        "the same, plain torch that asks the API in five parts",
    ),
    (
        "replay/4x5way1shot15query",
        "plain loop",
        "replay step of 4 tasks, second order: a loop over tasks",
    ),
    ("evaluation/5way1shot", "plain loop", "24 episodes of meta-test, 1-shot: a loop over tasks"),
    ("evaluation/5way5shot", "plain loop", "24 episodes of meta-test, 5-shot: a loop over tasks"),
    ("kd_loss/150x5", "eager", "`kd_loss`, both derivatives: eager torch"),
]


def read(results: Path) -> list[dict[str, Any]]:
    """Read the contents of every results file."""
    return [
        json.loads(file.read_text(encoding="utf-8")) | {"stem": file.stem}
        for file in sorted(results.glob("*.json"))
    ]


def tables(results: Path) -> str:
    """Return a section per device: what it was run with, and every case as a row, ours first."""
    from benchmarks.bench import table
    from benchmarks.harness import Row

    sections = []
    for content in read(results):
        meta, rows = content["meta"], [Row(**row) for row in content["rows"]]
        rows.sort(key=lambda row: (row.case.split("/")[0], row.case, row.threads))
        if "cuda" in meta:
            architectures = ", ".join(meta["native"]["cuda_architectures"])
            kernels = f"CUDA {meta['cuda']}, kernels for {architectures}"
            stages = ", ".join(
                f"{stage} {minutes:.1f}" for stage, minutes in meta["minutes_of_the_whole"].items()
            )
            whole = " and ".join(f"{number:,} {of}" for of, number in meta["whole"].items())
            runs = meta["runs"]
            shown = f"At these speeds a run of {whole} takes, in minutes: {stages}."
        else:
            kernels = f"{meta['native']['compiler']}, instruction set {meta['native']['cpu_level']}"
            each = sorted({row.runs for row in rows})  # cases are added to older results
            runs = f"{each[0]} to {each[-1]}" if len(each) > 1 else each[0]
            shown = f"![Ratios](../benchmarks/results/{content['stem']}.png)"
        versions = f"torch {meta['torch']}, Python {meta['python']}, {kernels}"
        head = f"{versions}; medians of {runs} runs."
        sections.append(f"### {meta['device']}\n\n{head}\n\n{shown}\n\n```\n{table(rows)}\n```\n")
    return "\n".join(sections)


def highlights(results: Path) -> str:
    """Return the table in short: the first device, one thread."""
    content = read(results)[0]
    rows = {(row["case"], row["contender"]): row for row in content["rows"] if row["threads"] == 1}
    lines = ["| one thread | ms | ours, ms | times ours |", "|---|---:|---:|---:|"]
    for case, contender, name in HIGHLIGHTS:
        row, ours = rows[case, contender], rows[case, "ours"]
        numbers = (row["median_ms"], ours["median_ms"], row["ratio_to_ours"])
        lines.append(f"| {name} | {' | '.join(map(_three_digits, numbers))} |")
    return "\n".join(lines) + "\n"


def _three_digits(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def performance_tables() -> dict[str, str]:
    """Return the tables of `docs/performance.md` by the names of their markers."""
    results = ROOT / "benchmarks" / "results"
    return {"highlights": highlights(results), "results": tables(results)}


def economy_tables() -> dict[str, str]:
    """Return the tables of `docs/query_economy.md` by the names of their markers."""
    results = ROOT / "benchmarks" / "query_economy" / "results"
    sweeps = ("omniglot", "cifar_fs", "n_apis", "seconds")
    made = {name: economy.table_of_sweeps(results, name) for name in sweeps}
    comparisons = {
        "mixed_architectures": {
            "rate chosen on meta-val": ("omniglot", "meta_val"),
            "own rate": ("omniglot", "own"),
        },
        "mixed_data_sets": {
            "Omniglot": ("omniglot", "own"),
            "CIFAR-FS": ("cifar_fs", "own"),
            "Caltech-101": ("caltech101", "own"),
        },
    }
    for name, columns in comparisons.items():
        made[name] = economy.table_of_methods(results / f"{name}.csv", columns)
    return {name: f"{table}\n" for name, table in made.items()}


PAGES = {"performance.md": performance_tables, "query_economy.md": economy_tables}


def rendered(page: str, made: Mapping[str, str]) -> str:
    """Return the text of a page with new tables, by name, between its markers."""
    for name, table_text in made.items():
        begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
        before, rest = page.split(begin, 1)
        _, after = rest.split(end, 1)
        page = f"{before}{begin}\n\n{table_text}\n{end}{after}"
    return page


if __name__ == "__main__":
    for name, make in PAGES.items():
        file = ROOT / "docs" / name
        page = rendered(file.read_text(encoding="utf-8"), make())
        file.write_text(page, encoding="utf-8")
