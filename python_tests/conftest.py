"""Share between all tests: fresh seeds that are printed, one thread, the folder of real images."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bidfmkd_fast
from bidfmkd_fast.ops import backend

SOURCE = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=None, help="seed of the random tests (default: a fresh one)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**31)
    torch.set_num_threads(1)  # tests are small: a second thread costs more than it brings
    _share_the_package_with_children()
    # A shell starts jobs in the background with Ctrl-C ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _share_the_package_with_children() -> None:
    """Let the processes that tests start import the same `bidfmkd_fast` as the tests.

    Python looks for modules in the current folder first when it runs `-c` or `-m`, and so does the
    server from which `multiprocessing` forks. In the root of the source tree it would find the
    source in the place of the installed package, without the native module.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # Python 3.10 does not know it: run from another folder
    # A relative path means another folder in a process that starts elsewhere.
    paths = [
        os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path
    ]
    if Path(bidfmkd_fast.__file__).resolve().parent == SOURCE / "bidfmkd_fast":
        # The tests themselves use the source, which `python -m pytest` finds without PYTHONPATH.
        paths.insert(0, str(SOURCE))
    if paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pytest_report_header(config: pytest.Config) -> list[str]:
    info = backend.build_info()
    served = (
        f"not loaded: {backend.load_error}"
        if info is None
        else f"{info['cpu_level']} of {info['cpu_levels']}"
    )
    data = os.environ.get("BIDFMKD_DATA", "not set: tests on real images are skipped")
    return [f"bidfmkd: --seed {config.option.seed}; native kernels {served}; BIDFMKD_DATA {data}"]


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the secrets of other tests, since messages use the same words."""
    monkeypatch.setattr("bidfmkd_fast.secrets._labels", {})
    monkeypatch.setattr("bidfmkd_fast.secrets._patterns", ())


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of this run: fresh, printed in the header, repeated by `--seed N`."""
    return int(request.config.option.seed)


@pytest.fixture
def real_data() -> Path:
    """Return the folder of real images; skip the test if there is none."""
    folder = os.environ.get("BIDFMKD_DATA")
    if not folder:
        pytest.skip("BIDFMKD_DATA is not set: no real images here")
    return Path(folder)


CPU_LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(params=CPU_LEVELS)
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each instruction set of the kernels in turn.

    The fixture fails without the native kernels, and skips an instruction set that this CPU lacks.
    """
    info = backend.build_info()
    assert info is not None, (
        f"the native kernels must load wherever tests run: {backend.load_error}"
    )
    if request.param not in info["cpu_levels"]:
        pytest.skip(f"this CPU has no {request.param}")
    assert backend._C is not None
    before = info["cpu_level"]
    backend._C.select_cpu_level(request.param)
    with backend.use_backend("native"):
        yield request.param
    backend._C.select_cpu_level(before)
