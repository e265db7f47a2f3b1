from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.experiments.config import (
    ExperimentConfig,
    judge,
    judged_once,
    made_once,
    merged,
    open_folder,
    pool_of,
)
from bidfmkd_fast.meta import MetaModel, evaluate
from bidfmkd_fast.models import build_model
from bidfmkd_fast.pools import Pool
from bidfmkd_fast.settings import plain_values, settings_from_values, settings_from_yaml, to_yaml


def meta_model(seed: int) -> MetaModel:
    torch.manual_seed(seed)
    return MetaModel(
        build_model(
            "conv4", in_channels=1, n_classes=3, image_size=(28, 28), width=3, batch_statistics=True
        )
    )


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


def test_the_learning_rate_is_chosen_on_meta_val_and_meta_test_is_as_evaluate_says(
    tiny: ExperimentConfig, datasets: list[Dataset], seed: int
) -> None:
    model = meta_model(seed)
    judged = judge(model, datasets, tiny.evaluation, 3, 11, False)
    assert [one.evaluation.n_shot for one in judged] == [1, 2]
    for one in judged:
        means = {}
        for rate in tiny.evaluation.adapt_lrs:
            adapting = MetaModel(model.module, adapt_learning_rate=rate)
            options = {"n_way": 3, "n_shot": one.evaluation.n_shot, "n_query": 2, "seed": 11}
            means[rate] = evaluate(
                adapting, datasets[0], n_episodes=2, split="meta_val", **options
            ).mean
            if rate == one.learning_rate:
                wanted = evaluate(adapting, datasets[0], n_episodes=4, **options)
                assert torch.equal(one.evaluation.per_episode, wanted.per_episode)
        assert means[one.learning_rate] == max(means.values())
    own = judge(model, datasets, replace(tiny.evaluation, adapt_lrs=()), 3, 11, False)
    assert {one.learning_rate for one in own} == {model.adapt_learning_rate}


def test_evaluations_are_kept(
    tiny: ExperimentConfig, datasets: list[Dataset], tmp_path: Path, seed: int
) -> None:
    made = judge(meta_model(seed), datasets, tiny.evaluation, 3, 0, False)
    kept = judged_once(tmp_path, lambda: made)

    def never() -> list:
        raise AssertionError

    for again in (kept, judged_once(tmp_path, never)):
        for one, other in zip(again, made, strict=True):
            assert one.learning_rate == other.learning_rate
            assert torch.equal(one.evaluation.per_episode, other.evaluation.per_episode)
            assert {**vars(one.evaluation), "per_episode": 0} == {
                **vars(other.evaluation),
                "per_episode": 0,
            }


def test_merged_seeds_are_one_evaluation(datasets: list[Dataset], seed: int) -> None:
    parts = [
        evaluate(meta_model(seed), datasets[0], n_way=3, n_query=2, n_episodes=3, seed=k)
        for k in range(2)
    ]
    whole = merged(parts)
    every = torch.cat([part.per_episode for part in parts]).numpy()
    assert whole.mean == pytest.approx(every.mean())
    assert whole.ci95 == pytest.approx(1.96 * every.std(ddof=1) / len(every) ** 0.5)


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
    made_once(tmp_path / "it", make, "last", goes_on="config")
    assert made == [["config", "paid for"]]
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "last").touch()  # cut off just before it was moved to its place
    assert made_once(tmp_path / "other", make, "last") == tmp_path / "other" and len(made) == 1


def test_a_folder_holds_one_experiment(tmp_path: Path) -> None:
    assert open_folder(tmp_path / "a", {"x": 1}) == open_folder(tmp_path / "a", {"x": 1})
    with pytest.raises(InputError, match="other settings"):
        open_folder(tmp_path / "a", {"x": 2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(InputError, match="is no experiment"):
        open_folder(tmp_path / "b", {"x": 1})
    with pytest.raises(InputError, match="cannot write"):
        open_folder(tmp_path / "b" / "mine" / "c", {"x": 1})


def test_pools_are_trained_once_for_settings_and_seed(
    tiny: ExperimentConfig, datasets: list[Dataset], tiny_pool: Pool
) -> None:
    out = tiny_pool.folder.parents[1]
    before = {file: file.stat().st_mtime_ns for file in tiny_pool.folder.iterdir()}
    assert pool_of(out, tiny.pool, datasets, 0, False) == tiny_pool
    assert before == {file: file.stat().st_mtime_ns for file in tiny_pool.folder.iterdir()}
    other = pool_of(out, replace(tiny.pool, n_apis=1), datasets, 0, False)
    assert other.folder != tiny_pool.folder and len(other.entries) == 1
    assert other.entries[0] == tiny_pool.entries[0]
