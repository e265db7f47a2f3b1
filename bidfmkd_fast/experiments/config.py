"""Define the settings of an experiment: one file of `configs/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bidfmkd_fast.data import SPLITS, Dataset, EpisodeSampler, load_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.pools.api_training import ARCHITECTURES
from bidfmkd_fast.settings import check_least, check_positive, check_types
from bidfmkd_fast.training import TrainConfig


@dataclass(frozen=True)
class PoolConfig:
    """The APIs, as for `train_pool`.

    Args:
        scenario: "ss" (one data set and architecture), "sh" (mixed architectures) or "mh" (both
            mixed).
        data_sets: what the APIs learn from, and what is meta-tested: "glyphs", names in
            $BIDFMKD_DATA, or paths.
        inverted: those of `data_sets` whose images are inverted.
        n_apis: APIs to train.
        n_way: classes per API, and per task.
        width: filters of a Conv4.
        resnet_width: channels of a ResNet's first stage.
        epochs: passes over an API's images.
        seed: seed of the pool. None takes the seed of the run, so that every seed of a comparison
            has a pool of its own.
    """

    scenario: str = "ss"
    data_sets: tuple[str, ...] = ("glyphs",)
    inverted: tuple[str, ...] = ()
    n_apis: int = 20
    n_way: int = 5
    width: int = 32
    resnet_width: int = 64
    epochs: int = 30
    seed: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.scenario not in ARCHITECTURES:
            raise InputError(
                f"PoolConfig: scenario must be one of {', '.join(ARCHITECTURES)}; "
                f"got {self.scenario!r}"
            )
        if unknown := sorted(set(self.inverted) - set(self.data_sets)):
            raise InputError(
                f"PoolConfig: inverted must name data_sets, {list(self.data_sets)}; got {unknown}"
            )

    def load_datasets(self) -> list[Dataset]:
        """Load the data sets in order. Raises InputError as `load_dataset` does."""
        return [load_dataset(name, invert=name in self.inverted) for name in self.data_sets]


@dataclass(frozen=True)
class EvaluationConfig:
    """The meta-test that all methods share.

    Args:
        n_shots: support images per class; one column each.
        n_query: query images per class.
        n_episodes: episodes per data set and number of shots.
        split: the classes to draw from: "meta_train", "meta_val" or "meta_test".
        adapt_lrs: learning rates of the adaptation to choose from. Each model gets the rate with
            the highest accuracy on meta_val, for each data set and number of shots, because a
            model that never learned to adapt needs a larger rate and would otherwise look weaker
            than it is. An empty list keeps the rate of the run.
        n_val_episodes: meta_val episodes of that choice.
        episode_seed: seed of all these episodes. Every seed of a comparison is evaluated on the
            same episodes, so that results differ between seeds only by the pool and the training.
            None draws other episodes for each seed of a comparison, as version 0.1 did.
    """

    n_shots: tuple[int, ...] = (1, 5)
    n_query: int = 15
    n_episodes: int = 600
    split: str = "meta_test"
    adapt_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    n_val_episodes: int = 40
    episode_seed: int | None = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, n_query=1, n_episodes=2, n_val_episodes=1)
        if not self.n_shots or min(self.n_shots) < 1:
            raise InputError(
                "EvaluationConfig: n_shots must be one or more numbers of at least 1; "
                f"got {self.n_shots}"
            )
        if not all(0 < rate < float("inf") for rate in self.adapt_lrs):
            raise InputError(
                f"EvaluationConfig: adapt_lrs must be finite and above 0; got {self.adapt_lrs}"
            )
        if self.split not in SPLITS:
            raise InputError(
                f"EvaluationConfig: split must be one of {', '.join(SPLITS)}; got {self.split!r}"
            )

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keep the episodes of settings that version 0.1 wrote: other ones for each seed.

        It wrote every setting, and had no `episode_seed`. Settings that name only some get the
        default.
        """
        keys_of_v01 = {setting.name for setting in fields(EvaluationConfig)} - {"episode_seed"}
        if "episode_seed" not in values and keys_of_v01 <= values.keys():
            return {**values, "episode_seed": None}
        return values


@dataclass(frozen=True)
class BaselineConfig:
    """Training of the baselines: Adam on the KD loss for the distilled APIs, and MAML's length.

    Args:
        steps: optimisation steps of the distillation of one API.
        batch_size: images per step.
        learning_rate: Adam's learning rate.
        maml_steps: outer steps of MAML on real data; 0 takes as many as the replay.
    """

    steps: int = 300
    batch_size: int = 50
    learning_rate: float = 1e-3
    maml_steps: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, steps=1, batch_size=2, maml_steps=0)
        check_positive(self, "learning_rate")


@dataclass(frozen=True)
class ExperimentConfig:
    """One file of `configs/`.

    Args:
        pool: the APIs.
        train: settings of BiDf-MKD; the command sets the seed.
        baselines: settings of the baselines that BiDf-MKD is compared with.
        evaluation: the meta-test of all methods.
    """

    pool: PoolConfig = field(default_factory=PoolConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> list[Dataset]:
        """Load the data sets and check that they have the classes and images for every episode.

        Raises:
            InputError: a data set cannot be loaded, or has too few classes or images.
        """
        datasets, evaluation = self.pool.load_datasets(), self.evaluation
        splits = {evaluation.split} | ({"meta_val"} if evaluation.adapt_lrs else set())
        for dataset in datasets:
            for split in splits:
                EpisodeSampler(
                    dataset, split, self.pool.n_way, max(evaluation.n_shots), evaluation.n_query, 0
                )
        return datasets

    def with_seed(self, seed: int) -> ExperimentConfig:
        """Return the same experiment under another seed."""
        return replace(self, train=replace(self.train, seed=seed))


def check_seeds(command: str, seeds: Sequence[int]) -> None:
    """Raise InputError unless `seeds` are one or more different numbers."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"{command}: seeds must be one or more different numbers; got {list(seeds)}"
        )
