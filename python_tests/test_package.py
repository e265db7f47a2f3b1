"""The package as a whole: its public names, what importing it costs, and `python -m bidfmkd_fast`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast import __main__ as diagnostics
from bidfmkd_fast.ops import native

PUBLIC = {
    *("ZerothOrder", "as_differentiable", "APISpec", "Budget", "BlackBox", "TorchBlackBox", "FunctionBlackBox"),
    *("RecoveryConfig", "recover", "Recovered", "TrainConfig", "BiDfMKD", "MetaModel", "evaluate"),
    *("paired_difference", "load_dataset", "load_pool", "train_pool", "ops", "errors", "__version__"),
    *("DistillationConfig", "ReplayConfig", "Episode", "EpisodeSampler"),
}


def test_public_names() -> None:
    assert set(bf.__all__) == PUBLIC
    assert all(getattr(bf, name) is not None for name in PUBLIC)


def test_importing_it_brings_in_neither_the_command_line_nor_pictures() -> None:
    unwanted = ("jsonargparse", "PIL", "matplotlib", "torchvision", "bidfmkd_fast.cli", "bidfmkd_fast.scenarios.demo")
    code = f"import sys, bidfmkd_fast; print([name for name in {unwanted} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_diagnostics_tell_versions_and_who_serves_what(capsys: pytest.CaptureFixture[str]) -> None:
    diagnostics.main()
    lines = capsys.readouterr().out.splitlines()
    told = {line.split("  ")[0]: line for line in lines}
    assert f" {bf.__version__}" in told["bidfmkd_fast"]
    assert {"python", "torch", "numpy", "native module", "cpu"} <= set(told)
    assert ("native kernels" in told["cpu"]) == (native.device_problem(torch.device("cpu")) is None)
    info = native.build_info()
    if info is not None:
        assert [line for line in lines if line.lstrip().startswith("CUDA: ")], "which GPUs it was built for is not told"
    value_columns = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}
    assert len(value_columns) == 1, "the values are not aligned"


def test_diagnostics_give_the_reason_when_there_is_no_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "load_error", "ImportError: no such file")
    rows = dict(diagnostics.diagnostics())
    assert rows["native module"] == "not available"
    assert rows["load error"] == "ImportError: no such file"
    assert "plain torch" in rows["cpu"]
