"""Check what the report of a run says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from training.test_comparison import comparison
from training.test_grids import recovered_set

from bidfmkd_fast.meta import MetaModel, TaskMemory
from bidfmkd_fast.training import RecoveredSet, Run, TrainConfig
from bidfmkd_fast.training.grids import write_grids
from bidfmkd_fast.training.report import write_report
from bidfmkd_fast.training.run_folder import RunFolder


def folder_of(tmp_path: Path, n_apis: int, complete: bool = True) -> tuple[Run, RunFolder]:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    memory, sets = TaskMemory(), []
    for index in range(n_apis):
        for part in ("support", "query"):
            made = recovered_set(torch.rand(2, 1, 8, 8), [0, 1], [0, 0], part)
            sets.append(RecoveredSet(index, made.api_name, made.class_names, part, made.recovered))
            memory.add(made.images, [("", "a"), ("", "b")])
    seconds = {"recovery": 1.25, "distillation": 0.5, "replay": 2.0}
    model = MetaModel(module)
    run = Run(model, model, memory, sets, [], 12345, 7, seconds, complete, TrainConfig())
    folder = RunFolder.create(tmp_path / "run", run.config)
    folder.finish(run)
    return run, folder


def test_the_report_has_table_cost_and_pictures_that_are_there(tmp_path: Path) -> None:
    run, folder = folder_of(tmp_path, n_apis=5)
    assert [path.name for path in write_grids(run, folder, n_apis=2)] == [
        "api_000.png",
        "api_001.png",
    ]
    text = write_report(folder, [comparison()], extra_seconds={"meta-test": 3.0}).read_text()
    for wanted in (
        "| ours | 35.00 ± 29.40 | 50.00 ± 19.60 |",
        "| ours less plain | +15.00 ± 9.80 |",
        "| run | 12,345 | 7 | 0 |",
        "| cap | none | none | none |",
        "| seconds, replay | 2.0 |",
        "| seconds, meta-test | 3.0 |",
        "| recovered as wanted, query sets | 50 % |",
        "](grids/api_001.png)",
        "orange frame with a filled corner",
        "Recovered images need not look like anything",
    ):
        assert wanted in text
    assert "budget ended" not in text
    assert {"bidfmkd_fast", "torch", "device"} <= set(folder.summary()["environment"])
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    assert all((folder.path / link).exists() for link in links if link != "metrics.jsonl")


def test_the_report_says_when_a_budget_ended(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, n_apis=1, complete=False)
    text = write_report(folder).read_text()
    assert "budget ended before every API" in text
    assert "## Accuracy" not in text
