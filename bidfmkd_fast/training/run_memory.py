"""Refuse a run that cannot fit into the memory, before any API is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.recovery.step_memory import check_set_memory
from bidfmkd_fast.runtime.memory import check_memory
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.default_model import task_shape


def check_run_memory(
    operation: str,
    apis: Sequence[BlackBox],
    config: TrainConfig,
    device: torch.device | str,
    *,
    own_generator: bool = False,
) -> None:
    """Raise InputError if a run of `apis` cannot fit into the memory.

    `operation` opens the message; `own_generator` is as for `check_set_memory`. Counted are a step
    of each recovery on `device`, and on the CPU the recovered images, the pictures and scores of
    the survey, and the tasks of one outer step.
    """
    if (n_images := config.survey.n_images) > 0:
        shape = task_shape([api.spec for api in apis], config) or apis[0].spec.image_shape
        n_scores = sum(api.spec.n_classes for api in apis)
        for where in ("cpu", device):
            check_memory(
                operation,
                f"a survey of survey.n_images={n_images:,} pictures",
                n_images * (math.prod(shape) + 4 * n_scores),  # uint8 pictures, float32 scores
                "lower survey.n_images",
                where,
            )
        check_memory(
            operation,
            f"a step of the joint distillation on survey.batch_size={config.survey.batch_size:,} "
            "pictures",
            4 * min(config.survey.batch_size, n_images) * math.prod(shape),
            "lower survey.batch_size",
            device,
        )
    apis = [api for api in apis if config.recovers_from(api.spec)]
    if not apis:
        return
    for api in apis:
        check_set_memory(
            operation, api, config.recovery, config.n_per_class, device, own_generator=own_generator
        )
    per_class = [4 * config.n_per_class * math.prod(api.spec.image_shape) for api in apis]
    check_memory(
        operation,
        f"the images of two sets of each of {len(apis)} APIs, n_per_class={config.n_per_class},",
        sum(2 * size * api.spec.n_classes for size, api in zip(per_class, apis)),
        "lower n_per_class",
    )
    replay = config.replay
    if config.task_replay and (replay.steps_per_round or replay.final_steps):
        per_task = replay.n_shot + replay.n_query  # images of each class
        smallest = min(math.prod(api.spec.image_shape) for api in apis)
        check_memory(
            operation,
            f"an outer step on meta_batch_size={config.meta_batch_size} tasks",
            4
            * config.meta_batch_size
            * min(api.spec.n_classes for api in apis)
            * per_task
            * smallest,
            "lower meta_batch_size, replay.n_shot or replay.n_query",
        )
