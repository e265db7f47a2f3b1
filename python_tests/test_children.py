"""Check that processes started by tests import the package that the tests import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bidfmkd_fast

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10 does not know PYTHONSAFEPATH"
)
# Prints what a process finds that `multiprocessing` starts, by the method named as the argument.
BY_MULTIPROCESSING = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
context = multiprocessing.get_context(sys.argv[1])
context.set_forkserver_preload(["decoy"])
LOOK = "(__import__('importlib.util').util.find_spec('bidfmkd_fast').origin, 'decoy' in "
if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        print(*pool.submit(eval, LOOK + "__import__('sys').modules)").result())
"""


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """Return a folder like the root of the source tree: the modules in it are the wrong ones."""
    (tmp_path / "bidfmkd_fast").mkdir()
    for name in ("bidfmkd_fast/__init__.py", "bidfmkd_fast/__main__.py", "decoy.py"):
        (tmp_path / name).write_text("print('a module of the current folder')\n")
    return tmp_path


def printed(child: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=child, capture_output=True, text=True, check=True).stdout


def test_a_command_line(child: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('bidfmkd_fast').origin)"
    assert printed(child, "-c", code) == f"{bidfmkd_fast.__file__}\n"


def test_a_module(child: Path) -> None:
    told = printed(child, "-m", "bidfmkd_fast")
    assert told.startswith("bidfmkd_fast ") and "current folder" not in told


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(child: Path, method: str) -> None:
    told = printed(child, "-c", BY_MULTIPROCESSING, method)
    assert told == f"{bidfmkd_fast.__file__} False\n"
