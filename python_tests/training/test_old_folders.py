"""Open folders that `bidfmkd pool` and `bidfmkd train` of version 0.1 wrote (`old_folders`)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.training import TrainConfig
from bidfmkd_fast.training.run_folder import CONFIG, META_MODEL, RunFolder

OLD = Path(__file__).parent.parent / "old_folders"


def test_a_finished_run_opens() -> None:
    folder = RunFolder.open(OLD / "run")
    images = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    classifier = folder.meta_model().adapt(images, torch.arange(6) // 2)
    assert classifier.predict(images).shape == (6,)
    assert len(folder.memory()) == 24
    assert (
        folder.summary()["queries"]
        == sum(row["queries"] for row in folder.summary()["ledger"])
        == 144
    )
    assert folder.config().recovery.steps == 2


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read its recovered sets, which have no checksum, instead of asking for them again."""
    folder = tmp_path / "run"
    shutil.copytree(OLD / "run", folder)
    (folder / META_MODEL).unlink()
    (folder / "recovered" / "api_001_query.safetensors").unlink()
    apis = bf.load_pool(OLD / "pool")
    run = bf.BiDfMKD(apis, config=TrainConfig.from_yaml(folder / CONFIG)).fit(
        folder, progress=False
    )
    assert [api.ledger.queries for api in apis] == [0, 36]
    assert run.queries == 180
