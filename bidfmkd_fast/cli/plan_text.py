"""Print what `probe` and `train --dry-run` found out, and what a run would ask."""

from __future__ import annotations

from collections.abc import Sequence

from bidfmkd_fast.black_box import BlackBox, Budget
from bidfmkd_fast.runtime.progress import duration
from bidfmkd_fast.training import TrainConfig
from bidfmkd_fast.training.plan import Plan, plan, too_short
from bidfmkd_fast.training.run_cost import check_learnable
from bidfmkd_fast.training.spending import over_cap
from bidfmkd_fast.training.tables import text_table


def print_probe(api: BlackBox, config: TrainConfig, budget: Budget | None) -> bool:
    """Print what one API can give and what a run of it would ask; return whether it is usable."""
    made = _plan([api], config, budget)
    print(f"{text_table(made.apis[0].report.rows())}\n")
    _print_spending(made, *made.notes)
    return not made.problems


def print_plan(
    apis: Sequence[BlackBox],
    config: TrainConfig,
    budget: Budget | None,
    device: str,
    controls: bool,
) -> bool:
    """Print what each API can give and what a run would ask; return whether all are usable.

    With `controls` the no-recovery control is counted as well.

    Raises InputError before anything is asked if the memory of `device` cannot hold the run, or if
    an API gives labels only and the survey is left out.
    """
    check_learnable("train", apis, config)
    made = _plan(apis, config, budget, device, controls)
    print(f"{text_table(made.rows())}\n")
    _print_spending(made, *made.problems, *made.notes, *too_short(made, config))
    return not made.problems


def _plan(
    apis: Sequence[BlackBox],
    config: TrainConfig,
    budget: Budget | None,
    device: str | None = None,
    controls: bool = False,
) -> Plan:
    for api in apis:
        api.budget = budget
    return plan(apis, config, device=device, seed=config.seed, progress=True, controls=controls)


def _print_spending(made: Plan, *remarks: str) -> None:
    print(text_table(made.spending.rows()))
    if any(planned.usable for planned in made.apis):
        print(
            f"\n{duration(made.seconds)} until the last answer; "
            "requests that have to be repeated come on top"
        )
    for line in [*remarks, *over_cap(made.spending)]:
        print(line)
