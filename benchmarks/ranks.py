"""Measure a run in 1, 2 and 4 processes under torchrun: seconds per stage, bytes per outer step.

    python benchmarks/ranks.py [--ranks 1 2 4] [--tasks 4] [--folder runs/ranks]

On a machine with fewer cores than ranks this shows what sharing costs, and no gain. Every process
has one thread. The models are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bidfmkd_fast.data import make_glyphs  # noqa: E402
from bidfmkd_fast.meta import MetaModel  # noqa: E402
from bidfmkd_fast.pools import train_pool  # noqa: E402
from bidfmkd_fast.training.tables import text_table  # noqa: E402

N_APIS, STEPS, REPLAY = 8, 40, 100
CONFIG = """\
survey: {{n_images: 0}}
recovery: {{steps: {steps}}}
meta_batch_size: {tasks}
replay: {{final_steps: {replay}}}
"""


def run(folder: Path, size: int, pool: Path) -> dict[str, float]:
    """Train in `size` processes; return the seconds of each stage."""
    command = ["bidfmkd", "train", "--pool", str(pool), "--config", str(folder / "config.yaml")]
    launcher = ["torchrun", "--nproc-per-node", str(size), "--no-python"]
    subprocess.run(
        [*launcher, *command, "--out", str(folder / f"run_{size}")],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    summary = json.loads((folder / f"run_{size}" / "summary.json").read_text(encoding="utf-8"))
    seconds: dict[str, float] = summary["seconds"]
    return seconds


def main() -> None:
    """Train the pool, run with each number of ranks, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tasks", type=int, default=4, help="tasks of an outer step")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        pool = folder / "pool"
        train_pool(make_glyphs(), pool, n_apis=N_APIS, n_way=5, width=32, epochs=1, progress=False)
        content = CONFIG.format(steps=STEPS, tasks=options.tasks, replay=REPLAY)
        (folder / "config.yaml").write_text(content, encoding="utf-8")
        rows = [["ranks", "recovery, s an API", "outer step, ms", "gathered, kB a step", "bits"]]
        first = None
        for size in options.ranks:
            seconds = run(folder, size, pool)
            file = folder / f"run_{size}" / "meta_model.safetensors"
            first = file.read_bytes() if first is None else first
            n_parameters = sum(p.numel() for p in MetaModel.load(file).module.parameters())
            gathered = 0 if size == 1 else 4 * n_parameters * -(-options.tasks // size) * size
            rows.append(
                [
                    str(size),
                    f"{seconds['recovery'] / N_APIS:.2f}",
                    f"{1000 * seconds['replay'] / REPLAY:.0f}",
                    f"{gathered / 1000:,.0f}",
                    "same" if file.read_bytes() == first else "differ",
                ]
            )
        print(text_table(rows))
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
