"""Run the cases on a CUDA device: `python benchmarks/gpu.py --out FOLDER`.

`gpu_check.sh` builds the package, calls this, and runs the tests. Times are from CUDA events.
"ours" is the time on the device, from a graph of several calls in a row; "ours, called" also has
the time that Python takes to launch a call. The write and copy limits are measured in the same run.
Results are written after every group of cases. If a group fails, the others still run, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import bidfmkd_fast as bf

# The package above is the one that was built; only `benchmarks` comes from this tree, so the tree
# goes onto the path after the import.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench import table  # noqa: E402
from benchmarks.gpu_cases import GROUPS, STAGE_CASE  # noqa: E402
from benchmarks.harness import OURS, Row  # noqa: E402
from bidfmkd_fast import ops  # noqa: E402

WHOLE = {"APIs": 100, "outer steps": 60_000}  # the paper's run on CIFAR-FS


def extrapolated(rows: list[Row]) -> dict[str, float]:
    """Return the minutes of the paper's run at our default query settings, by stage.

    They follow from the times in `rows`. The training of the pool is left out.
    """
    ms = {row.case: row.median_ms for row in rows if row.contender == OURS}
    rounds = WHOLE["APIs"] / bf.TrainConfig().meta_batch_size
    stages = {
        "making the APIs": (f"{STAGE_CASE}making", WHOLE["APIs"]),
        "recovery": (f"{STAGE_CASE}recovery", WHOLE["APIs"]),
        "distillation": (f"{STAGE_CASE}distillation", rounds),
        "replay": (f"{STAGE_CASE}replay", WHOLE["outer steps"]),
        "evaluation": ("evaluation/600_episodes", 1),
    }
    return {stage: ms[case] * times / 6e4 for stage, (case, times) in stages.items() if case in ms}


def write(rows: list[Row], out: Path, runs: int) -> Path:
    """Write the results as JSON, named after the device, and return the file."""
    device = torch.cuda.get_device_name()
    meta: dict[str, Any] = {
        "device": device,
        "package": bf.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "native": ops.backend.build_info(),
        "runs": runs,
        "whole": WHOLE,
        "minutes_of_the_whole": extrapolated(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    text = json.dumps({"meta": meta, "rows": [asdict(row) for row in rows]}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def main() -> int:
    """Run all groups of cases; return 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", type=int, default=21, help="timed runs of each contender")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA device that torch can use")
    # The APIs are not trained, so that recovery doubts their answers.
    warnings.simplefilter("ignore", bf.ServiceWarning)
    problem = ops.backend.device_problem(torch.device("cuda", torch.cuda.current_device()))
    if problem is not None:
        raise SystemExit(f"gpu.py: {problem}")
    rows: list[Row] = []
    failed: list[str] = []
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(500):  # about a second, until the clocks have risen
        busy = (busy @ busy).clamp_(-1, 1)
    for cases in GROUPS:
        start, first = time.perf_counter(), len(rows)
        try:
            for row in cases(options.runs):
                rows.append(row)
        except Exception:  # the results of the other groups are still worth having
            traceback.print_exc()
            failed.append(cases.__name__)
        file = write(rows, options.out, options.runs)
        print(
            f"{table(rows[first:])}\n\n{cases.__name__}: {time.perf_counter() - start:.0f} s\n",
            flush=True,
        )
    minutes = ", ".join(f"{stage} {value:.1f}" for stage, value in extrapolated(rows).items())
    print(
        f"\n{WHOLE['APIs']} APIs and {WHOLE['outer steps']:,} outer steps, "
        f"minutes by these times: {minutes}"
    )
    print(f"written: {file}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
