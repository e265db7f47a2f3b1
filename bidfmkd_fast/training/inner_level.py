"""Make the task model of an API (the inner level), the student of its boundary query set."""

from __future__ import annotations

import itertools

from torch import Tensor

from bidfmkd_fast.meta import adapt_to_api
from bidfmkd_fast.meta.inner_loop import forward
from bidfmkd_fast.recovery.objective import Student
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.training.round_start import RoundStart
from bidfmkd_fast.training.run import RecoveredSet
from bidfmkd_fast.training.run_state import RunState


def task_model(
    run: RunState, start: RoundStart, support: RecoveredSet, first_step: int
) -> Student | None:
    """Distil the API's answers to its support set into a task model; None before the boundary term
    is used.

    Args:
        run: the run, of which only what stays the same is read.
        start: the meta-model when the round began. It is left as it is; the task model starts from
            its parameters.
        support: the API's support set.
        first_step: the recovery step in which the task model is asked first: above 0 where a
            journal holds its scores for the steps before. It is asked once in every step.

    Returns:
        The task model as a function from images in the API's input range to logits.
    """
    config, spec = run.config, run.apis[support.api_index].spec
    module, outer_step = start
    if not config.boundary_recovery or outer_step < config.boundary_start:
        return None
    with seeded(config.seed, "student", outer_step):
        adapted = adapt_to_api(
            module,
            dict(module.named_parameters()),
            support.images,
            support.recovered.scores,
            # First order: nothing is differentiated through the adaptation here.
            config.distillation.inner._replace(first_order=True),
            scores_kind=spec.returned_kind,
            paper_compat=config.paper_compat,
        )
    parameters = {name: value.detach() for name, value in adapted.items()}
    steps = itertools.count(first_step)

    def student(points: Tensor) -> Tensor:
        # Dropout draws from torch's global generator, so every step seeds it.
        with seeded(config.seed, "task model", support.api_index, next(steps)):
            logits = forward(module, parameters, spec.to_unit(points))
        return logits[:, : spec.n_classes]  # an API may have fewer classes than the module

    return student
