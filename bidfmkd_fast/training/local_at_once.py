"""Recover several local APIs at once on a GPU, which one small recovery alone does not fill."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery.side_by_side import recover_side_by_side
from bidfmkd_fast.training.inner_level import task_model
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.recovered_set import PARTS, QUERY
from bidfmkd_fast.training.recoveries import Recoveries
from bidfmkd_fast.training.run_state import RunState


def on_one_gpu(run: RunState) -> bool:
    """Return True if the recoveries of several local APIs can share the run's GPU.

    They cannot with a user's generator or with `paper_compat`, since both read every answer on the
    host.
    """
    return run.device.type == "cuda" and run.generator is None and not run.config.paper_compat


def apis_at_once(run: RunState, group: Sequence[int]) -> list[int]:
    """Choose the APIs of `group` that `recover_at_once` recovers; the others are recovered in turn.

    An API with a budget is recovered by itself, so that a budget that runs out leaves complete
    sets rather than half of every set.
    """
    if not on_one_gpu(run):
        return []
    return [i for i in group if not run.apis[i].is_service and run.apis[i].budget is None]


def recover_at_once(run: RunState, recoveries: Recoveries, indices: Sequence[int]) -> list[Outcome]:
    """Recover all support sets at once, make the task models, recover all boundary query sets.

    An error of one API is raised once the sets of the others are kept.
    """
    outcomes = [Outcome(index) for index in indices]
    for part in PARTS:
        wanted = [
            outcome
            for outcome in outcomes
            if outcome.error is None and not recoveries.find(outcome, part)
        ]
        errors: list[Exception] = []
        with ExitStack() as stack:
            journals = [
                stack.enter_context(recoveries.under_way(outcome, part)) for outcome in wanted
            ]
            students = [
                # Each task model has a copy of the module, since all of them are in use at once.
                task_model(run, run.round_start(), outcome.sets[0], journal.steps)
                if part == QUERY
                else None
                for outcome, journal in zip(wanted, journals, strict=True)
            ]
            for i, result in recover_side_by_side(
                [run.apis[outcome.index] for outcome in wanted],
                run.config.n_per_class,
                students,
                run.config.recovery,
                seeds=[recoveries.seed(outcome.index, part) for outcome in wanted],
                device=run.device,
                journals=journals,
            ):
                if isinstance(result, BudgetExhausted):
                    wanted[i].error = result
                elif isinstance(result, Exception):
                    errors.append(result)
                else:
                    recoveries.keep(wanted[i], part, result, journals[i])
        if errors:
            raise errors[0]
    return outcomes
