"""Count what was spent and planned, in one table for plans, reports and `bidfmkd status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bidfmkd_fast.black_box import Budget
from bidfmkd_fast.black_box.ledger_file import read_ledger
from bidfmkd_fast.files.atomic import write_json
from bidfmkd_fast.recovery.cost import Cost
from bidfmkd_fast.training.kept_values import read_kept, read_summary
from bidfmkd_fast.training.run_folder import CONFIG, LEDGER, META_MODEL, PLAN, SUMMARY

PROBES, CONTROL, RUN = "probes", "control", "run"


@dataclass(frozen=True)
class Cap:
    """The most that may be spent on all APIs together; None for no cap."""

    queries: int | None = None
    requests: int | None = None
    price: float | None = None

    @classmethod
    def of(cls, budgets: Iterable[Budget | None]) -> Cap:
        """Sum the caps of the APIs' budgets.

        A budget that several APIs share counts once. If any API has no cap, the sum has none.
        """
        different = list({id(budget): budget for budget in budgets}.values())

        def total(unit: str) -> Any:
            caps = [
                None if budget is None else getattr(budget, f"max_{unit}") for budget in different
            ]
            return sum(caps) if caps and None not in caps else None

        return cls(total("queries"), total("requests"), total("cost"))


@dataclass(frozen=True)
class Spending:
    """What a run has spent, or is planned to spend.

    Attributes:
        parts: the cost of each part of the run, such as its control.
        planned: what the whole run was planned to spend; None if no plan is known, or if the parts
            are the plan.
        cap: the cap on all parts together.
    """

    parts: Mapping[str, Cost]
    planned: Cost | None = None
    cap: Cap = Cap()

    @property
    def total(self) -> Cost:
        """Return the sum over the parts."""
        return sum(self.parts.values(), Cost())

    def rows(self) -> list[list[str]]:
        """Return a table with a row per part, then their sum, the plan and the cap."""
        rows = [["spending", "queries", "requests", "cost"]]
        costs = dict(self.parts)
        if len(costs) > 1:
            costs["all"] = self.total
        if self.planned is not None:
            costs["planned"] = self.planned
        rows += [
            [name, f"{cost.queries:,}", f"{cost.requests:,}", money(cost.price)]
            for name, cost in costs.items()
        ]
        caps = [
            None if cap is None else f"{cap:,}" for cap in (self.cap.queries, self.cap.requests)
        ]
        caps.append(None if self.cap.price is None else money(self.cap.price))
        return [*rows, ["cap", *("none" if cap is None else cap for cap in caps)]]


@dataclass(frozen=True)
class KeptPlan:
    """What a run is to ask, the cap on it, and its number of sets: the content of `plan.json`."""

    planned: Cost
    cap: Cap
    sets: int


def over_cap(plan: Spending) -> list[str]:
    """Say in which units a plan exceeds its cap, by itself or together with its probes."""
    lines = []
    parts = {name: spent for name, spent in plan.parts.items() if name != PROBES}
    run, who = sum(parts.values(), Cost()), "control and run" if len(parts) > 1 else "the run"
    for unit, field in (("queries", "queries"), ("requests", "requests"), ("cost", "price")):
        most, wanted, whole = (getattr(amount, field) for amount in (plan.cap, run, plan.total))
        if most is None or not run.queries:
            continue
        as_text = money if unit == "cost" else "{:,}".format
        if wanted > most:
            lines.append(
                f"over the budget: {unit} of {who} are {as_text(wanted)}, the cap is "
                f"{as_text(most)}; the run would end there; raise --max-{unit}, or lower "
                "survey.n_images, n_per_class, recovery.steps or recovery.num_directions"
            )
        elif whole > most:
            lines.append(
                f"over the budget with the probes: {unit} are {as_text(whole)}, the cap is "
                f"{as_text(most)}"
            )
    return lines


def money(amount: float) -> str:
    """Write an amount of money with two decimals, or with two digits if it is below 1."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def write_plan(folder: Path, planned: Cost, cap: Cap, n_sets: int) -> None:
    """Write what a run is planned to ask, and its number of sets, for `read_spending`."""
    write_json(folder / PLAN, asdict(KeptPlan(planned, cap, n_sets)))


def read_spending(folder: Path) -> Spending:
    """Read what a run and its control have spent so far, whether they are finished or not.

    Nothing is written and no lock is taken. Raises InputError if a file is damaged.
    """
    parts, plans = {}, []
    for name, part in ((CONTROL, folder / "control"), (RUN, folder)):
        if (spent := read_spent(part)) is not None:
            parts[name] = spent
        if (plan := read_plan(part)) is not None:
            plans.append(plan)
    complete = bool(plans) and len(plans) == len(parts)
    planned = sum((plan.planned for plan in plans), Cost()) if complete else None
    return Spending(parts, planned, plans[-1].cap if plans else Cap())


def read_spent(folder: Path) -> Cost | None:
    """Read what the run in one folder has asked; None if there is no run.

    The counts of a finished run come from its summary, those of an unfinished run from its ledger.
    """
    if (folder / META_MODEL).is_file() and (folder / SUMMARY).is_file():
        summary = read_summary(folder / SUMMARY)
        ledger = summary.get("ledger")
        if "requests" in summary:
            return Cost(
                summary["queries"], summary["requests"], sum(row["cost"] for row in ledger or ())
            )
        # A method of an experiment that is no run: its summary has a ledger of what the method
        # itself asked. Older versions wrote none.
        return None if ledger is None else sum((_spent(row) for row in ledger), Cost())
    if (folder / LEDGER).is_file():
        return sum((_spent(asdict(row)) for row in read_ledger(folder / LEDGER)), Cost())
    return Cost() if (folder / CONFIG).is_file() else None


def read_plan(folder: Path) -> KeptPlan | None:
    """Read what `write_plan` wrote; None for folders of older versions, which have no plan."""
    return read_kept(KeptPlan, folder / PLAN) if (folder / PLAN).is_file() else None


def _spent(row: Mapping[str, Any]) -> Cost:
    """Return what a row of a ledger has counted."""
    return Cost(row["queries"], row["requests"], row["cost"])
