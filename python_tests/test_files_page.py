"""Check that `docs/files.md` names every key that a run, a pool and a comparison write."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from bidfmkd_fast.cli.main import main
from bidfmkd_fast.experiments.compare import run_comparison
from bidfmkd_fast.experiments.config import ExperimentConfig, PoolConfig
from bidfmkd_fast.training import ReplayConfig, TrainConfig

PAGE = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
SETTINGS = (
    *("survey.n_images=40", "survey.epochs=1", "n_per_class=3", "meta_model_width=4"),
    *("recovery.steps=1", "recovery.num_directions=1", "recovery.generator_width=4"),
    *("replay.n_query=2", "replay.final_steps=1", "distillation.inner_steps=1"),
)
BY_NAME = ("skipped", "files", "accuracy_by_api")  # mappings whose keys are names of the user's

MODELS = {"random initialisation", "BiDf-MKD"}  # keys of accuracy.json


def section(title: str) -> str:
    """Return the part of the page under a heading, up to the next heading."""
    return PAGE.split(f"### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]


def keys_in(value: Any) -> Iterator[str]:
    """Yield every key of nested values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in BY_NAME:
                yield from keys_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_in(inner)


def content_of(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pool, a run of all stages, and a comparison."""
    folder = tmp_path_factory.mktemp("files")
    small = ["--n-apis=2", "--n-way=3", "--width=2", "--epochs=1"]
    assert main(["pool", *small, "--out", str(folder / "pool")]) == 0
    settings = [f"--config.{setting}" for setting in SETTINGS]
    paths = ["--pool", str(folder / "pool"), "--out", str(folder / "run")]
    assert main(["train", "--max-queries=1000", *paths, *settings]) == 0
    episodes = ["--n-episodes=2", "--n-query=2", "--n-way=3", "--n-shot=1"]
    assert main(["evaluate", "--run", str(folder / "run"), *episodes]) == 0
    config = ExperimentConfig(
        pool=PoolConfig(n_apis=1, n_way=3, width=2, epochs=1),
        train=TrainConfig(replay=ReplayConfig(n_query=2)),
    )
    evaluation = replace(config.evaluation, n_shots=(1,), n_query=2, n_episodes=2)
    evaluation = replace(evaluation, adapt_lrs=(0.1, 0.3), n_val_episodes=1)
    config = replace(config, evaluation=evaluation)
    run_comparison(config, folder / "out", methods=["random"], progress=False)
    return folder


NAMES = (
    "metrics.jsonl",
    "summary.json",
    "accuracy.json",
    "plan.json",
    "source.yaml",
    "evaluation.json",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_on_the_page(folder: Path, name: str) -> None:
    files = [file for file in folder.rglob(name) if file.is_file()]
    keys = {key for file in files for key in keys_in(content_of(file))} - MODELS
    assert files and len(keys) > 1
    assert [key for key in sorted(keys) if f"`{key}`" not in section(name)] == []


def test_the_metrics_have_every_stage(folder: Path) -> None:
    records = content_of(folder / "run" / "metrics.jsonl")
    stages = {record["stage"] for record in records}
    assert stages == {"survey", "recovery", "distillation", "replay"}
    assert all(f"`{stage}`" in section("metrics.jsonl") for stage in stages)


def test_the_columns_are_on_the_page(folder: Path) -> None:
    with (folder / "out" / "results.csv").open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    assert [name for name in columns if f"`{name}`" not in section("results.csv")] == []
    with closing(sqlite3.connect(folder / "run" / "ledger.sqlite")) as ledger:
        (table,) = ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchone()
        columns = [row[0] for row in ledger.execute("SELECT * FROM apis").description]
    assert [x for x in (table, *columns) if f"`{x}`" not in section("ledger.sqlite")] == []


def test_the_tensors_of_a_set_are_on_the_page(folder: Path) -> None:
    tensors = load_file(folder / "run" / "recovered" / "api_000_support.safetensors")
    assert [name for name in tensors if f"`{name}`" not in section("tensors")] == []


def test_every_file_is_on_the_page(folder: Path) -> None:
    for at in (folder / "run", folder / "out"):
        names = {file.name for file in at.iterdir()}
        patterns = [
            re.sub(r"SEED(_DIGEST)?", r"\\w+", name).split("/")[0]
            for name in re.findall(r"`([\w./]+)`", PAGE)
        ]
        missing = [name for name in names if not any(re.fullmatch(p, name) for p in patterns)]
        assert missing == [], at


def test_the_snippet_plots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    (folder / "runs").mkdir()
    (folder / "runs" / "train").symlink_to(folder / "run")
    monkeypatch.chdir(folder)
    exec(PAGE.split("```python\n")[1].split("```")[0], {})
    assert Path("metrics.png").stat().st_size > 1000
