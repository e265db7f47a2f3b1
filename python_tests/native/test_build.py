"""Test what CMakeLists.txt finds, decides and prints before anything is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake here")
# Stands in for pybind11, which the environment of the tests lacks: nothing is compiled here.
PYBIND11 = "function(pybind11_add_module name)\n  add_library(${ARGV})\nendfunction()\n"


def configure(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Configure into `folder`; return exit status and output, with runs of spaces made one."""
    packages = folder.parent / "packages"
    packages.mkdir(exist_ok=True)
    (packages / "pybind11Config.cmake").write_text(PYBIND11)
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("BIDFMKD_CUDA", "CUDACXX")
    }
    command = [
        "cmake",
        "-S",
        SOURCE,
        "-B",
        folder,
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ]
    command.append(f"-Dpybind11_DIR={packages}")
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_the_environment_variable_turns_cuda_off_and_on(tmp_path: Path) -> None:
    """Set BIDFMKD_CUDA in the environment, as in `BIDFMKD_CUDA=OFF pip install .`.

    The variable decides also in a folder that was configured before; an explicit -D overrides it.
    """
    assert "none (BIDFMKD_CUDA=OFF)" in configure(tmp_path / "build", BIDFMKD_CUDA="OFF")[1]
    status, output = configure(
        tmp_path / "build", BIDFMKD_CUDA="ON", CUDACXX="/nowhere/nvcc", PATH="/usr/bin:/bin"
    )
    assert "BIDFMKD_CUDA=OFF)" not in output
    if shutil.which("nvcc", path="/usr/bin:/bin") is None:
        assert status != 0 and "BIDFMKD_CUDA=ON, but there is no nvcc" in output
    assert (
        "none (BIDFMKD_CUDA=OFF)"
        in configure(tmp_path / "build", "-DBIDFMKD_CUDA=OFF", BIDFMKD_CUDA="ON")[1]
    )


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", BIDFMKD_CUDA="maybe")
    assert status != 0 and "BIDFMKD_CUDA must be AUTO, ON or OFF; got 'MAYBE'" in output


def test_without_a_compiler_the_message_says_what_to_install(tmp_path: Path) -> None:
    """Check that without a compiler on PATH the error says how to install a compiler."""
    for name in ("cmake", "make", "ninja", "uname"):
        if (found := shutil.which(name)) is not None:
            (tmp_path / name).symlink_to(found)
    status, output = configure(tmp_path / "build", PATH=str(tmp_path), CXX="/nowhere/c++")
    assert status != 0
    assert (
        "the kernels need a C++17 compiler, and none was found. Install one (Debian, Ubuntu: "
        "apt-get install g++" in output
    )
