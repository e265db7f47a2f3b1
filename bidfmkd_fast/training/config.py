"""Define the settings of a run: plain dataclasses, which are read from and written as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.data.episodes import check_rotations
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.inner_loop import InnerLoop
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.recovery.paper_compat import SPLITS
from bidfmkd_fast.settings import (
    MOST_WIDTH,
    check_least,
    check_most,
    check_positive,
    check_types,
    plain_values,
    settings_from_values,
    settings_from_yaml,
    to_yaml,
)
from bidfmkd_fast.survey.config import SurveyConfig

NO_SURVEY = SurveyConfig(n_images=0)
_KEYS_OF_V01 = frozenset(  # the fields of `TrainConfig` in version 0.1, all of which it wrote
    [
        "seed",
        "n_per_class",
        "meta_batch_size",
        "meta_model_width",
        "adapt_steps",
        "adapt_lr",
        "meta_model_side",
        "boundary_start",
        "boundary_recovery",
        "bilevel_distillation",
        "task_replay",
        "paper_compat",
        "recovery",
        "distillation",
        "replay",
    ]
)

# Bounds that no run needs to exceed. Beyond them the first outer step exhausts the memory, or hangs
# without a sign of progress.
_MOST_INNER_STEPS = 10_000  # the memory holds the graph of every step of an inner loop
_MOST_TASKS = 10_000  # the memory holds the images of all tasks of an outer step
_MOST_SIDE = 8192  # pixels


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of the bi-level distillation.

    Args:
        inner_steps: gradient steps from the meta-model to an API's task model; at most 10,000.
        inner_lr: learning rate of these steps.
        outer_lr: Adam's learning rate for the meta-model.
        first_order: drop the second derivatives (through the inner steps).
    """

    inner_steps: int = 10
    inner_lr: float = 0.05
    outer_lr: float = 1e-3
    first_order: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, inner_steps=0)
        check_most(self, inner_steps=_MOST_INNER_STEPS)
        check_positive(self, "inner_lr", "outer_lr")

    @property
    def inner(self) -> InnerLoop:
        """Return the settings of the inner loop."""
        return InnerLoop(self.inner_steps, self.inner_lr, self.first_order)


