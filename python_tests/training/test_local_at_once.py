"""Recover local APIs at once, as on a GPU: the same sets and models as one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.test_bidf_mkd import TINY, pool, same

from bidfmkd_fast.black_box import Budget
from bidfmkd_fast.training import (
    BiDfMKD,
    local_at_once,
)
from bidfmkd_fast.training.run_folder import RunFolder


def test_sets_of_a_group_made_at_once(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Recover at once, as on a GPU: sets and model are the same, also after an interrupt."""
    config = replace(TINY, seed=seed)
    expected = BiDfMKD(pool(4), config=config).fit()
    monkeypatch.setattr(local_at_once, "on_one_gpu", lambda run: True)
    save, left = RunFolder.save_recovered, [5]

    def cut_off(self: RunFolder, recovered_set: Any) -> Any:
        held = save(self, recovered_set)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return held

    monkeypatch.setattr(RunFolder, "save_recovered", cut_off)
    with pytest.raises(KeyboardInterrupt):
        BiDfMKD(pool(4), config=config).fit(tmp_path / "run")
    left[0] = 99
    for run in (
        BiDfMKD(pool(4), config=config).fit(),
        BiDfMKD(pool(4), config=config).fit(tmp_path / "run"),
    ):
        assert run.complete
        assert run.queries == expected.queries
        for found, wanted in zip(run.recovered, expected.recovered, strict=True):
            assert (found.api_index, found.part) == (wanted.api_index, wanted.part)
            assert torch.equal(found.images, wanted.images)
        for value, wanted_value in zip(
            run.meta_model.module.parameters(), expected.meta_model.module.parameters()
        ):
            assert torch.equal(value, wanted_value)


def test_a_budget_pays_sets_one_after_the_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep sets whole: recovered at once, four sets would share the rest of the budget."""
    config = replace(TINY, seed=seed, meta_batch_size=4)
    set_of = BiDfMKD(pool(1), config=config).planned_queries() // 2
    runs = []
    for at_once in (False, True):
        monkeypatch.setattr(local_at_once, "on_one_gpu", lambda run, at_once=at_once: at_once)
        runs.append(
            BiDfMKD(
                pool(4), config=config, budget=Budget(max_queries=3 * set_of + set_of // 2)
            ).fit()
        )
    assert same(*runs)
    assert runs[0].queries == runs[1].queries
    assert [record["stage"] for record in runs[1].history].count("distillation") == 1
