"""Run the CUDA sources on the CPU, under a small emulation of the device (`emulated/`).

The emulation has blocks, threads, barriers and shuffles. The sources are compiled unchanged, with
address and undefined-behaviour checks, and compared with the CPU kernels at small shapes, so that
indexing and reductions stay right on machines without a GPU. `python_tests/cuda` and
`benchmarks/gpu_check.sh` test speed, and what only hardware does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
FLAGS = [
    *(
        "-std=gnu++17",
        "-O1",
        "-g1",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ),
    *(
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=shared_memory",
    ),
    *(f"-I{SOURCES}", f"-I{HERE / 'emulated'}", "-DBIDFMKD_LEVEL=portable"),
]
UNITS = [
    *(
        SOURCES / "cuda" / name
        for name in ("perturb.cu", "gradient.cu", "lengths.cu", "kd_loss.cu", "norm_pool.cu")
    ),
    *(
        SOURCES / "cpu" / name
        for name in ("perturb.cpp", "gradient.cpp", "lengths.cpp", "kd_loss.cpp", "norm_pool.cpp")
    ),
    HERE / "emulated_kernels.cpp",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no g++ here: the CUDA sources cannot be compiled for the CPU")
    folder = tmp_path_factory.mktemp("emulated")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    probed = subprocess.run(
        [compiler, *FLAGS[:11], probe, "-o", folder / "probe"], capture_output=True, text=True
    )
    if probed.returncode:
        pytest.skip(f"{compiler} has no sanitizers here: {probed.stderr.strip().splitlines()[0]}")
    objects, running = [], []
    for unit in UNITS:
        objects.append(folder / f"{unit.parent.name}_{unit.name}.o")
        command = [compiler, *FLAGS, "-c", "-x", "c++", unit, "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for unit, process in zip(UNITS, running):
        assert process.communicate() and process.returncode == 0, (
            f"{unit.name} does not compile for the CPU"
        )
    subprocess.run([compiler, *FLAGS, *objects, "-o", folder / "program"], check=True)
    return folder / "program"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_kernels_give_what_the_cpu_gives(program: Path, seed: int) -> None:
    """Check that all kernels agree with the CPU, at odd sizes and unaligned addresses.

    The threads of a block take turns in random order.
    """
    done = run(program, str(seed))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert int(done.stdout.split()[-2]) > 400


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", ""),
        ("out_of_bounds", "heap-buffer-overflow"),
        ("out_of_shared_bounds", "out of bounds"),
        ("misaligned", "misaligned address"),
        ("missed_barrier", "some threads never reach the barrier"),
        ("unset_shared_memory", ""),
        ("no_barrier", ""),
    ],
)
def test_faults_are_noticed(program: Path, fault: str, message: str) -> None:
    done = run(program, "fault", fault)
    assert (done.returncode == 0) == (fault == "none")
    assert message in done.stderr
