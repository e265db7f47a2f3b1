"""Keep the recovered sets of a run: finished sets on disk, sets under way in journals."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.recovery.recovered import Recovered
from bidfmkd_fast.runtime.interrupt import Stop, current
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.run import RecoveredSet
from bidfmkd_fast.training.run_cost import recovery_cost
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.services import Services

_log = logging.getLogger("bidfmkd_fast")  # the logger whose filter removes secrets


class Stopped(Exception):
    """The run has ended while a set was still being recovered."""


class Recoveries:
    """The sets of a run by API and part, with the progress bar of their queries.

    A set has a seed of its own, derived from its API and its part, so its images do not depend on
    which sets were recovered before it. A set under way has a journal, from which the next attempt,
    or the next process, continues. Use it in a `with` block, which removes the journals of a run
    without a folder.

    Attributes:
        stop: ends the recoveries that are under way in threads.
    """

    def __init__(self, run: RunState) -> None:
        self.stop = Stop(current())
        self._run = run
        self._finished: dict[tuple[int, str], RecoveredSet] = {}
        self._begun: set[tuple[int, str]] = set()  # the sets that this process has begun
        self._resources = ExitStack()

    def __enter__(self) -> Recoveries:
        run = self._run
        if run.folder is None:
            # Journals then serve only the second attempt at a service that failed.
            self._scratch = Path(
                self._resources.enter_context(tempfile.TemporaryDirectory(prefix="bidfmkd-"))
            )
        answered = sum(api.ledger.answered_queries for api in run.apis)
        self._bar = self._resources.enter_context(
            Bar(
                f"{run.label}: recover",
                sum(recovery_cost(api, run.config).queries for api in run.apis),
                "queries",
                run.progress and bool(run.recoverable),
                position=lambda: sum(api.ledger.answered_queries for api in run.apis) - answered,
            )
        )
        for held in run.recovered:  # from a checkpoint
            self._finished[held.api_index, held.part] = held
            self._bar.skip(recovery_cost(run.apis[held.api_index], run.config).queries // 2)
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def services(self, n_services: int) -> Services:
        """Return the threads that recover services, which `stop` ends."""
        return Services(n_services, self.stop, self._run.ranks)

    def seed(self, index: int, part: str) -> int:
        """Return the seed of a set, a function of the run's seed, the API's number and the part."""
        return derive_seed(self._run.config.seed, "api", index, part)

    def find(self, outcome: Outcome, part: str) -> bool:
        """Return True, and add the set to `outcome`, if it was recovered before.

        It may come from this process, or from one that was killed.
        """
        run, key = self._run, (outcome.index, part)
        if key not in self._finished and run.folder is not None:
            api = run.apis[outcome.index]
            loaded = run.folder.load_recovered(outcome.index, part, api)
            if loaded is not None:
                # A process that was killed after it wrote the set has left the journal behind.
                shutil.rmtree(run.folder.journal(outcome.index, part), ignore_errors=True)
                _log.info("%s: found the %s set in %s", api.name, part, run.folder.path)
                self._bar.skip(recovery_cost(api, run.config).queries // 2)
                self._finished[key] = loaded
        if key not in self._finished:
            return False
        outcome.sets.append(self._finished[key])
        return True

    @contextmanager
    def under_way(self, outcome: Outcome, part: str) -> Iterator[Journal]:
        """Give the journal of a set that the block recovers; reserve the set's disk space first."""
        run, key = self._run, (outcome.index, part)
        api = run.apis[outcome.index]
        if run.folder is not None:
            run.folder.reserve(outcome.index, part, api.spec)
            path = run.folder.journal(outcome.index, part)
        else:
            path = self._scratch / f"{outcome.index}_{part}"
        with Journal(path) as journal:
            outcome.asked = True
            answered = (
                f", {journal.queries:,} queries are answered already" if journal.queries else ""
            )
            _log.info("%s: recovering the %s set%s", api.name, part, answered)
            if key not in self._begun:
                self._begun.add(key)
                self._bar.skip(journal.queries)  # an earlier process asked them
            yield journal

    def keep(self, outcome: Outcome, part: str, recovered: Recovered, journal: Journal) -> None:
        """Save a set that is finished, remove its journal, and add the set to `outcome`."""
        run, spec = self._run, self._run.apis[outcome.index].spec
        in_unit_range = replace(recovered, images=spec.to_unit(recovered.images))
        finished = RecoveredSet(outcome.index, spec.name, spec.names, part, in_unit_range)
        if run.folder is not None:
            finished = run.folder.save_recovered(finished)
        journal.remove()
        self._finished[outcome.index, part] = finished
        outcome.sets.append(finished)

    def after_step(self, record: dict[str, Any]) -> None:
        """Show the loss of a recovery step; raise Stopped if the run has ended meanwhile."""
        if self.stop.is_set():
            raise Stopped
        self._run.ranks.check()
        self._bar.show(loss=record["loss"])
