"""Writes the committed results into `docs/performance.md`, between its markers: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

BEGIN, END = "<!-- results begin -->", "<!-- results end -->"


def tables(results: Path) -> str:
    """One section a device: what it was run with, and every case as a row, ours first."""
    from benchmarks.bench import table
    from benchmarks.harness import Row

    sections = []
    for file in sorted(results.glob("*.json")):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        meta, rows = content["meta"], [Row(**row) for row in content["rows"]]
        rows.sort(key=lambda row: (row.case.split("/")[0], row.case, row.threads))
        head = (
            f"### {meta['device']}\n\ntorch {meta['torch']}, Python {meta['python']}, {meta['native']['compiler']}, "
            f"instruction set {meta['native']['cpu_level']}; medians of {meta['runs']} runs.\n"
        )
        sections.append(f"{head}\n![Ratios]({'../benchmarks/results/' + file.stem}.png)\n\n```\n{table(rows)}\n```\n")
    return "\n".join(sections)


def rendered(document: str, results: Path) -> str:
    """The document with what stands between the markers replaced."""
    before, rest = document.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}"


if __name__ == "__main__":
    page = ROOT / "docs" / "performance.md"
    page.write_text(rendered(page.read_text(encoding="utf-8"), ROOT / "benchmarks" / "results"), encoding="utf-8")