@dataclass(frozen=True)
class ReplayConfig:
    """Settings of the replay: outer steps on tasks drawn across APIs from the recovered images.

    Args:
        steps_per_round: outer steps after each group of `meta_batch_size` APIs but the last.
        patience: if above 0, the replay of a round ends early once its accuracy has not improved
            for that many steps.
        final_steps: outer steps after the last API.
        n_shot: support images per class of a task.
        n_query: query images per class of a task.
        rotations: 4 or 2 turns the images of each class by multiples of 90 or 180 degrees and
            counts every turn as a class of its own (usual on Omniglot); 1 turns nothing.
        inner_steps: gradient steps of the inner loop, from the meta-model to a task's model; at
            most 10,000.
        inner_lr: learning rate of these steps.
        outer_lr: Adam's learning rate for the meta-model.
        first_order: drop the second derivatives (through the inner steps).
    """

    steps_per_round: int = 0
    patience: int = 0
    final_steps: int = 300
    n_shot: int = 1
    n_query: int = 10
    rotations: int = 1
    inner_steps: int = 5
    inner_lr: float = 0.1
    outer_lr: float = 1e-3
    first_order: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_least(
            self, steps_per_round=0, patience=0, final_steps=0, n_shot=1, n_query=1, inner_steps=0
        )
        check_most(self, inner_steps=_MOST_INNER_STEPS)
        check_positive(self, "inner_lr", "outer_lr")
        check_rotations("ReplayConfig", self.rotations)

    @property
    def inner(self) -> InnerLoop:
        """Return the settings of the inner loop."""
        return InnerLoop(self.inner_steps, self.inner_lr, self.first_order)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a whole run of `BiDfMKD`.

    Args:
        seed: seed of every random draw of the run.
        n_per_class: images per class of each recovered set. A support set and a boundary query set
            are recovered from every API.
        meta_batch_size: tasks per outer step, and APIs per round; at most 10,000.
        meta_model_width: filters of the default meta-model, a Conv4; at most 4,096.
        adapt_steps: gradient steps in which the finished meta-model adapts to a new task, unless
            `adapt` is given another number; at most 10,000.
        adapt_lr: learning rate of these steps.
        meta_model_side: side of the square images to which a meta-model for any size resizes its
            tasks, at most 8,192. With 0 it is a plain Conv4 if all APIs take images of one shape,
            else the side is the largest among the APIs.
        boundary_start: outer step (distillation and replay steps count together) from which the
            boundary term is used.
        boundary_recovery: False leaves the boundary term out, so that both sets are support sets
            (an ablation).
        bilevel_distillation: False leaves the bi-level distillation out (an ablation).
        task_replay: False leaves task memory replay out (an ablation).
        paper_compat: follow the authors' public code where it departs from the paper
            (`docs/architecture.md`).
        survey: what all APIs are asked first, and how it is distilled.
        recovery: how each set is recovered. With 0 steps, the default, the run is the survey alone:
            nothing is recovered, distilled or replayed.
        distillation: how the recovered sets are distilled.
        replay: how the recovered images are replayed as tasks.

    Raises:
        InputError: a value out of its range; `InputTypeError` if it is of the wrong type.
    """

    seed: int = 0
    n_per_class: int = 10
    meta_batch_size: int = 4
    meta_model_width: int = 32
    adapt_steps: int = 20
    adapt_lr: float = 0.1
    meta_model_side: int = 0
    boundary_start: int = 0
    boundary_recovery: bool = True
    bilevel_distillation: bool = True
    task_replay: bool = True
    paper_compat: bool = False
    survey: SurveyConfig = field(default_factory=SurveyConfig)
    # After a survey recovery has not been found to add anything (docs/experiments.md).
    recovery: RecoveryConfig = field(default_factory=lambda: RecoveryConfig(steps=0))
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def __post_init__(self) -> None:
        check_types(self)
        check_least(
            self,
            seed=0,
            n_per_class=1,
            meta_batch_size=1,
            meta_model_width=1,
            adapt_steps=0,
            meta_model_side=0,
            boundary_start=0,
        )
        check_most(
            self,
            meta_batch_size=_MOST_TASKS,
            meta_model_width=MOST_WIDTH,
            adapt_steps=_MOST_INNER_STEPS,
            meta_model_side=_MOST_SIDE,
        )
        check_positive(self, "adapt_lr")
        replay, held = self.replay, 2 * self.n_per_class
        if (replay.final_steps or replay.steps_per_round) and replay.n_shot + replay.n_query > held:
            raise InputError(
                f"TrainConfig: replay.n_shot + replay.n_query must be at most 2 n_per_class = "
                f"{held}, the images per class of an API's two sets; got {replay.n_shot} + "
                f"{replay.n_query}; lower them or raise n_per_class"
            )
        if self.paper_compat and self.recovery.num_directions < SPLITS:
            raise InputError(
                f"TrainConfig: with paper_compat recovery.num_directions must be at least "
                f"{SPLITS}, the authors' number of splits; got {self.recovery.num_directions}"
            )
        if replay.n_shot >= self.n_per_class:
            raise InputError(
                "TrainConfig: replay.n_shot must be below n_per_class, so that a support set alone "
                f"makes a task; got n_shot={replay.n_shot}, n_per_class={self.n_per_class}"
            )

    def control(self) -> TrainConfig:
        """Return the settings of the no-recovery control of this run.

        The control is the same run without a survey, on images of untrained generators: with no
        recovery steps, each API is asked for the scores of these images only.
        """
        return replace(self, survey=NO_SURVEY, recovery=replace(self.recovery, steps=0))

    def recovers_from(self, spec: APISpec) -> bool:
        """Return whether sets are recovered from an API with this spec.

        Nothing is recovered from an API that gives labels only. With a survey and no recovery steps
        the run is the survey alone.
        """
        return not spec.labels_only and (self.recovery.steps > 0 or self.survey.n_images == 0)

    def replay_steps(self, n_apis: int) -> int:
        """Count the replay steps of a run that recovers sets from `n_apis` APIs, at most."""
        rounds = -(-n_apis // self.meta_batch_size)
        return self.replay.final_steps + self.replay.steps_per_round * max(rounds - 1, 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested plain values, which `from_dict` reads."""
        return plain_values(self)

    def to_yaml(self) -> str:
        """Return the settings as YAML text."""
        return to_yaml(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make the settings in `values`, with defaults for what is missing.

        Raises:
            InputError: an unknown key (the closest known one is named), or a value out of its
                range.
        """
        return settings_from_values(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read the settings in a YAML file.

        Raises InputError as `from_dict` does, and for a file that is missing or no YAML.
        """
        return settings_from_yaml(cls, path)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn the survey off in settings that version 0.1 wrote.

        It wrote every setting, and had no survey. Settings that name only some get the defaults.
        """
        if "survey" not in values and values.keys() >= _KEYS_OF_V01:
            return {**values, "survey": plain_values(NO_SURVEY)}
        return values

    @classmethod
    def v01(cls) -> TrainConfig:
        """Return the default settings of version 0.1: recovery and replay without a survey."""
        return cls(survey=NO_SURVEY, recovery=RecoveryConfig(), adapt_steps=10)


def paper(compat: bool = False) -> TrainConfig:
    """Return the settings of the paper's 5-way runs on 100 APIs (arXiv 2305.18413).

    Distillation and replay take about 60,000 outer steps together. The authors' knowledge
    distillation loss also divides by the number of classes, 5, so their inner learning rate of 0.01
    corresponds to 0.002 here. `compat=True` follows their code instead of the paper
    (`paper_compat`): it uses their loss, and so their learning rate.
    """
    return TrainConfig(
        survey=NO_SURVEY,
        paper_compat=compat,
        n_per_class=30,
        meta_batch_size=4,
        adapt_steps=10,
        meta_model_width=32,
        adapt_lr=0.01,
        boundary_start=1000,
        recovery=RecoveryConfig(
            steps=200,
            num_directions=100,
            mu=0.005,
            directions="sphere",
            learning_rate=1e-3,
            generator_width=64,
            boundary_weight=1.0,
            divergence="l1",
            augment=True,
        ),
        distillation=DistillationConfig(inner_steps=10, inner_lr=0.01 if compat else 0.002),
        replay=ReplayConfig(
            steps_per_round=2400, patience=200, final_steps=2400, n_query=15, inner_lr=0.01
        ),
    )
