"""Check meta-tests against `evaluate`, and that they are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.experiment import Experiment
from bidfmkd_fast.experiments.meta_test import (
    meta_test,
    meta_tests_once,
    over_seeds,
    share_episodes,
)
from bidfmkd_fast.meta import MetaModel, evaluate
from bidfmkd_fast.models import build_model
from bidfmkd_fast.pools import Pool


@pytest.fixture
def experiment(
    tiny: ExperimentConfig, tiny_pool: Pool, datasets: list[Dataset], tmp_path: Path
) -> Experiment:
    return Experiment(tiny_pool, datasets, tiny.with_seed(11), tmp_path, progress=False)


def meta_model(seed: int) -> MetaModel:
    torch.manual_seed(seed)
    return MetaModel(
        build_model(
            "conv4", in_channels=1, n_classes=3, image_size=(28, 28), width=3, batch_statistics=True
        )
    )


def test_the_learning_rate_is_chosen_on_meta_val_and_meta_test_is_as_evaluate_says(
    experiment: Experiment, seed: int
) -> None:
    model = meta_model(seed)
    tests = meta_test(model, experiment)
    assert [test.evaluation.n_shot for test in tests] == [1, 2]
    for test in tests:
        means = {}
        for rate in experiment.config.evaluation.adapt_lrs:
            adapting = MetaModel(model.module, adapt_learning_rate=rate)
            options = {"n_way": 3, "n_shot": test.evaluation.n_shot, "n_query": 2, "seed": 0}
            means[rate] = evaluate(
                adapting, experiment.datasets[0], n_episodes=2, split="meta_val", **options
            ).mean
            if rate == test.learning_rate:
                wanted = evaluate(adapting, experiment.datasets[0], n_episodes=4, **options)
                assert torch.equal(test.evaluation.per_episode, wanted.per_episode)
        assert means[test.learning_rate] == max(means.values())
        at_own_rate = evaluate(model, experiment.datasets[0], n_episodes=4, **options)
        assert test.own is not None
        assert torch.equal(test.own.per_episode, at_own_rate.per_episode)
    evaluation = replace(experiment.config.evaluation, adapt_lrs=())
    own = replace(experiment, config=replace(experiment.config, evaluation=evaluation))
    tests = meta_test(model, own)
    assert {(test.learning_rate, test.own) for test in tests} == {(model.adapt_learning_rate, None)}


def test_the_episodes_that_choose_the_rate_are_not_those_of_the_test(
    experiment: Experiment, seed: int
) -> None:
    """Test on meta_val, where both have the same split, rate and number of shots."""
    evaluation = replace(experiment.config.evaluation, split="meta_val")
    on_val = replace(experiment, config=replace(experiment.config, evaluation=evaluation))
    for test in meta_test(meta_model(seed), on_val):
        assert len(test.evaluation.per_episode) == 4


def test_every_seed_is_evaluated_on_the_same_episodes(experiment: Experiment, seed: int) -> None:
    """Check it on one model, whose accuracies can differ by the episodes only."""
    model = meta_model(seed)

    def accuracies(training_seed: int, episode_seed: int | None) -> list[list[float]]:
        config = experiment.config.with_seed(training_seed)
        evaluation = replace(config.evaluation, n_episodes=20, episode_seed=episode_seed)
        under = replace(experiment, config=replace(config, evaluation=evaluation))
        return [test.evaluation.per_episode.tolist() for test in meta_test(model, under)]

    assert experiment.config.evaluation.episode_seed == 0
    assert accuracies(11, 0) == accuracies(12, 0) != accuracies(12, 1)
    # As in version 0.1, each seed may have episodes of its own.
    assert accuracies(11, None) == accuracies(12, 11) != accuracies(12, None)


def test_an_evaluation_of_version_01_is_read(tmp_path: Path) -> None:
    record = {
        "learning_rate": 0.1,
        "mean": 0.3,
        "ci95": 0.196,
        "per_episode": [0.2, 0.4],
        "dataset": "glyphs",
        "split": "meta_test",
        "n_way": 5,
        "n_shot": 1,
        "n_query": 15,
        "seed": 2,
        "steps": 10,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps([record]))
    (read,) = meta_tests_once(tmp_path, list)
    values = vars(read.evaluation) | {"per_episode": read.evaluation.per_episode.tolist()}
    assert {"learning_rate": read.learning_rate, **values} == record and read.own is None


def test_evaluations_are_kept(experiment: Experiment, tmp_path: Path, seed: int) -> None:
    made = meta_test(meta_model(seed), experiment)
    kept = meta_tests_once(tmp_path, lambda: made)

    def never() -> list:
        raise AssertionError

    for again in (kept, meta_tests_once(tmp_path, never)):
        for test, other in zip(again, made, strict=True):
            assert test.learning_rate == other.learning_rate
            assert torch.equal(test.evaluation.per_episode, other.evaluation.per_episode)
            assert torch.equal(test.own.per_episode, other.own.per_episode)
            assert {**vars(test.evaluation), "per_episode": 0} == {
                **vars(other.evaluation),
                "per_episode": 0,
            }


@pytest.mark.parametrize("seeds", [(0, 1), (4, 4)], ids=["own episodes", "the same episodes"])
def test_several_seeds_are_one_evaluation(
    experiment: Experiment, seed: int, seeds: tuple[int, ...]
) -> None:
    parts = [
        evaluate(
            meta_model(seed + number),
            experiment.datasets[0],
            n_way=3,
            n_query=2,
            n_episodes=3,
            seed=episode_seed,
        )
        for number, episode_seed in enumerate(seeds)
    ]
    whole = over_seeds(parts)
    accuracies = np.stack([part.per_episode.numpy() for part in parts])
    every = accuracies.mean(0) if seeds == (4, 4) else accuracies.ravel()
    assert share_episodes(parts) == (seeds == (4, 4)) and len(whole.per_episode) == len(every)
    assert whole.mean == pytest.approx(every.mean())
    assert whole.ci95 == pytest.approx(1.96 * every.std(ddof=1) / len(every) ** 0.5)
