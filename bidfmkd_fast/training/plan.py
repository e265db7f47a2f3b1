"""What a run would ask, take and cost, from a probe of each API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.probe import ProbeReport, probe
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.recovery.cost import Cost, set_cost
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.spending import CONTROL, PROBES, RUN, Cap, Spending, money, write_plan


@dataclass(frozen=True)
class PlannedAPI:
    """One API of a run: what its probe found, and what the run and its control ask it; nothing of
    an unusable one.
    """

    report: ProbeReport
    is_service: bool
    probe: Cost
    run: Cost
    control: Cost

    @property
    def usable(self) -> bool:
        """Whether the probe found nothing against it."""
        return self.report.problem is None

    @property
    def both(self) -> Cost:
        """Run and control together."""
        return self.run + self.control

    @property
    def seconds(self) -> float:
        """At the best speed that the probe saw; 0 where it saw none."""
        rates = self.report.images_per_second
        return self.both.queries / max(rates.values()) if rates else 0.0


@dataclass(frozen=True)
class Plan:
    """A run before it is made, API by API; `group` of them are recovered together, under `cap`."""

    apis: list[PlannedAPI]
    group: int
    cap: Cap

    @property
    def total(self) -> Cost:
        """Of all usable APIs together, control included, probes not."""
        return sum((one.both for one in self.apis), Cost())

    @property
    def queries(self) -> int:
        """Of all usable APIs together, control included, probes not."""
        return self.total.queries

    @property
    def cost(self) -> float:
        """Of all usable APIs together, control included, probes not."""
        return self.total.price

    @property
    def spending(self) -> Spending:
        """What the probes have asked, and what control and run are to ask."""
        parts = {PROBES: sum((one.probe for one in self.apis), Cost())}
        if any(one.usable for one in self.apis):
            parts[f"{CONTROL}, planned"] = sum((one.control for one in self.apis), Cost())
            parts[f"{RUN}, planned"] = sum((one.run for one in self.apis), Cost())
        return Spending(parts, cap=self.cap)

    @property
    def seconds(self) -> float:
        """Until the last answer: the services of a group are asked at once, local APIs one after
        the other.
        """
        groups = [
            self.apis[first : first + self.group] for first in range(0, len(self.apis), self.group)
        ]
        return sum(
            max(
                sum(one.seconds for one in group if not one.is_service),
                max((one.seconds for one in group if one.is_service), default=0.0),
            )
            for group in groups
        )

    def rows(self) -> list[list[str]]:
        """A table with a row per API and one for all."""
        rows = [
            [
                "API",
                "usable",
                "scores",
                "smallest mu",
                "suggested mu",
                "images/s",
                "queries",
                "time",
                "cost",
            ]
        ]
        for one in self.apis:
            report, steps, rates = one.report, one.report.steps, one.report.images_per_second
            smallest = (
                f"{steps.smallest:.3g}" if steps is not None and steps.smallest is not None else "?"
            )
            suggested = "?" if steps is None else f"{steps.suggested:.3g}"
            rate = f"{max(rates.values()):,.0f}" if rates else "?"
            planned = [f"{one.both.queries:,}", duration(one.seconds), money(one.both.price)]
            rows.append(
                [
                    report.name,
                    "yes" if one.usable else "no",
                    report.scores_kind,
                    smallest,
                    suggested,
                    rate,
                    *(planned if one.usable else ["-", "-", "-"]),
                ]
            )
        total = [f"{self.total.queries:,}", duration(self.seconds), money(self.total.price)]
        return [*rows, ["all", "", "", "", "", "", *total]]

    @property
    def problems(self) -> list[str]:
        """Why the APIs that cannot be used cannot."""
        named = ((f"{one.report.name}: ", one.report.problem) for one in self.apis)
        return [name + problem.removeprefix(name) for name, problem in named if problem is not None]

    @property
    def notes(self) -> list[str]:
        """What looks wrong in the answers of the APIs that can be used."""
        return [f"{one.report.name}: {note}" for one in self.apis for note in one.report.notes]


def plan(
    apis: Sequence[BlackBox], config: TrainConfig, *, seed: int = 0, progress: bool = False
) -> Plan:
    """Probe every API, for `probe.PROBE_QUERIES` queries each, and work out what
    `fit_with_control` would ask it.
    """
    planned = []
    with Bar("probe", len(apis), "APIs", progress) as bar:
        for api in bar.over(apis):
            report = probe(api, seed=seed)
            probed = Cost(report.queries, report.requests, api.price_of(report.queries))
            both = [
                run_cost(api, one) if report.problem is None else Cost()
                for one in (config, config.control())
            ]
            planned.append(PlannedAPI(report, api.is_service, probed, *both))
    return Plan(planned, config.meta_batch_size, Cap.of(api.budget for api in apis))


def run_cost(api: BlackBox, config: TrainConfig) -> Cost:
    """Count what a run asks one API if nothing goes wrong: two sets of images. A service is not
    contacted for it.
    """
    return set_cost(as_known(api), config.recovery, config.n_per_class, config.paper_compat) * 2


def as_known(api: BlackBox) -> BlackBox:
    """Return a box to count with: a service's as far as it is known so far, since a dead one is
    waited for.
    """
    return _KnownService(api) if isinstance(api, ServiceBlackBox) else api


class _KnownService(BlackBox):
    """A service that is only counted with: its requests hold what its spec, or what it told
    before, allows.
    """

    def __init__(self, service: ServiceBlackBox) -> None:
        super().__init__(service.spec)
        self._most = service.known_batch

    def score(self, images: Tensor) -> Tensor:
        raise AssertionError("it is never asked")

    def requests_for(self, n_images: int) -> int:
        return -(-n_images // self._most)


def keep_plan(folder: Path, apis: Sequence[BlackBox], config: TrainConfig) -> None:
    """Write what a run of `apis` is to ask into its folder, with the cap on it, for whoever looks
    at it under way.
    """
    planned = sum((run_cost(api, config) for api in apis), Cost())
    write_plan(folder, planned, Cap.of(api.budget for api in apis), n_sets=2 * len(apis))


def too_short(plan: Plan, config: TrainConfig) -> list[str]:
    """List what to change where the run's step length (mu) is shorter than an API resolves."""
    mu = config.recovery.mu
    if isinstance(mu, str):
        return []
    return [
        f"{one.report.name}: mu={mu:g} is shorter than it resolves ({steps.smallest:.3g}); "
        "take mu=auto"
        for one in plan.apis
        if (steps := one.report.steps) is not None
        and steps.smallest is not None
        and mu < steps.smallest
        # Nothing is known below the shortest step that was tried.
        and steps.smallest > min(steps.agreement)
    ]


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, whatever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
