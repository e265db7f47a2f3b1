"""Check that the environment chooses the instruction set of the kernels, or is refused."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bidfmkd_fast.ops import backend

CODE = """
import torch, bidfmkd_fast as bf
print(bf.ops.backend.build_info()["cpu_level"])
bf.ops.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
print("computed")
"""


def run(level: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env=os.environ | {backend.CPU_LEVEL: level},
    )


def test_every_level_of_this_cpu_can_be_chosen() -> None:
    info = backend.build_info()
    assert info is not None, backend.load_error
    for level in info["cpu_levels"]:
        assert run(level).stdout == f"{level}\ncomputed\n"
    assert run("").stdout == f"{info['cpu_levels'][0]}\ncomputed\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 CPU")
def test_the_levels_are_those_that_the_cpu_has() -> None:
    (flags, *_) = re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    needed = {
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"},
        "avx2": {"avx2", "fma"},
        "portable": set(),
    }
    info = backend.build_info()
    assert info is not None, backend.load_error
    assert list(info["cpu_levels"]) == [
        level for level, instructions in needed.items() if instructions <= set(flags.split())
    ]


@pytest.mark.parametrize("level", ["avx1024", "AVX2", "none"])
def test_another_level_is_refused_when_a_kernel_is_used(level: str) -> None:
    done = run(level)
    assert done.returncode == 1
    assert "BIDFMKD_CPU_LEVEL must be one of" in done.stderr and repr(level) in done.stderr
