"""Share experiments out over two processes: the tables are those of a single process."""

from __future__ import annotations

import csv
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiments.conftest import TINY
from killing import process

from bidfmkd_fast.cli.main import main
from bidfmkd_fast.experiments.compare import run_comparison
from bidfmkd_fast.experiments.result_files import CSV
from bidfmkd_fast.experiments.sweep import run_sweep
from bidfmkd_fast.runtime import job
from bidfmkd_fast.settings import to_yaml

METHODS = ["random", "average", "bidf_mkd", "zero_query"]


def in_rank(rank: int, port: int, what: str, folder: Path) -> None:
    """Compare or sweep in `folder` as one of two ranks; write what this rank trained."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with job.joined():
        text = work(what, folder)
    assert bool(text) == (rank == 0)


def work(what: str, folder: Path) -> str:
    if what == "compare":
        return run_comparison(TINY, folder, methods=METHODS, seeds=(0, 1), progress=False)
    return run_sweep(folder.parent / "sweep.yaml", folder, seeds=(0, 1), progress=False)


def rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / CSV).open(newline="") as file:
        return [{**row, "seconds": None} for row in csv.DictReader(file)]


@pytest.mark.parametrize("what", ["compare", "sweep"])
def test_two_processes_give_the_tables_of_one(what: str, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(to_yaml(TINY))
    grid = {"train.replay.final_steps": [1, 2]}
    file = {"experiment": "experiment.yaml", "grid": grid}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(file))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    both = [process(in_rank, rank, port, what, tmp_path / "two") for rank in range(2)]
    for one in both:
        one.join(180)
    assert [one.exitcode for one in both] == [0, 0]
    work(what, tmp_path / "one")
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    assert not list((tmp_path / "two").rglob("*.partial"))


def test_a_command_of_one_process_refuses_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["pool", "--out", str(tmp_path / "pool")]) == 2
    assert capsys.readouterr().err == (  # rank 0 speaks for all
        "bidfmkd pool: this command runs in one process, and torchrun has started 4; start it "
        "without torchrun\n"
    )
    assert not list(tmp_path.iterdir())
