"""Check which settings of a run are refused, and that YAML loses nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.settings import plain_values, settings_from_values
from bidfmkd_fast.training import DistillationConfig, ReplayConfig, TrainConfig, paper

UNUSUAL = TrainConfig(
    seed=7,
    n_per_class=12,
    boundary_start=3,
    recovery=RecoveryConfig(
        steps=0, mu=1e-5, directions="lowres", grid=4, betas=(0.1, 0.2), augment=True
    ),
    distillation=DistillationConfig(inner_lr=0.5, first_order=True),
    replay=ReplayConfig(patience=9, n_query=3),
)


@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL, paper()])
def test_yaml_and_dict_give_the_same_settings_back(config: TrainConfig, tmp_path: Path) -> None:
    assert TrainConfig.from_dict(config.to_dict()) == config
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(file) == config


def test_what_is_not_given_is_the_default(tmp_path: Path) -> None:
    assert TrainConfig.from_dict({}) == TrainConfig()
    wanted = replace(TrainConfig(), seed=3, recovery=RecoveryConfig(steps=7))
    assert TrainConfig.from_dict({"seed": 3, "recovery": {"steps": 7}}) == wanted
    (tmp_path / "empty.yaml").write_text("")
    assert TrainConfig.from_yaml(tmp_path / "empty.yaml") == TrainConfig()


def test_recovery_is_off_by_default_and_stays_off_where_a_file_names_another_setting() -> None:
    assert TrainConfig().recovery == RecoveryConfig(steps=0)
    wanted = TrainConfig(recovery=RecoveryConfig(steps=0, mu=0.3))
    assert TrainConfig.from_dict({"recovery": {"mu": 0.3}}) == wanted
    experiment = settings_from_values(ExperimentConfig, {"train": {"recovery": {"mu": 0.3}}})
    assert experiment.train == wanted
    assert (TrainConfig.v01().recovery.steps, paper().recovery.steps) == (80, 200)


def test_a_file_of_version_01_keeps_its_meaning(tmp_path: Path) -> None:
    """It holds every setting but the survey, so its run had none."""
    written = replace(TrainConfig.v01(), seed=3)
    old = {key: value for key, value in written.to_dict().items() if key != "survey"}
    assert TrainConfig.from_dict(old) == written and written.adapt_steps == 10
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(old))
    assert TrainConfig.from_yaml(file).survey.n_images == 0
    experiment = plain_values(ExperimentConfig(train=written))
    del experiment["train"]["survey"]
    assert settings_from_values(ExperimentConfig, experiment).train == written
    assert TrainConfig().survey.n_images > 0 and paper().survey.n_images == 0


def test_numbers_that_yaml_reads_as_text() -> None:
    values = yaml.safe_load("recovery: {mu: 1e-2}\nadapt_lr: 5e-2")
    assert values["adapt_lr"] == "5e-2"  # YAML 1.1 reads it as text, which this test is about
    config = TrainConfig.from_dict(values)
    assert config.recovery.mu == 0.01
    assert config.adapt_lr == 0.05


@pytest.mark.parametrize(
    ("values", "unknown", "known"),
    [
        ({"sed": 1}, "'sed'", "'seed'"),
        (
            {"recovery": {"num_direction": 1}},
            "'recovery.num_direction'",
            "'recovery.num_directions'",
        ),
        ({"replay": {"inner_learning": 1}}, "'replay.inner_learning'", "'replay.inner_"),
    ],
)
def test_an_unknown_key_is_named_with_the_closest_known_one(
    values: dict[str, Any], unknown: str, known: str
) -> None:
    with pytest.raises(InputError) as error:
        TrainConfig.from_dict(values)
    assert unknown in str(error.value)
    assert known in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1.5}, "seed must be of type int"),
        ({"seed": True}, "seed must be of type int"),
        ({"adapt_lr": "much"}, "adapt_lr must be of type float"),
        ({"recovery": 3}, "settings under 'recovery'"),
        ({"distillation": {"first_order": 1}}, "first_order must be of type bool"),
    ],
)
def test_a_wrong_type_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputTypeError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"n_per_class": 0}, "n_per_class must be at least 1"),
        ({"meta_batch_size": 0}, "meta_batch_size must be at least 1"),
        ({"adapt_lr": 0.0}, "adapt_lr must be finite and above 0"),
        ({"adapt_lr": ".nan"}, "adapt_lr"),
        ({"distillation": {"inner_lr": float("inf")}}, "inner_lr must be finite"),
        ({"replay": {"n_shot": 0}}, "n_shot must be at least 1"),
        ({"recovery": {"mu": -1.0}}, "mu must be finite and above 0"),
        ({"n_per_class": 5, "replay": {"n_shot": 1, "n_query": 10}}, "at most 2 n_per_class = 10"),
        (
            {"paper_compat": True, "recovery": {"num_directions": 4}},
            "at least 5, the authors' number of splits; got 4",
        ),
        ({"meta_model_side": -1}, "meta_model_side must be at least 0"),
        ({"meta_model_side": 10**6}, "meta_model_side must be at most 8,192; got 1000000"),
        ({"meta_model_width": 10**6}, "meta_model_width must be at most 4,096; got 1000000"),
        ({"meta_batch_size": 10**6}, "meta_batch_size must be at most 10,000; got 1000000"),
        ({"adapt_steps": 10**9}, "TrainConfig: adapt_steps must be at most 10,000"),
        ({"distillation": {"inner_steps": 10**9}}, "DistillationConfig: inner_steps .*most 10,000"),
        ({"replay": {"inner_steps": 10**9}}, "ReplayConfig: inner_steps must be at most 10,000"),
        (
            {"n_per_class": 5, "replay": {"n_shot": 5, "n_query": 2}},
            "n_shot must be below n_per_class",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict(values)


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(InputError, match="not readable YAML"):
        TrainConfig.from_yaml(bad)
    bad.write_text("- 1\n- 2\n")
    with pytest.raises(InputTypeError, match="must hold settings by name"):
        TrainConfig.from_yaml(bad)


@pytest.mark.parametrize(("n_apis", "steps"), [(0, 11), (1, 11), (4, 11), (5, 18), (9, 25)])
def test_replay_steps_of_rounds_of_four_apis(n_apis: int, steps: int) -> None:
    config = TrainConfig(replay=ReplayConfig(steps_per_round=7, final_steps=11))
    assert config.replay_steps(n_apis) == steps


def test_the_control_has_no_survey_and_no_recovery_steps() -> None:
    control = UNUSUAL.control()
    config = replace(UNUSUAL, recovery=replace(UNUSUAL.recovery, steps=5))
    assert config.control() == control
    assert control.recovery.steps == 0
    changed = [
        field.name
        for field in fields(config)
        if getattr(config, field.name) != getattr(config.control(), field.name)
    ]
    assert changed == ["survey", "recovery"] and config.control().survey.n_images == 0
    assert replace(config.control().recovery, steps=5) == config.recovery


def test_the_preset_has_the_settings_of_the_paper() -> None:
    config = paper()
    recovery = config.recovery
    assert (recovery.num_directions, recovery.mu, recovery.steps, recovery.directions) == (
        100,
        0.005,
        200,
        "sphere",
    )
    assert (recovery.generator_width, recovery.learning_rate, recovery.betas) == (
        64,
        1e-3,
        (0.5, 0.999),
    )
    assert recovery.augment
    assert (recovery.divergence, recovery.boundary_weight) == ("l1", 1.0)
    assert (config.n_per_class, config.meta_batch_size, config.boundary_start) == (30, 4, 1000)
    assert (config.replay.inner_steps, config.replay.inner_lr, config.replay.n_query) == (
        5,
        0.01,
        15,
    )
    assert config.replay.patience == 200
    assert config.distillation.inner_steps == 10
    assert not config.paper_compat
    compat = paper(compat=True)
    assert compat.paper_compat
    # The authors' loss also divides by the 5 classes, so their rate of 0.01 is 0.002 here.
    assert (compat.distillation.inner_lr, config.distillation.inner_lr) == (0.01, 0.002)
    assert replace(compat, paper_compat=False, distillation=config.distillation) == config
