"""Test that nvcc, where there is one, keeps the values of every kernel in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xptxas=-v",
    *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)),
    "-c",
]


def test_no_kernel_spills(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if compiler is None:
        pytest.skip("no nvcc here")
    units = sorted(SOURCES.glob("*.cu"))
    running = [
        subprocess.Popen(
            [compiler, *FLAGS, unit, "-o", tmp_path / f"{unit.stem}.o"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for unit in units
    ]
    for unit, process in zip(units, running):
        report = process.communicate()[1]
        assert process.returncode == 0, report
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(spills) >= 2, (
            f"{unit.name}: no kernel of each architecture in what nvcc told:\n{report}"
        )
        assert all(pair == ("0", "0") for pair in spills), f"{unit.name}:\n{report}"
