"""Plan a run: what it would ask, how long it would take and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.probe import ProbeReport, probe
from bidfmkd_fast.recovery.cost import Cost
from bidfmkd_fast.runtime.machine import usable_device
from bidfmkd_fast.runtime.progress import Bar, duration
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.run_cost import run_cost
from bidfmkd_fast.training.run_memory import check_run_memory
from bidfmkd_fast.training.spending import CONTROL, PROBES, RUN, Cap, Spending, money


@dataclass(frozen=True)
class PlannedAPI:
    """One API of a plan.

    Attributes:
        report: what its probe found.
        is_service: whether it is asked over a network.
        probe: what the probe asked.
        run, control: what the run and its control would ask; nothing if the API cannot be used,
            or if no control is planned.
    """

    report: ProbeReport
    is_service: bool
    probe: Cost
    run: Cost
    control: Cost

    @property
    def usable(self) -> bool:
        """Return True if the probe found no reason against using the API."""
        return self.report.problem is None

    @property
    def both(self) -> Cost:
        """Return what the run and its control would ask together."""
        return self.run + self.control

    @property
    def seconds(self) -> float:
        """Return the time for all queries at the best speed of the probe; 0 if it measured none."""
        rates = self.report.images_per_second
        return self.both.queries / max(rates.values()) if rates else 0.0


@dataclass(frozen=True)
class Plan:
    """A plan of a run, API by API.

    Attributes:
        apis: the APIs in the order of the pool.
        group: how many of them are recovered in a round.
        cap: the cap on what may be spent.
        controls: whether the no-recovery control is planned as well.
    """

    apis: list[PlannedAPI]
    group: int
    cap: Cap
    controls: bool

    @property
    def total(self) -> Cost:
        """Return what run and control would ask of all usable APIs, the probes left out."""
        return sum((api.both for api in self.apis), Cost())

    @property
    def queries(self) -> int:
        """Return the queries of `total`."""
        return self.total.queries

    @property
    def cost(self) -> float:
        """Return the price of `total`."""
        return self.total.price

    @property
    def spending(self) -> Spending:
        """Return what the probes have asked, and what the run and a control would ask."""
        parts = {PROBES: sum((api.probe for api in self.apis), Cost())}
        if any(api.usable for api in self.apis):
            if self.controls:
                parts[f"{CONTROL}, planned"] = sum((api.control for api in self.apis), Cost())
            parts[f"{RUN}, planned"] = sum((api.run for api in self.apis), Cost())
        return Spending(parts, cap=self.cap)

    @property
    def seconds(self) -> float:
        """Return the time until the last answer.

        The services of a group are asked at the same time, its local APIs one after the other.
        """
        groups = [
            self.apis[first : first + self.group] for first in range(0, len(self.apis), self.group)
        ]
        return sum(
            max(
                sum(api.seconds for api in group if not api.is_service),
                max((api.seconds for api in group if api.is_service), default=0.0),
            )
            for group in groups
        )

    def rows(self) -> list[list[str]]:
        """Return a table with a row per API and a row for all of them."""
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
        for api in self.apis:
            report, steps, rates = api.report, api.report.steps, api.report.images_per_second
            smallest = (
                f"{steps.smallest:.3g}" if steps is not None and steps.smallest is not None else "?"
            )
            suggested = "?" if steps is None else f"{steps.suggested:.3g}"
            rate = f"{max(rates.values()):,.0f}" if rates else "?"
            planned = [f"{api.both.queries:,}", duration(api.seconds), money(api.both.price)]
            rows.append(
                [
                    report.name,
                    "yes" if api.usable else "no",
                    report.scores_kind,
                    smallest,
                    suggested,
                    rate,
                    *(planned if api.usable else ["-", "-", "-"]),
                ]
            )
        total = [f"{self.total.queries:,}", duration(self.seconds), money(self.total.price)]
        return [*rows, ["all", "", "", "", "", "", *total]]

    @property
    def problems(self) -> list[str]:
        """Say of each API that cannot be used why it cannot."""
        named = ((f"{api.report.name}: ", api.report.problem) for api in self.apis)
        return [name + problem.removeprefix(name) for name, problem in named if problem is not None]

    @property
    def notes(self) -> list[str]:
        """Say what looks wrong in the answers of the APIs that can be used."""
        return [f"{api.report.name}: {note}" for api in self.apis for note in api.report.notes]


def plan(
    apis: Sequence[BlackBox],
    config: TrainConfig,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = False,
    controls: bool = False,
) -> Plan:
    """Probe every API and count what `BiDfMKD.fit` would ask it.

    With `controls` the count is that of `fit_with_control`.

    A probe asks each API at most `probe.PROBE_QUERIES` queries.

    Raises:
        InputError: `device` is given, and its memory cannot hold the run; nothing has been asked.
    """
    if device is not None:
        device = usable_device("plan", device)
        check_run_memory("plan", apis, config, device)
    planned = []
    with Bar("probe", len(apis), "APIs", progress) as bar:
        for api in bar.over(apis):
            report = probe(api, seed=seed)
            probed = Cost(report.queries, report.requests, api.price_of(report.queries))
            usable = report.problem is None
            run = run_cost(api, config) if usable else Cost()
            control = run_cost(api, config.control()) if usable and controls else Cost()
            planned.append(PlannedAPI(report, api.is_service, probed, run, control))
    return Plan(planned, config.meta_batch_size, Cap.of(api.budget for api in apis), controls)


def too_short(plan: Plan, config: TrainConfig) -> list[str]:
    """Say for which APIs the step length (`mu`) of the run is too short, and what to do."""
    mu = config.recovery.mu
    if isinstance(mu, str):
        return []
    return [
        f"{api.report.name}: the step length mu={mu:g} is shorter than the API resolves "
        f"({steps.smallest:.3g}); use mu=auto"
        for api in plan.apis
        if (steps := api.report.steps) is not None
        and steps.smallest is not None
        and mu < steps.smallest
        # Nothing is known below the shortest length that the probe has tried.
        and steps.smallest > min(steps.agreement)
    ]
