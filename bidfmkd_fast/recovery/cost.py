"""Count what a recovery asks of an API.

This is the only place that counts it; budgets, plans, progress bars and ledgers all use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bidfmkd_fast.black_box import BlackBox, OpenBox
from bidfmkd_fast.black_box.step_length import N_IMAGES, QUERIES
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.mu import AUTO
from bidfmkd_fast.recovery.paper_compat import directions_left


@dataclass(frozen=True)
class Cost:
    """A number of queries and of requests, without repetitions, and their price.

    The price is in the currency of the spec's `price_per_1000`.
    """

    queries: int = 0
    requests: int = 0
    price: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.queries + other.queries, self.requests + other.requests, self.price + other.price
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(times * self.queries, times * self.requests, times * self.price)


def step_cost(
    api: BlackBox,
    config: RecoveryConfig,
    n_images: int,
    paper_compat: bool = False,
    rows_held: int = 0,
) -> Cost:
    """Count one step on `n_images` images; with `steps=0`, the one call that replaces the steps.

    `rows_held` rows of points, which make whole chunks, are not counted because a journal holds
    their answers.
    """
    rows = _chunk_rows(api, config, n_images, paper_compat)
    while rows_held > 0:
        rows_held -= rows.pop(0)
    return sum((_call_cost(api, n_rows * n_images) for n_rows in rows), Cost())


def measuring_cost(api: BlackBox, config: RecoveryConfig, n_images: int) -> Cost:
    """Count what `mu="auto"` asks before the first step; nothing if no gradient is estimated."""
    if config.mu != AUTO or not takes_directions(api, config):
        return Cost()
    return _call_cost(api, QUERIES // N_IMAGES * min(N_IMAGES, n_images))


def first_step_cost(
    api: BlackBox, config: RecoveryConfig, n_images: int, paper_compat: bool = False
) -> Cost:
    """Count what a recovery asks up to the end of its first step, the least that is of any use."""
    return measuring_cost(api, config, n_images) + step_cost(api, config, n_images, paper_compat)


def set_cost(
    api: BlackBox, config: RecoveryConfig, n_per_class: int, paper_compat: bool = False
) -> Cost:
    """Count what `recover` asks for a whole set with the same arguments and enough budget."""
    n_images = n_per_class * api.spec.n_classes
    step = step_cost(api, config, n_images, paper_compat)
    return measuring_cost(api, config, n_images) + step * max(1, config.steps)


def takes_directions(api: BlackBox, config: RecoveryConfig) -> bool:
    """Return True if gradients are estimated.

    They are not without steps, nor for an open box, which gives true gradients.
    """
    return config.steps > 0 and not isinstance(api, OpenBox)


def check_budget(api: BlackBox, cost: Cost) -> None:
    """Raise BudgetExhausted unless the budget pays `cost`, that of one step."""
    if api.budget is not None and not api.budget.affords(cost.queries, cost.requests, cost.price):
        raise BudgetExhausted(
            f"recover: one step asks {api.name} {cost.queries:,} queries in {cost.requests:,} "
            f"requests, more than is left of {api.budget}; raise the budget or lower n_per_class "
            "or num_directions"
        )


def _chunk_rows(
    api: BlackBox, config: RecoveryConfig, n_images: int, paper_compat: bool
) -> list[int]:
    """Return the rows of `n_images` points in each call to the API in one step.

    `ZerothOrder.ask_chunks` makes the same chunks.
    """
    if not takes_directions(api, config):
        return [1]
    rows = 1 + (directions_left(config.num_directions) if paper_compat else config.num_directions)
    per_call = max(1, config.max_images // n_images)
    return [min(per_call, rows - first) for first in range(0, rows, per_call)]


def _call_cost(api: BlackBox, n_images: int) -> Cost:
    """Count one call to the API with `n_images` images."""
    return Cost(n_images, api.requests_for(n_images), api.price_of(n_images))
