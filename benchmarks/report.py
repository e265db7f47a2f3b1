"""Write the committed results into `docs/performance.md` and `README.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

# The rows of the README's table: case, contender, and the name of the row there.
HIGHLIGHTS = [
    (
        "estimate/rademacher/150x3072x100",
        "store limit",
        "plain stores of the same 184 MB: the limit",
    ),
    ("estimate/rademacher/150x3072x100", "best eager (b)", "signs: best eager torch"),
    ("estimate/rademacher/150x3072x100", "torch.compile (c)", "signs: `torch.compile`"),
    (
        "estimate/rademacher/150x3072x100",
        "paper order (a)",
        "signs: eager torch in the paper's order",
    ),
    ("estimate/sphere/150x3072x100", "best eager (b)", "sphere: best eager torch"),
    ("estimate/sphere/150x3072x100", "paper order (a)", "sphere: eager torch in the paper's order"),
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
    ("recovery/defaults_5_steps", "plain, 5 splits (a)", "the same, API asked in five parts"),
    (
        "replay/4x5way1shot15query",
        "plain loop",
        "replay step of 4 tasks, second order: per-task loop",
    ),
    ("evaluation/5way1shot", "plain loop", "24 episodes of meta-test, 1-shot: per-task loop"),
    ("evaluation/5way5shot", "plain loop", "24 episodes of meta-test, 5-shot: per-task loop"),
    ("kd_loss/150x5", "eager", "`kd_loss`, both derivatives: eager torch"),
]


def read(results: Path) -> list[dict[str, Any]]:
    """Return the contents of every file of results."""
    return [
        json.loads(file.read_text(encoding="utf-8")) | {"stem": file.stem}
        for file in sorted(results.glob("*.json"))
    ]


def tables(results: Path) -> str:
    """Return a section for each device: what was run on it, and every case, ours first."""
    from benchmarks.bench import table
    from benchmarks.harness import Row

    sections = []
    for content in read(results):
        meta, rows = content["meta"], [Row(**row) for row in content["rows"]]
        rows.sort(key=lambda row: (row.case.split("/")[0], row.case, row.threads))
        if "cuda" in meta:
            architectures = ", ".join(meta["native"]["cuda_architectures"])
            kernels = f"CUDA {meta['cuda']}, kernels for {architectures}"
            by_stage = ", ".join(
                f"{stage} {minutes:.1f}" for stage, minutes in meta["minutes_of_the_whole"].items()
            )
            whole = " and ".join(f"{number:,} {of}" for of, number in meta["whole"].items())
            shown = f"A run of {whole} takes by these times, in minutes: {by_stage}."
        else:
            kernels = f"{meta['native']['compiler']}, instruction set {meta['native']['cpu_level']}"
            shown = f"![Ratios](../benchmarks/results/{content['stem']}.png)"
        head = (
            f"torch {meta['torch']}, Python {meta['python']}, {kernels}; "
            f"medians of {meta['runs']} runs."
        )
        sections.append(f"### {meta['device']}\n\n{head}\n\n{shown}\n\n```\n{table(rows)}\n```\n")
    return "\n".join(sections)


def highlights(results: Path) -> str:
    """Return the README's table: the first device, one thread."""
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


def rendered(document: str, text: str) -> str:
    """Return the document with `text` between its two markers."""
    begin, end = "<!-- results begin -->", "<!-- results end -->"
    before, rest = document.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n\n{text}\n{end}{after}"


if __name__ == "__main__":
    for page, make in (("docs/performance.md", tables), ("README.md", highlights)):
        file = ROOT / page
        document = rendered(file.read_text(encoding="utf-8"), make(ROOT / "benchmarks" / "results"))
        file.write_text(document, encoding="utf-8")
