"""Count what a run asks in the ledger of its folder, so that the counts outlive the process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.cost import measuring_cost
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.runtime.ranks import ALONE, Ranks
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.cost import piece_size
from bidfmkd_fast.survey.pictures import SharedPictures
from bidfmkd_fast.training.recovered_set import PARTS, least_queries
from bidfmkd_fast.training.run_folder import LEDGER, RunFolder
from bidfmkd_fast.training.shared_folder import RANK_LEDGERS, rank_ledger


@contextmanager
def counted_queries(
    folder: RunFolder, apis: Sequence[BlackBox], ranks: Ranks = ALONE
) -> Iterator[LedgerFile]:
    """Count what the block asks `apis` in a ledger of `folder`, before each request is sent.

    Queries that earlier processes asked for the same run are first taken from the budgets of
    `apis`, unless these budgets have paid for them already.

    Every one of `ranks` has a ledger of its own, since not every disk that machines share has the
    locks that SQLite needs. The ledger of rank 0 is the ledger of the run; it takes over the counts
    of the others at the end, or when the run is continued after a kill.

    Raises:
        InputError: the ledger or a recovered set is damaged, or belongs to another pool.

    Warns:
        UserWarning: the ledger holds fewer queries than the recovered sets have cost; the missing
            queries were added to it.
    """
    ledger = ranks.first_alone(lambda: _run_ledger(folder))
    if ledger is None:
        ledger = LedgerFile(rank_ledger(folder.path, ranks.rank))
    try:
        with ExitStack() as stack:
            for number, api in enumerate(apis):
                stack.enter_context(api.ledger.written_to(ledger, number, api.name))
            sessions = ranks.exchange(ledger.session)
            if ranks.first:
                _complete_from_sets(ledger, folder, apis)
                for number, api in enumerate(apis):
                    if api.budget is not None:
                        api.budget.restore_from(ledger, number, sessions)
            yield ledger
            if ranks.size > 1:
                if not ranks.first:
                    ledger.close()
                ranks.exchange()
                if ranks.first:
                    _merge(ledger, folder)
    except BaseException:
        if not ranks.first:
            _remove_unspent(ledger, folder)
        raise
    finally:
        ledger.close()


def _remove_unspent(ledger: LedgerFile, folder: RunFolder) -> None:
    """Remove the ledger of a rank that has asked nothing, so that a failed run leaves no folder."""
    with suppress(InputError, OSError):
        if not any(row.queries for row in ledger.rows()):
            ledger.close()
            ledger.path.unlink()
            folder.path.rmdir()


def _run_ledger(folder: RunFolder) -> LedgerFile:
    """Open the ledger of a run, with the counts of ranks that were killed."""
    ledger = LedgerFile(folder.path / LEDGER)
    try:
        _merge(ledger, folder)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _merge(ledger: LedgerFile, folder: RunFolder) -> None:
    """Take over the counts of ranks that have ended."""
    for file in sorted(folder.path.glob(RANK_LEDGERS)):
        ledger.merge(file)


def _complete_from_sets(ledger: LedgerFile, folder: RunFolder, apis: Sequence[BlackBox]) -> None:
    """Add the queries that finished sets and sets under way have cost, if the ledger holds fewer.

    The ledger holds fewer if its file was lost, or if a power failure took its last counts.
    """
    config, added = folder.config(), 0
    counted = {row.number: row.queries for row in ledger.rows()}
    for number, api in enumerate(apis):
        n_images = config.n_per_class * api.spec.n_classes
        measuring = measuring_cost(api, config.recovery, n_images).queries
        queries, requests = _surveyed(folder, api, number)
        for part in PARTS:
            finished = folder.load_recovered(number, part, api)
            if finished is not None:
                queries += least_queries(finished, measuring)
                requests += max(1, len(finished.recovered.history))
            elif folder.journal(number, part).exists():
                begun = Journal(folder.journal(number, part))
                queries += begun.queries + (0 if begun.mu is None else measuring)
                requests += begun.steps
        missing = queries - counted.get(number, 0)
        if missing > 0:
            ledger.restore(number, missing, requests, api.price_of(missing))
            added += missing
    if added:
        warnings.warn(
            f"run folder: {ledger.path} or the end of it was lost, since it holds fewer queries "
            f"than the recovered sets have cost; {added:,} queries were added from these sets; "
            "what was asked besides them is not known",
            stacklevel=2,
        )


def _surveyed(folder: RunFolder, api: BlackBox, number: int) -> tuple[int, int]:
    """Return the queries and requests of the answers to the survey that the folder holds."""
    config = folder.config()
    n_images, n_first = config.survey.n_images, config.survey.n_first
    if not n_images or not folder.survey_file(number).exists():
        return 0, 0
    seed = SharedPictures(config.seed).seed
    answers = Answers(folder.survey_file(number), api.spec, seed, n_images, n_first)
    rounds = (answers.answered[:n_first], answers.answered[n_first:])
    return answers.queries, sum(-(-int(part.sum()) // piece_size(api)) for part in rounds)
