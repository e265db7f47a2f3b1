"""Check the settings of an experiment: through YAML and back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.settings import plain_values, settings_from_values, settings_from_yaml, to_yaml


def test_settings_go_through_yaml(tiny: ExperimentConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
    assert settings_from_yaml(ExperimentConfig, tmp_path / "tiny.yaml") == tiny
    assert (
        settings_from_values(ExperimentConfig, plain_values(ExperimentConfig()))
        == ExperimentConfig()
    )


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"pool": {"scenario": "xy"}}, InputError, "scenario must be one of ss, sh, mh; got 'xy'"),
        (
            {"pool": {"inverted": ["omniglot"]}},
            InputError,
            r"inverted must name data_sets.*\['omniglot'\]",
        ),
        (
            {"pool": {"data_sets": "glyphs"}},
            InputTypeError,
            "data_sets must be of type list of str",
        ),
        (
            {"pool": {"n_api": 3}},
            InputError,
            "unknown key 'pool.n_api'; did you mean 'pool.n_apis'",
        ),
        ({"evaluation": {"n_shots": []}}, InputError, "n_shots must be one or more"),
        ({"evaluation": {"n_shots": [1, "5"]}}, InputTypeError, "n_shots must be of type"),
        (
            {"evaluation": {"adapt_lrs": [0.1, -1.0]}},
            InputError,
            "adapt_lrs must be finite and above 0",
        ),
        (
            {"evaluation": {"split": "test"}},
            InputError,
            "split must be one of meta_train, meta_val, meta_test",
        ),
        ({"evaluation": {"n_episodes": 1}}, InputError, "n_episodes must be at least 2"),
        ({"baselines": {"steps": 0}}, InputError, "steps must be at least 1"),
        ({"train": {"recovery": {"mu": 0}}}, InputError, "mu must be finite"),
    ],
)
def test_bad_settings(values: dict, error: type[InputError], says: str) -> None:
    with pytest.raises(error, match=says):
        settings_from_values(ExperimentConfig, values)


def test_what_the_data_set_cannot_serve_is_refused_at_once(tiny: ExperimentConfig) -> None:
    with pytest.raises(InputError, match="n_shot \\+ n_query = 30 \\+ 15"):
        replace(tiny, evaluation=replace(tiny.evaluation, n_shots=(1, 30), n_query=15)).check()
    with pytest.raises(InputError, match="meta_val of data set 'glyphs' has 8 classes"):
        replace(tiny, pool=replace(tiny.pool, n_way=9)).check()
