"""What a run would ask, take and cost, from a probe of each API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.probe import ProbeReport, probe
from bidfmkd_fast.black_box.service import ServiceBlackBox
from bidfmkd_fast.progress import Bar
from bidfmkd_fast.recovery.cost import Cost, set_cost
from bidfmkd_fast.training.config import TrainConfig


@dataclass(frozen=True)
class PlannedAPI:
    """One API of a run: what its probe found, and what a run with its control asks it."""

    report: ProbeReport
    is_service: bool
    queries: int
    cost: float

    @property
    def seconds(self) -> float:
        """At the best speed that the probe saw; 0 where it saw none."""
        rates = self.report.images_per_second
        return self.queries / max(rates.values()) if rates else 0.0


@dataclass(frozen=True)
class Plan:
    """A run before it is made, API by API; `group` of them are recovered together."""

    apis: list[PlannedAPI]
    group: int

    @property
    def queries(self) -> int:
        """Of all APIs together, control included."""
        return sum(one.queries for one in self.apis)

    @property
    def cost(self) -> float:
        """Of all APIs together."""
        return sum(one.cost for one in self.apis)

    @property
    def seconds(self) -> float:
        """Until the last answer: the services of a group are asked at once, local APIs one after the other."""
        groups = [self.apis[first : first + self.group] for first in range(0, len(self.apis), self.group)]
        return sum(
            max(
                sum(one.seconds for one in group if not one.is_service),
                max((one.seconds for one in group if one.is_service), default=0.0),
            )
            for group in groups
        )

    def rows(self) -> list[list[str]]:
        """A table with a row per API and one for all."""
        rows = [["API", "usable", "scores", "smallest mu", "suggested mu", "images/s", "queries", "time", "cost"]]
        for one in self.apis:
            report, steps, rates = one.report, one.report.steps, one.report.images_per_second
            smallest = f"{steps.smallest:.3g}" if steps is not None and steps.smallest is not None else "?"
            suggested = "?" if steps is None else f"{steps.suggested:.3g}"
            rate = f"{max(rates.values()):,.0f}" if rates else "?"
            rows.append(
                [
                    report.name,
                    "yes" if report.problem is None else "no",
                    report.scores_kind,
                    smallest,
                    suggested,
                    rate,
                    f"{one.queries:,}",
                    _duration(one.seconds) if rates else "?",
                    f"{one.cost:,.2f}",
                ]
            )
        total = [f"{self.queries:,}", _duration(self.seconds), f"{self.cost:,.2f}"]
        return [*rows, ["all", "", "", "", "", "", *total]]

    @property
    def problems(self) -> list[str]:
        """Why the APIs that cannot be used cannot."""
        return [f"{one.report.name}: {one.report.problem}" for one in self.apis if one.report.problem is not None]


def plan(apis: Sequence[BlackBox], config: TrainConfig, *, seed: int = 0, progress: bool = False) -> Plan:
    """Probe every API, for `probe.PROBE_QUERIES` queries each, and work out what `fit_with_control` would ask it."""
    planned = []
    with Bar("probe", len(apis), "APIs", progress) as bar:
        for api in bar.over(apis):
            cost = run_cost(api, config) + run_cost(api, config.control())
            planned.append(PlannedAPI(probe(api, seed=seed), api._is_service, cost.queries, cost.price))
    return Plan(planned, config.meta_batch_size)


def run_cost(api: BlackBox, config: TrainConfig) -> Cost:
    """Count what a run asks one API if nothing goes wrong: two sets of images. A service is not contacted for it."""
    return set_cost(as_known(api), config.recovery, config.n_per_class, config.paper_compat) * 2


def as_known(api: BlackBox) -> BlackBox:
    """Return a box to count with: a service's as far as it is known so far, since a dead one is waited for."""
    return _KnownService(api) if isinstance(api, ServiceBlackBox) else api


class _KnownService(BlackBox):
    """A service that is only counted with: its requests hold what its spec, or what it told before, allows."""

    def __init__(self, service: ServiceBlackBox) -> None:
        super().__init__(service.spec)
        self._most = ServiceBlackBox._batch(service)  # not the method of a subclass, which asks the service

    def _score(self, images: Tensor) -> Tensor:
        raise AssertionError("it is never asked")

    def _count_requests(self, n_images: int) -> int:
        return -(-n_images // self._most)


def too_short(plan: Plan, config: TrainConfig) -> list[str]:
    """What to change where the run's `mu` is shorter than an API resolves."""
    mu = config.recovery.mu
    if isinstance(mu, str):
        return []
    return [
        f"{one.report.name}: mu={mu:g} is shorter than it resolves ({steps.smallest:.3g}); take mu=auto"
        for one in plan.apis
        if (steps := one.report.steps) is not None
        and steps.smallest is not None
        and mu < steps.smallest
        and steps.smallest > min(steps.agreement)  # below the shortest that was tried nothing is known
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
