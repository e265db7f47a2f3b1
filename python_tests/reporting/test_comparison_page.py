"""Write the page of a comparison: what it says, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import bidfmkd_fast as bf
from bidfmkd_fast.cli.main import main
from bidfmkd_fast.experiments.compare import run_comparison
from bidfmkd_fast.experiments.config import (
    BaselineConfig,
    EvaluationConfig,
    ExperimentConfig,
    PoolConfig,
)
from bidfmkd_fast.experiments.finished import read_finished
from bidfmkd_fast.reporting import comparison
from bidfmkd_fast.reporting.comparison import comparison_sections
from bidfmkd_fast.reporting.svg import chart_style
from bidfmkd_fast.training.run_folder import METRICS

CONFIG = ExperimentConfig(
    pool=PoolConfig(n_apis=2, n_way=2, width=2, epochs=1),
    train=bf.TrainConfig(
        n_per_class=3,
        meta_model_width=2,
        adapt_steps=1,
        survey=bf.SurveyConfig(n_images=16, epochs=2, batch_size=8),
        recovery=bf.RecoveryConfig(steps=2, num_directions=1, generator_width=2, latent_dim=4),
        distillation=bf.DistillationConfig(inner_steps=1),
        replay=bf.ReplayConfig(final_steps=60, n_query=2, inner_steps=1),
    ),
    baselines=BaselineConfig(steps=60, batch_size=4),
    evaluation=EvaluationConfig(n_episodes=3, n_query=2, adapt_lrs=(0.1, 0.3), n_val_episodes=2),
)
METHODS = ("random", "zero_query", "random_teachers", "single", "average", "bidf_mkd", "maml")


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison under two seeds, the second unfinished."""
    folder = tmp_path_factory.mktemp("comparison") / "compared"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # APIs that have hardly learned anything hardly react
        run_comparison(CONFIG, folder, methods=METHODS, seeds=[0], progress=False)
        run_comparison(CONFIG, folder, methods=["random"], seeds=[1], progress=False)
    return folder


def test_every_method_that_learns_has_a_curve(compared: Path) -> None:
    """Check the records of each method: a record for 25 outer steps, with steps and seconds."""
    stages = {
        "zero_query": "replay",
        "maml": "replay",
        "single": "distillation",
        "average": "distillation",
        "random_teachers": "survey",
        "bidf_mkd": "replay",
    }
    for method, stage in stages.items():
        lines = (compared / "seed_0" / method / METRICS).read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["stage"] == stage]
        assert len(records) >= 2, method
        assert all(0 <= record["accuracy"] <= 1 for record in records), method
        assert [r["seconds"] for r in records] == sorted(r["seconds"] for r in records), method
        asks = method in ("single", "average", "bidf_mkd")
        assert all((record["queries"] > 0) == asks for record in records), method
        if method in ("zero_query", "maml"):
            assert [record["step"] for record in records] == [25, 50, 60]
    assert not (compared / "seed_0" / "random" / METRICS).exists()


def test_the_page_has_accuracies_curves_and_settings(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(compared)]) == 0
    assert capsys.readouterr().out == f"page: {compared / 'report.html'}\n"
    text = (compared / "report.html").read_text(encoding="utf-8")
    assert "<h1>Comparison compared</h1>" in text and "7 methods" in text and "1 seed" in text
    for heading in ("Accuracy", "Paired differences, glyphs", "Learning curves", "Settings"):
        assert f">{heading}</h2>" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text
    with chart_style():
        sections = {
            section.anchor: section for section in comparison_sections(read_finished(compared))
        }
    # Survey, distillation and replay by steps and by seconds, and the recovery's loss.
    assert len(sections["curves"].charts) == 7
    assert ["train.survey.n_images", "16"] in sections["settings"].folded
    assert sections["accuracy"].tables[0][1][0] == "random initialisation"


def test_steps_are_those_of_a_stage() -> None:
    """A run counts outer steps of both stages together, and replays between its rounds."""

    def steps(records: list[dict[str, Any]], stage: str) -> list[float]:
        line = comparison._line("method", records, stage, "step")
        return [] if line is None else list(line.x)

    def record(stage: str, step: int, **more: str) -> dict[str, Any]:
        return {"stage": stage, "step": step, "accuracy": 0.5, **more}

    run = [record("recovery", 0, set="support")]
    for first in (0, 51):
        run += [record("distillation", first + 1)]
        run += [record("replay", first + 26), record("replay", first + 51)]
    assert steps(run, "distillation") == [1, 2]
    assert steps(run, "replay") == [25, 50, 75, 100]
    assert steps([record("replay", 25), record("replay", 30)], "replay") == [25, 30]
    assert steps([record("distillation", 25), record("distillation", 50)], "distillation") == [
        25,
        50,
    ]
    assert steps([record("replay", 25)], "replay") == []


def test_a_damaged_evaluation_is_named(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path / "folder")
    (tmp_path / "folder" / "seed_0" / "maml" / "evaluation.json").write_text("[{}]")
    assert main(["report", str(tmp_path / "folder")]) == 2
    error = capsys.readouterr().err
    assert "evaluation.json is damaged" in error and error.count("\n") == 1


def test_an_unfinished_seed_is_left_out(compared: Path) -> None:
    finished = read_finished(compared)
    unfinished = ", ".join(METHODS[1:])
    assert finished.left_out == [f"Left out: seed 1, not finished are {unfinished}."]
    assert finished.seeds == [0] and tuple(finished.results) == METHODS
    assert all(len(results) == 1 for results in finished.results.values())


@pytest.mark.parametrize("made", ["nothing finished", "sweep"])
def test_what_is_no_finished_comparison_is_refused(
    made: str, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(compared / "experiment.yaml", folder)
    if made == "sweep":
        (folder / "cells").mkdir()
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    wanted = "is a sweep" if made == "sweep" else "no method of"
    assert wanted in error and error.count("\n") == 1
    assert not (folder / "report.html").exists()
