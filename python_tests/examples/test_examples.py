"""Check that every example runs as it stands, and is short enough to be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 4 and not done.stderr.count("Traceback")


def test_the_pictures_of_the_tutorial(tmp_path: Path) -> None:
    script = ROOT / "examples" / "tutorial" / "pictures.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, timeout=300, check=True)
    counts = {
        folder: len(list(tmp_path.glob(f"{folder}/*/*.png"))) for folder in ("support", "new")
    }
    assert counts == {"support": 25, "new": 75} and len(list(tmp_path.glob("support/*"))) == 5


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        "quickstart",
        "own_api",
        "zeroth_order_in_your_loop",
    }
