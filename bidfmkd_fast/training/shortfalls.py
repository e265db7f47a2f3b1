"""Note what a run lacks: budgets that ended, services that failed."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

from bidfmkd_fast.errors import BudgetExhausted, ServiceWarning
from bidfmkd_fast.runtime.ranks import current

_log = logging.getLogger("bidfmkd_fast")  # the logger whose filter removes secrets


@dataclass
class Shortfalls:
    """What keeps a run from being complete.

    Attributes:
        budget_ended: whether a budget ended before everything was asked.
        skipped: why services were skipped, by number; they are asked again at the end.
        unsurveyed: why services did not answer the survey, by name.
        failed_before: the numbers of the services that failed at least once.
        last_error: the last error that kept an API from answering; not kept in a checkpoint.
    """

    budget_ended: bool = False
    skipped: dict[int, str] = field(default_factory=dict)
    unsurveyed: dict[str, str] = field(default_factory=dict)
    failed_before: set[int] = field(default_factory=set)
    last_error: Exception | None = None

    @property
    def complete(self) -> bool:
        """Return True if the run lacks nothing."""
        return not (self.budget_ended or self.skipped or self.unsurveyed)

    def take_failed(self) -> list[int]:
        """Return the numbers of the services that were skipped, and forget that they were."""
        failed, self.skipped = sorted(self.skipped), {}
        return failed

    def note_unsurveyed(self, name: str, error: Exception, again: bool) -> None:
        """Note why an API did not answer the survey; `again` if it was asked for the second time.

        A budget that ends makes no warning, since the report says so.
        """
        self.last_error, reason = error, " ".join(str(error).split())
        if isinstance(error, BudgetExhausted):
            if again:  # else it may be paid for the second time
                self.budget_ended = True
                _log.info("%s: the survey ends here: %s", name, reason)
            return
        consequence = "goes on without it" if again else "asks it again at the end"
        _warn(f"{name}: the survey {consequence}: {reason}")
        if again:
            self.unsurveyed[name] = f"survey: {reason}"

    def note_failure(self, index: int, name: str, error: Exception) -> None:
        """Note that a budget ended, or warn that a service is skipped for `error`."""
        self.last_error, reason = error, " ".join(str(error).split())
        if isinstance(error, BudgetExhausted):
            self.budget_ended = True
            _log.info("%s: its recovery ends here: %s", name, reason)
            return
        consequence = (
            "it is left out"
            if index in self.failed_before
            else "it is skipped and asked again at the end"
        )
        _warn(f"{name}: {consequence}: {reason}")
        self.failed_before.add(index)
        self.skipped[index] = reason

    def to_state(self) -> dict[str, Any]:
        """Return the shortfalls as plain values for a checkpoint."""
        return {
            "budget_ended": self.budget_ended,
            "skipped": sorted(self.skipped.items()),
            "unsurveyed": self.unsurveyed,
            "failed_before": sorted(self.failed_before),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Shortfalls:
        """Return the shortfalls that `to_state` described."""
        return cls(
            state["budget_ended"],
            dict(state["skipped"]),
            state["unsurveyed"],
            set(state["failed_before"]),
        )


def _warn(text: str) -> None:
    """Warn about a service, and write the same to the log.

    The command line leaves log records with `warned` out, since it shows warnings.
    """
    if not current().first:  # all ranks note it
        return
    warnings.warn(text, ServiceWarning, stacklevel=4)
    _log.info("%s", text, extra={"warned": True})
