"""The event files of TensorBoardCallback, read with TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.training import RunInfo

RECORDS: list[dict[str, Any]] = [
    {"stage": "survey", "step": 0, "epoch": 1, "loss": 2.0, "accuracy": 0.25, "queries": 40},
    {"stage": "survey", "step": 0, "epoch": 2, "loss": 1.5, "accuracy": 0.5, "queries": 40},
    {"stage": "recovery", "step": 0, "set": "support", "sets": 1, "loss": 0.5, "accuracy": 1.0}
    | {"queries": 90, "api": "api 0", "complete": True},
    {"stage": "recovery", "step": 0, "set": "query", "sets": 2, "loss": 0.75, "accuracy": 0.5}
    | {"queries": 140, "api": "api 0", "complete": True},
    {"stage": "distillation", "step": 1, "loss": 3.0, "accuracy": 0.5, "queries": 140},
    {"stage": "replay", "step": 26, "loss": 1.25, "accuracy": 0.75, "queries": 140},
]
INFO = RunInfo(bf.TrainConfig(), ("api 0",), 140, None)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all scalars of a folder as (position, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_the_scalars_of_every_stage_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = tmp_path / "bögen und läufe" / "first"
    callback = bf.TensorBoardCallback(folder)
    callback.on_start(INFO)
    for record in RECORDS:
        callback.on_record(record)
    found = scalars(folder)  # before the end: what a killed process leaves behind
    assert found == {
        "survey/loss": [(1, 2.0), (2, 1.5)],
        "survey/accuracy": [(1, 0.25), (2, 0.5)],
        "survey/queries": [(1, 40), (2, 40)],
        "recovery/support loss": [(1, 0.5)],
        "recovery/support accuracy": [(1, 1.0)],
        "recovery/support queries": [(1, 90)],
        "recovery/query loss": [(2, 0.75)],
        "recovery/query accuracy": [(2, 0.5)],
        "recovery/query queries": [(2, 140)],
        "distillation/loss": [(1, 3.0)],
        "distillation/accuracy": [(1, 0.5)],
        "distillation/queries": [(1, 140)],
        "replay/loss": [(26, 1.25)],
        "replay/accuracy": [(26, 0.75)],
        "replay/queries": [(26, 140)],
    }
    callback.on_end(None)
    assert scalars(folder) == found


def test_a_run_writes_its_records(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    spec = bf.APISpec(2, (1, 16, 16))
    weight = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    api = bf.FunctionBlackBox(lambda images: images.flatten(1) @ weight, spec)
    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=8, epochs=3, batch_size=4), meta_model_width=4
    )
    callback = bf.TensorBoardCallback(str(tmp_path / "board"))
    run = bf.BiDfMKD([api], config=config).fit(progress=False, callbacks=[callback])
    found = scalars(tmp_path / "board")
    assert found["survey/loss"] == [
        (record["epoch"], pytest.approx(record["loss"])) for record in run.history
    ]
    assert found["survey/queries"] == [(1, 8), (2, 8), (3, 8)]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "file").write_text("")
    api = bf.FunctionBlackBox(lambda images: images, bf.APISpec(2, (1, 16, 16)))
    callback = bf.TensorBoardCallback(tmp_path / "file")
    with pytest.raises(InputError, match=r"^TensorBoardCallback: cannot write to .*file/events"):
        bf.BiDfMKD([api]).fit(tmp_path / "run", False, [callback])
    assert not api.ledger.queries and not (tmp_path / "run").exists()


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    said = "TensorBoardCallback: tensorboard is not installed; `pip install 'tensorboard>=2.14'`"
    with pytest.raises(InputError) as raised:
        bf.TensorBoardCallback("board")
    assert str(raised.value) == said
