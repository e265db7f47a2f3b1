"""What all tests share: fresh seeds that are printed, one thread, the real data's folder."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bidfmkd_fast.ops import backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=None, help="seed of the random tests (default: a fresh one)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**31)
    torch.set_num_threads(1)  # tests are small: a second thread costs more than it brings


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
    """No test knows the secrets of another: they are words that messages use, too."""
    monkeypatch.setattr("bidfmkd_fast.secrets._labels", {})
    monkeypatch.setattr("bidfmkd_fast.secrets._patterns", ())


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that is fresh in every run, printed in the header, and set again by `--seed N`."""
    return int(request.config.option.seed)


@pytest.fixture
def real_data() -> Path:
    """The folder of the real images, or a skip that says so."""
    folder = os.environ.get("BIDFMKD_DATA")
    if not folder:
        pytest.skip("BIDFMKD_DATA is not set: no real images here")
    return Path(folder)


CPU_LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(params=CPU_LEVELS)
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the kernels in turn; without the native kernels it fails, without
    the set it skips.
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
