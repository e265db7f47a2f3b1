"""Check the folder of an experiment: one experiment each, and nothing is made twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig, PoolConfig
from bidfmkd_fast.experiments.folder import made_once, open_folder, pool_of
from bidfmkd_fast.pools import Pool
from bidfmkd_fast.settings import plain_values, settings_from_values, settings_from_yaml
from bidfmkd_fast.training import TrainConfig


def test_what_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    def cut_off(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "it", cut_off, "whole")
    assert not (tmp_path / "it").exists()
    made = made_once(
        tmp_path / "it", lambda folder: (folder.mkdir(), (folder / "whole").touch()), "whole"
    )
    assert [file.name for file in made.iterdir()] == ["whole"]
    assert [file.name for file in tmp_path.iterdir()] == ["it"]
    assert made_once(made, cut_off, "whole") == made


def test_what_was_finished_or_can_go_on_is_not_made_anew(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        made.append(sorted(file.name for file in folder.iterdir()) if folder.exists() else [])

    made: list[list[str]] = []
    (tmp_path / "it.partial").mkdir()
    (tmp_path / "it.partial" / "config").touch()
    (tmp_path / "it.partial" / "paid for").touch()
    made_once(tmp_path / "it", make, "last", ["config"])
    assert made == [["config", "paid for"]]
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "last").touch()  # cut off just before it was moved to its place
    assert made_once(tmp_path / "other", make, "last") == tmp_path / "other" and len(made) == 1


def test_a_folder_holds_one_experiment(tmp_path: Path) -> None:
    config, other = ExperimentConfig(), ExperimentConfig(pool=PoolConfig(n_apis=3))
    folder = open_folder(tmp_path / "a", config)
    assert open_folder(tmp_path / "a", config.with_seed(5)) == folder  # the seed may differ
    with pytest.raises(InputError, match="other settings"):
        open_folder(tmp_path / "a", other)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(InputError, match="is not an experiment"):
        open_folder(tmp_path / "b", config)
    with pytest.raises(InputError, match="cannot write"):
        open_folder(tmp_path / "b" / "mine" / "c", config)


def test_a_folder_of_version_01_goes_on_with_its_own_settings(tmp_path: Path) -> None:
    """Write the file as version 0.1 did, which had no survey and no seed of the episodes."""
    file = tmp_path / "old" / "experiment.yaml"
    values = plain_values(ExperimentConfig(train=TrainConfig.v01()))
    del values["train"]["survey"], values["evaluation"]["episode_seed"]
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"give another --out, or its experiment\.yaml"):
        open_folder(file.parent, ExperimentConfig())
    old = settings_from_yaml(ExperimentConfig, file)
    assert old.evaluation.episode_seed is None and old.train == TrainConfig.v01()
    assert open_folder(file.parent, old.with_seed(3)) == file.parent
    # A file that names some settings only is no file of version 0.1.
    some = settings_from_values(ExperimentConfig, {"evaluation": {"n_query": 3}})
    assert some.evaluation.episode_seed == 0


def test_pools_are_trained_once_for_settings_and_seed(
    tiny: ExperimentConfig, datasets: list[Dataset], tiny_pool: Pool
) -> None:
    out = tiny_pool.folder.parents[1]
    before = {file: file.stat().st_mtime_ns for file in tiny_pool.folder.iterdir()}
    assert pool_of(out, tiny.pool, datasets, 0, False) == tiny_pool
    assert before == {file: file.stat().st_mtime_ns for file in tiny_pool.folder.iterdir()}
    assert pool_of(out, replace(tiny.pool, seed=0), datasets, 5, False) == tiny_pool
    other = pool_of(out, replace(tiny.pool, n_apis=1), datasets, 0, False)
    assert other.folder != tiny_pool.folder and len(other.entries) == 1
    assert other.entries[0] == tiny_pool.entries[0]
