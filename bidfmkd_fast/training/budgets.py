"""Put budgets on the APIs of a run, and share them between its ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bidfmkd_fast.black_box import BlackBox, Budget
from bidfmkd_fast.runtime.ranks import Ranks


@contextmanager
def under_budget(apis: Sequence[BlackBox], budget: Budget | None) -> Iterator[None]:
    """Put `budget` on all `apis` inside the block; None leaves their own."""
    before = [api.budget for api in apis]
    try:
        for api in apis:
            api.budget = api.budget if budget is None else budget
        yield
    finally:
        for api, own in zip(apis, before, strict=True):
            api.budget = own


@contextmanager
def shared_budgets(apis: Sequence[BlackBox], ranks: Ranks) -> Iterator[None]:
    """Let all `ranks` spend from the budgets of `apis` together inside the block."""
    with ExitStack() as stack:
        if ranks.size > 1:
            budgets = {id(api.budget): api.budget for api in apis if api.budget is not None}
            for budget in budgets.values():
                stack.enter_context(budget.shared_by(ranks, f"budget {ranks.number()}"))
            ranks.exchange()
        yield
