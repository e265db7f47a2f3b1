"""What APIs were and will be asked, in one table for plans, runs, reports and `bidfmkd status`."""

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
    """The most that may be spent, over all APIs together; None for no cap."""

    queries: int | None = None
    requests: int | None = None
    price: float | None = None

    @classmethod
    def of(cls, budgets: Iterable[Budget | None]) -> Cap:
        """Sum the caps of different budgets; APIs that share one share its cap, and one without
        any has no cap.
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
    """What each part of a run has spent or is to spend, what the run has planned, and the cap on
    it.

    `planned` is None where nothing is known of a plan, or where the parts are the plan.
    """

    parts: Mapping[str, Cost]
    planned: Cost | None = None
    cap: Cap = Cap()

    @property
    def total(self) -> Cost:
        """The sum over the parts."""
        return sum(self.parts.values(), Cost())

    def rows(self) -> list[list[str]]:
        """Return the table: a row per part, their sum, the plan and the cap."""
        rows = [["spending", "queries", "requests", "cost"]]
        every = dict(self.parts)
        if len(every) > 1:
            every["all"] = self.total
        if self.planned is not None:
            every["planned"] = self.planned
        rows += [
            [name, f"{one.queries:,}", f"{one.requests:,}", money(one.price)]
            for name, one in every.items()
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
    """Say where a plan asks for more than its cap, by itself or with the probes that were made for
    it.
    """
    lines = []
    run = sum((spent for name, spent in plan.parts.items() if name != PROBES), Cost())
    for unit, field in (("queries", "queries"), ("requests", "requests"), ("cost", "price")):
        most, wanted, whole = (getattr(amount, field) for amount in (plan.cap, run, plan.total))
        if most is None or not run.queries:
            continue
        form = money if unit == "cost" else "{:,}".format
        if wanted > most:
            lines.append(
                f"over the budget: {unit} of control and run are {form(wanted)}, the cap is "
                f"{form(most)}; the run would end there; raise --max-{unit}, or lower n_per_class, "
                "recovery.steps or recovery.num_directions"
            )
        elif whole > most:
            lines.append(
                f"over the budget with the probes: {unit} are {form(whole)}, the cap is "
                f"{form(most)}"
            )
    return lines


def money(amount: float) -> str:
    """Return a sum of money in cents, or in two digits where it is less than a unit."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def write_plan(folder: Path, planned: Cost, cap: Cap, n_sets: int) -> None:
    """Keep what a run is to ask in its folder, for `read_spending` while it is under way."""
    write_json(folder / PLAN, asdict(KeptPlan(planned, cap, n_sets)))


def read_spending(folder: Path) -> Spending:
    """Read what a run and its control have spent, whether finished or not; nothing is written, and
    no lock is taken.

    Raises:
        InputError: a file of the folder is damaged.
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
    """Read what one folder of a run has asked: of its summary once it is finished, of its ledger
    before; else None.
    """
    if (folder / META_MODEL).is_file() and (folder / SUMMARY).is_file():
        summary = read_summary(folder / SUMMARY)
        ledger = summary.get("ledger")
        if "requests" in summary:
            return Cost(
                summary["queries"], summary["requests"], sum(row["cost"] for row in ledger or ())
            )
        # A method that is no run: with the ledger of what it asked by itself, or from a version
        # that kept none.
        return None if ledger is None else sum((_spent(row) for row in ledger), Cost())
    if (folder / LEDGER).is_file():
        return sum((_spent(asdict(row)) for row in read_ledger(folder / LEDGER)), Cost())
    return Cost() if (folder / CONFIG).is_file() else None


def read_plan(folder: Path) -> KeptPlan | None:
    """Read what `write_plan` kept; None for a folder without it, as older versions made them."""
    return read_kept(KeptPlan, folder / PLAN) if (folder / PLAN).is_file() else None


def _spent(row: Mapping[str, Any]) -> Cost:
    return Cost(row["queries"], row["requests"], row["cost"])
