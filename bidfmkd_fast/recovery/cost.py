"""What a recovery asks of an API: the only place that counts it, for budgets, plans, progress and ledgers alike."""

from __future__ import annotations

from dataclasses import dataclass

from bidfmkd_fast.black_box import BlackBox, OpenBox
from bidfmkd_fast.black_box.step_length import N_IMAGES, QUERIES
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.paper_compat import directions_left
from bidfmkd_fast.recovery.step_length import AUTO


@dataclass(frozen=True)
class Cost:
    """Queries, requests without repetitions, and their price in the currency of
    `price_per_1000`.
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
    """Count one step on `n_images` images; without steps, the one look at the images that takes
    their place.

    `rows_held` rows of points are left out, which make whole chunks: their answers are there
    already.
    """
    rows = _chunk_rows(api, config, n_images, paper_compat)
    while rows_held > 0:
        rows_held -= rows.pop(0)
    return sum((_call_cost(api, n_rows * n_images) for n_rows in rows), Cost())


def measuring_cost(api: BlackBox, config: RecoveryConfig, n_images: int) -> Cost:
    """Count what `mu="auto"` asks before the first step; nothing where no step needs a length."""
    if config.mu != AUTO or not takes_directions(api, config):
        return Cost()
    return _call_cost(api, QUERIES // N_IMAGES * min(N_IMAGES, n_images))


def first_step_cost(
    api: BlackBox, config: RecoveryConfig, n_images: int, paper_compat: bool = False
) -> Cost:
    """Count what a recovery asks until its first step is made: less is of no use."""
    return measuring_cost(api, config, n_images) + step_cost(api, config, n_images, paper_compat)


def set_cost(
    api: BlackBox, config: RecoveryConfig, n_per_class: int, paper_compat: bool = False
) -> Cost:
    """Count what `recover` asks for one whole set with the same arguments, if no budget ends it."""
    n_images = n_per_class * api.spec.n_classes
    step = step_cost(api, config, n_images, paper_compat)
    return measuring_cost(api, config, n_images) + step * max(1, config.steps)


def takes_directions(api: BlackBox, config: RecoveryConfig) -> bool:
    """Return True if gradients are estimated: not without steps, nor from an open box, which gives
    the true ones.
    """
    return config.steps > 0 and not isinstance(api, OpenBox)


def check_budget(api: BlackBox, cost: Cost) -> None:
    """Raise BudgetExhausted unless the budget pays for `cost`, of one step (without steps: one
    look at the images).
    """
    if api.budget is not None and not api.budget.affords(cost.queries, cost.requests, cost.price):
        raise BudgetExhausted(
            f"recover: one step asks {api.name} {cost.queries:,} queries in {cost.requests:,} requests, more than "
            f"is left of {api.budget}; raise the budget or take a lower n_per_class or num_directions"
        )


def _chunk_rows(
    api: BlackBox, config: RecoveryConfig, n_images: int, paper_compat: bool
) -> list[int]:
    """Rows of `n_images` points in each call to the API in one step, as `ZerothOrder.ask_chunks`
    makes them.
    """
    if not takes_directions(api, config):
        return [1]
    rows = 1 + (directions_left(config.num_directions) if paper_compat else config.num_directions)
    every = max(1, config.max_images // n_images)
    return [min(every, rows - first) for first in range(0, rows, every)]


def _call_cost(api: BlackBox, n_images: int) -> Cost:
    return Cost(n_images, api.requests_for(n_images), api.price_of(n_images))
