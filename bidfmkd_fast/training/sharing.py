"""Share the APIs of a run out over its ranks, and tell all ranks what each has got from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import Any

from bidfmkd_fast.black_box.ledger_file import LedgerRow, sum_of
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.recovered_set import PARTS
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.shared_folder import seen_recovered

_ERRORS = {kind.__name__: kind for kind in (APIUnavailable, BadAnswer, BudgetExhausted)}


def in_turn(run: RunState, indices: Sequence[int]) -> Iterator[int]:
    """Yield the local APIs of `indices` that this rank works on: it takes the next when it is free.

    Services are shared out by place instead (`Ranks.share`), since a rank asks all of its services
    at once and a slow one keeps nothing waiting.
    """
    for place in run.ranks.turns(len(indices)):
        yield indices[place]


def of_all(run: RunState, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of all ranks, of which `outcomes` are this rank's.

    Sets of other ranks are read from the folder of the run, which all ranks share.

    Raises InputError if such a set is missing or damaged.
    """
    if run.ranks.size == 1:
        return list(outcomes)
    rows = [] if run.ledger is None else [astuple(row) for row in run.ledger.rows() if row.queries]
    given = run.ranks.exchange({"rows": rows, "outcomes": [_plain(o) for o in outcomes]})
    run.others_rows = {}
    gathered = list(outcomes)
    for rank, told in enumerate(given):
        if rank == run.ranks.rank:
            continue
        for row in (LedgerRow(*values) for values in told["rows"]):
            held = run.others_rows.get(row.number)
            run.others_rows[row.number] = row if held is None else sum_of(held, row)
        gathered += [_outcome(run, about) for about in told["outcomes"]]
    return gathered


def _plain(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain values; its sets are in the folder of the run."""
    error = None
    if outcome.error is not None:
        kinds = (kind.__name__ for kind in type(outcome.error).__mro__)
        error = [next(kind for kind in kinds if kind in _ERRORS), str(outcome.error)]
    return {
        "index": outcome.index,
        "n_sets": len(outcome.sets),
        "error": error,
        "asked": outcome.asked,
    }


def _outcome(run: RunState, about: dict[str, Any]) -> Outcome:
    """Return the outcome that `_plain` described."""
    outcome = Outcome(about["index"], asked=about["asked"])
    for part in PARTS[: about["n_sets"]]:
        assert run.folder is not None  # several ranks have one
        outcome.sets.append(
            seen_recovered(run.folder, outcome.index, part, run.apis[outcome.index])
        )
    if about["error"] is not None:
        kind, text = about["error"]
        outcome.error = _ERRORS[kind](text)
    return outcome
