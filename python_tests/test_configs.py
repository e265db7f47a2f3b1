"""Test that each file of `configs/` can be read and does what its comment says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.shipped import shipped_folder
from bidfmkd_fast.experiments.sweep_file import read_sweep
from bidfmkd_fast.settings import plain_values, settings_from_yaml
from bidfmkd_fast.training import TrainConfig, paper

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))


def test_there_is_one_for_every_scenario() -> None:
    names = {file.stem for file in EXPERIMENTS}
    both = {"cifar_fs_ss", "cifar_fs_sh", "omniglot_ss", "omniglot_sh", "mh"}
    assert both | {f"{name}_small" for name in both} | {"mini_imagenet_ss", "cub_ss"} <= names


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiment_is_read_and_named_after_what_it_is(file: Path) -> None:
    config = settings_from_yaml(ExperimentConfig, file)
    parts = file.stem.split("_")
    assert config.pool.scenario == next(part for part in parts if part in ("ss", "sh", "mh"))
    assert config.pool.scenario == "mh" or file.stem.startswith(config.pool.data_sets[0])
    assert ("omniglot" in config.pool.data_sets) == (config.pool.inverted == ("omniglot",))
    assert f"--config configs/{file.name}" in file.read_text()


@pytest.mark.parametrize(
    "file",
    [file for file in EXPERIMENTS if "_small" not in file.stem],
    ids=lambda file: file.stem,
)
def test_the_full_ones_have_the_settings_of_the_paper(file: Path) -> None:
    config = settings_from_yaml(ExperimentConfig, file)
    wanted = plain_values(paper()) | {"meta_model_side": 84 if config.pool.scenario == "mh" else 0}
    assert plain_values(config.train) == wanted
    assert config.pool.n_apis in (99, 100) and config.evaluation.n_episodes == 600


@pytest.mark.parametrize(
    "file", [file for file in EXPERIMENTS if file.stem.endswith("_v01")], ids=lambda file: file.stem
)
def test_those_of_version_01_have_its_method_and_the_same_pool(file: Path) -> None:
    old = settings_from_yaml(ExperimentConfig, file)
    new = settings_from_yaml(ExperimentConfig, file.with_stem(file.stem.removesuffix("_v01")))
    v01 = TrainConfig.v01()
    assert new.train.survey.n_images > 0 == new.train.recovery.steps
    assert old.train.recovery.steps == v01.recovery.steps
    assert new.evaluation.episode_seed == 0
    kept = {name: getattr(v01, name) for name in ("survey", "adapt_steps", "adapt_lr")}
    rates = old.evaluation.adapt_lrs
    assert old == replace(
        new,
        train=replace(new.train, recovery=old.train.recovery, **kept),
        evaluation=replace(new.evaluation, episode_seed=None, adapt_lrs=rates),
    )


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_is_read(file: Path) -> None:
    sweep = read_sweep(file)
    assert len(sweep.cells) > 3
    assert f"--file configs/sweeps/{file.name}" in file.read_text()
    if file.stem == "ablation":
        by_name = {cell.name: cell.config.train for cell in sweep.cells}
        assert by_name["all of it"] == sweep.base.train
        assert not by_name["without boundary recovery"].boundary_recovery
        assert not by_name["without replay"].task_replay
        assert not by_name["without bi-level distillation"].bilevel_distillation
        assert by_name["no recovery (the control)"] == sweep.base.train.control()


def test_they_are_those_of_the_package() -> None:
    """Check that the package finds these files, and that a wheel gets them."""
    shipped = shipped_folder()
    found = sorted(file.relative_to(shipped) for file in shipped.rglob("*.yaml"))
    assert found == sorted(file.relative_to(CONFIGS) for file in [*EXPERIMENTS, *SWEEPS])
    project = (CONFIGS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '\n"bidfmkd_fast/configs" = "configs"' in project
