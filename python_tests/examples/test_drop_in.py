"""Run the loops of examples/drop_in before and after the swap."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "drop_in"
STYLES = ("bidf_mkd", "dfme", "maze")


def run(script: str, *arguments: str) -> str:
    # The scripts import their neighbours, as they may when they are called by hand.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, FOLDER / script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("backend", ["plain", "ours"])
def test_it_trains(style: str, backend: str) -> None:
    shown = run(f"{style}_style.py", "--backend", backend, "--steps", "5")
    losses = [float(loss) for loss in re.findall(r"loss (-?\d+\.\d+)", shown)]
    assert len(losses) == 5 and all(math.isfinite(loss) for loss in losses)


def test_the_overlay(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "drop_in.png"
    shown = run("overlay.py", "--steps", "3", "--seeds", "1", "--turns", "1", "--out", str(out))
    assert re.findall(r"^(\S+) +swap  ", shown, re.MULTILINE) == ["DFME", "MAZE", "BiDf-MKD"]
    with Image.open(out) as picture:
        assert picture.width > 1000
