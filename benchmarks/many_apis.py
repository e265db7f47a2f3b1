"""Measure what long lists of APIs and large task memories cost: start-up, memory, time per task.

    python benchmarks/many_apis.py [--apis 10000] [--images 200000] [--folder runs/many]

Each row is a process of its own, beside what one would write without the package's care: all
modules read at the start, all images in memory. The task memory of 10 million images is simulated:
each file stands there fifty times, ten times under each of five names of its classes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import bidfmkd_fast as bf  # noqa: E402
from bidfmkd_fast.data import make_glyphs  # noqa: E402
from bidfmkd_fast.files.tensors import read_tensors, write_tensors  # noqa: E402
from bidfmkd_fast.meta import TaskMemory  # noqa: E402
from bidfmkd_fast.pools import load_pool, read_pool, stored_box, train_pool  # noqa: E402
from bidfmkd_fast.pools.pool import write_list  # noqa: E402
from bidfmkd_fast.survey import SurveyConfig  # noqa: E402
from bidfmkd_fast.training import TrainConfig  # noqa: E402
from bidfmkd_fast.training.tables import text_table  # noqa: E402

USED, PER_SET, SHAPE, N_WAY, REPEATED, N_NAMES = 8, 100, (3, 32, 32), 5, 50, 5
Facts = dict[str, float]


def status(field: str) -> float:
    """Return a size from /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def make_pool(folder: Path, n_apis: int) -> None:
    """Train one classifier and list it under as many names, each with a file of its own."""
    train_pool(make_glyphs(), folder, n_apis=1, n_way=N_WAY, width=32, epochs=1, progress=False)
    (entry,) = read_pool(folder).trained
    for number in range(n_apis):
        os.link(folder / entry.file, folder / f"classifier_{number:05d}.safetensors")
    names = (f"classifier_{number:05d}.safetensors" for number in range(n_apis))
    write_list(folder, [replace(entry, file=name) for name in names])


def apis(folder: Path, care: bool, run: Path) -> Facts:
    """Load the pool, then survey the first `USED` APIs."""
    if not care:
        stored_box.MOST_LOADED = 10**9  # type: ignore[misc]
    before, started = status("RssAnon"), time.perf_counter()
    boxes = load_pool(folder)
    seconds = time.perf_counter() - started
    loaded = status("RssAnon") - before
    survey = SurveyConfig(n_images=200, epochs=1)
    bf.BiDfMKD(boxes[:USED], config=TrainConfig(survey=survey)).fit(run, progress=False)
    return {
        "start-up, s": seconds,
        "loaded, MiB": loaded,
        "peak, MiB": status("VmHWM"),
        "open files": len(os.listdir("/proc/self/fd")),
    }


def make_sets(folder: Path, n_images: int) -> None:
    """Write recovered images as a run does, `PER_SET` in a file."""
    for number in range(n_images // PER_SET):
        images = torch.rand(PER_SET, *SHAPE, generator=torch.Generator().manual_seed(number))
        write_tensors(folder / f"{number:06d}.safetensors", {"images": images})


def memory(folder: Path, care: bool, repeated: int) -> Facts:
    """Fill a task memory with the sets, `repeated` times under other names; draw tasks."""
    held, added = TaskMemory(), 0
    before, started = status("RssAnon"), time.perf_counter()
    per_class = PER_SET // N_WAY
    for number, file in enumerate(sorted(folder.iterdir())):
        images = read_tensors(file)[0]["images"]
        images = images if care else images.clone()
        for copy in range(repeated):
            name = f"{number} {copy % N_NAMES}"
            names = [f"{name} {label}" for label in range(N_WAY) for _ in range(per_class)]
            held.add(images, [("made up", name) for name in names])
            added += len(images)
    filled = time.perf_counter() - started
    took = []
    for index in range(200):
        started = time.perf_counter()
        held.sample_episode(N_WAY, 1, 15, seed=0, index=index)
        took.append(1000 * (time.perf_counter() - started))
    return {
        "images": added,
        "classes": len(held.classes),
        "filled in, s": filled,
        "own, MiB": status("RssAnon") - before,
        "first task, ms": took[0],
        "task, ms": statistics.median(took[1:]),
    }


def measured(what: str, folder: Path, care: bool, extra: str = "1") -> Facts:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--only", what, "--folder", str(folder), "--extra", extra]
    done = subprocess.run(
        [*command, *(() if care else ("--without",))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


def table(rows: dict[str, Facts]) -> str:
    """Return the facts as a table with a row each."""
    heads = list(next(iter(rows.values())))

    def cell(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"

    lines = [["", *heads]]
    lines += [[name, *(cell(facts[head]) for head in heads)] for name, facts in rows.items()]
    return text_table(lines)


def main() -> None:
    """Make the pool and the sets, measure each way, and print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--apis", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--extra", default="1", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    care = not options.without
    if options.only:
        facts: dict[str, Any] = (
            apis(options.folder, care, Path(options.extra))
            if options.only == "apis"
            else memory(options.folder, care, int(options.extra))
        )
        print(json.dumps(facts))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="many-"))
    try:
        make_pool(folder / "pool", options.apis)
        print(f"{options.apis:,} listed APIs, of which {USED} are surveyed\n")
        ways = {"modules read when asked": True, "all modules read at the start": False}
        rows = {
            name: measured("apis", folder / "pool", care, str(folder / f"run_{care}"))
            for name, care in ways.items()
        }
        print(f"{table(rows)}\n")
        (folder / "sets").mkdir()
        make_sets(folder / "sets", options.images)
        print("task memory, 5-way tasks of 1 + 15 images\n")
        sets = folder / "sets"
        rows = {
            "memory-mapped": measured("memory", sets, True),
            "all in memory": measured("memory", sets, False),
            "memory-mapped, simulated": measured("memory", sets, True, str(REPEATED)),
        }
        print(table(rows))
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
