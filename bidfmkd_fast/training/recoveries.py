"""Both sets of each API: from disk where they are there, several services at once, none waited for without end."""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.meta import DistillationTask, adapt_to_api
from bidfmkd_fast.meta.inner_loop import forward
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.recovery.objective import Student
from bidfmkd_fast.recovery.recover import recover
from bidfmkd_fast.recovery.recovered import Recovered
from bidfmkd_fast.recovery.side_by_side import recover_side_by_side
from bidfmkd_fast.runtime.interrupt import Stop, current
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.plan import run_cost
from bidfmkd_fast.training.run import RecoveredSet
from bidfmkd_fast.training.run_folder import RunFolder

_log = logging.getLogger("bidfmkd_fast")  # the one whose filter removes secrets

# A group goes on without a service that takes so many times as long as any before it, and so many
# seconds at least.
_PATIENCE, _LEAST_SECONDS = 3.0, 60.0


@dataclass
class Outcome:
    """What came of one API: its sets so far, and the error that kept it from giving both."""

    index: int
    sets: list[RecoveredSet] = field(default_factory=list)
    error: Exception | None = None
    asked: bool = False  # whether anything was asked, rather than read from disk
    seconds: float = 0.0

    def task(self, api: BlackBox) -> DistillationTask | None:
        """Both sets as a task of the distillation; None if one is missing."""
        if len(self.sets) < 2:
            return None
        support, query = self.sets
        return DistillationTask(
            support.images,
            support.recovered.scores,
            query.images,
            query.recovered.scores,
            api.spec.returned_kind,
        )


class Stopped(Exception):
    """The run has ended while a set was being recovered."""


class Recoveries:
    """Recovers groups of APIs. Services of a group run at once, each in a thread; local APIs one
    after the other, or, without a budget, side by side on a GPU.

    What is recovered does not depend on that, as far as the APIs' answers do not: seeds go by API
    and set, and the task models of a group start from the same meta-model. A set under way has a
    journal, from which the next attempt or the next process goes on. To be used in a `with` block,
    which stops what is under way.
    """

    def __init__(
        self,
        apis: Sequence[BlackBox],
        generator: nn.Module | None,
        config: TrainConfig,
        device: torch.device,
        folder: RunFolder | None,
        bar: Bar | None = None,
    ) -> None:
        self._bar = bar or Bar("recover", 0, "queries", progress=False)
        self.apis, self.generator, self.config, self.device, self.folder = (
            apis,
            generator,
            config,
            device,
            folder,
        )
        self._stop = Stop(current())
        n_services = sum(api.is_service for api in apis)
        self._threads = ThreadPoolExecutor(
            max(1, n_services), "recovery", initializer=self._stop.adopt
        )
        # Without a run folder the journals serve the next attempt at a service that failed.
        self._scratch = None if folder else tempfile.TemporaryDirectory(prefix="bidfmkd-")
        self._begun: set[tuple[int, str]] = set()  # sets whose recovery this process has begun
        self._late: list[Future[Outcome]] = []
        self._made: dict[tuple[int, str], RecoveredSet] = {}
        self._longest: float | None = None

    def __enter__(self) -> Recoveries:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    def group(self, indices: Sequence[int], module: nn.Module, outer_step: int) -> list[Outcome]:
        """Both sets of these APIs, by number, and of earlier ones that were late; less those that
        are late now.

        Raises what a local API raises, which asking again would not mend.
        """

        def job(index: int) -> Callable[[], Outcome]:
            own = copy.deepcopy(
                module
            )  # running it swaps its parameters, which threads must not share
            return lambda: self._recover_api(index, own, outer_step)

        services = [
            self._threads.submit(job(index)) for index in indices if self.apis[index].is_service
        ]
        local = [index for index in indices if not self.apis[index].is_service]
        # What a budget pays is to be whole sets: one after the other there.
        together = [index for index in local if self._at_once() and self.apis[index].budget is None]
        outcomes = self._side_by_side(together, module, outer_step)
        outcomes += [job(index)() for index in local if index not in together]
        outcomes += self._gather(services)
        return sorted(outcomes, key=lambda outcome: outcome.index)

    def rest(self) -> list[Outcome]:
        """The APIs that were late, waited for."""
        late, self._late = self._late, []
        return sorted((future.result() for future in late), key=lambda outcome: outcome.index)

    def _gather(self, services: list[Future[Outcome]]) -> list[Outcome]:
        started, waiting = time.monotonic(), set(services)
        while waiting:
            patience = (
                None if self._longest is None else max(_LEAST_SECONDS, _PATIENCE * self._longest)
            )
            left = None if patience is None else max(0.0, started + patience - time.monotonic())
            done, waiting = wait(waiting, left, FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                outcome = future.result()
                if outcome.asked and outcome.error is None:
                    self._longest = max(self._longest or 0.0, outcome.seconds)
        finished = [future for future in (*self._late, *services) if future.done()]
        self._late = [future for future in (*self._late, *services) if not future.done()]
        return [future.result() for future in finished]

    def _recover_api(self, index: int, module: nn.Module, outer_step: int) -> Outcome:
        api, outcome, started = self.apis[index], Outcome(index), time.monotonic()
        errors: tuple[type[Exception], ...] = (BudgetExhausted,)
        if api.is_service:
            errors += (APIUnavailable, BadAnswer)
        try:
            support = self._set(outcome, "support", lambda step: None)
            self._set(
                outcome,
                "query",
                lambda step: self._student(index, module, support, outer_step, step),
            )
        except errors as error:
            outcome.error = error
        outcome.seconds = time.monotonic() - started
        return outcome

    def _at_once(self) -> bool:
        """Whether sets of several local APIs are made at once: where a device takes them, and no
        host looks on.
        """
        return (
            self.device.type == "cuda" and self.generator is None and not self.config.paper_compat
        )

    def _side_by_side(
        self, indices: Sequence[int], module: nn.Module, outer_step: int
    ) -> list[Outcome]:
        """All support sets at once, then all query sets. Raises what ended one, once all others
        are kept.
        """
        outcomes = [Outcome(index) for index in indices]
        self._sets(outcomes, "support", lambda outcome, step: None)
        left = [outcome for outcome in outcomes if outcome.error is None]

        def student(outcome: Outcome, step: int) -> Student | None:
            own = copy.deepcopy(module)  # each task model lives until its set is done
            return self._student(outcome.index, own, outcome.sets[0], outer_step, step)

        self._sets(left, "query", student)
        return outcomes

    def _sets(
        self,
        outcomes: Sequence[Outcome],
        part: str,
        student_of: Callable[[Outcome, int], Student | None],
    ) -> None:
        asked = []
        for outcome in outcomes:
            one = self._held(outcome.index, part)
            if one is None:
                asked.append(outcome)
            else:
                outcome.sets.append(one)
        errors: list[Exception] = []
        for outcome in asked:
            self._reserve(outcome.index, part)
        with ExitStack() as stack:
            journals = [
                stack.enter_context(self._journal(outcome.index, part)) for outcome in asked
            ]
            for i, result in recover_side_by_side(
                [self.apis[outcome.index] for outcome in asked],
                self.config.n_per_class,
                [student_of(outcome, journal.steps) for outcome, journal in zip(asked, journals)],
                self.config.recovery,
                seeds=[self._seed(outcome.index, part) for outcome in asked],
                device=self.device,
                journals=journals,
            ):
                if isinstance(result, BudgetExhausted):
                    asked[i].asked, asked[i].error = True, result
                elif isinstance(result, Exception):
                    errors.append(result)
                else:
                    self._keep(asked[i], part, result, journals[i])
        if errors:
            raise errors[0]

    def _set(
        self, outcome: Outcome, part: str, student_from: Callable[[int], Student | None]
    ) -> RecoveredSet:
        """A set, from disk or recovered; `student_from` makes the student that is asked from a
        step on.
        """
        api = self.apis[outcome.index]
        one = self._held(outcome.index, part)
        if one is not None:
            outcome.sets.append(one)
            return one
        outcome.asked = True
        self._reserve(outcome.index, part)
        with self._journal(outcome.index, part) as journal:
            how = f", {journal.queries:,} queries are answered already" if journal.queries else ""
            _log.info("%s: recovering the %s set%s", api.name, part, how)
            if (outcome.index, part) not in self._begun:
                self._begun.add((outcome.index, part))
                self._bar.skip(journal.queries)  # what an earlier process was answered
            recovered = recover(
                api,
                self.config.n_per_class,
                student_from(journal.steps),
                self.config.recovery,
                generator=self.generator,
                seed=self._seed(outcome.index, part),
                device=self.device,
                paper_compat=self.config.paper_compat,
                # On a GPU the look at every step would wait for the device.
                callback=self._after_step if api.is_service or self.device.type != "cuda" else None,
                journal=journal,
            )
            return self._keep(outcome, part, recovered, journal)

    def _journal(self, index: int, part: str) -> Journal:
        if self.folder is not None:
            return Journal(self.folder.journal(index, part))
        assert self._scratch is not None
        return Journal(Path(self._scratch.name) / f"{index}_{part}")

    def _seed(self, index: int, part: str) -> int:
        return derive_seed(self.config.seed, "api", index, part)

    def _held(self, index: int, part: str) -> RecoveredSet | None:
        """A set that was made before, in this process or in one that ended."""
        one = self._made.get((index, part))
        if one is None and self.folder is not None:
            one = self.folder.load_recovered(index, part, self.apis[index])
            if (
                one is not None
            ):  # the process may have ended between the set and the end of its journal
                shutil.rmtree(self.folder.journal(index, part), ignore_errors=True)
                _log.info(
                    "%s: the %s set is in %s already", self.apis[index].name, part, self.folder.path
                )
                self._bar.skip(run_cost(self.apis[index], self.config).queries // 2)
        if one is not None:
            self._made[index, part] = one
        return one

    def _keep(
        self, outcome: Outcome, part: str, recovered: Recovered, journal: Journal
    ) -> RecoveredSet:
        api = self.apis[outcome.index]
        recovered = replace(recovered, images=api.spec.to_unit(recovered.images))
        one = RecoveredSet(outcome.index, api.name, api.spec.names, part, recovered)
        if self.folder is not None:
            self.folder.save_recovered(one)
        journal.remove()
        self._made[outcome.index, part] = one
        outcome.asked = True
        outcome.sets.append(one)
        return one

    def _reserve(self, index: int, part: str) -> None:
        """Take the disk space of a set before anything is asked for it."""
        if self.folder is not None:
            self.folder.reserve(index, part, self.apis[index].spec)

    def _after_step(self, record: dict[str, Any]) -> None:
        if self._stop.is_set():
            raise Stopped
        self._bar.show(loss=record["loss"])

    def _student(
        self, index: int, module: nn.Module, support: RecoveredSet, outer_step: int, first_step: int
    ) -> Student | None:
        """The task model theta_A as a function from images in the API's input range to logits; None
        without a use.

        It is asked once in every step from `first_step` on.
        """
        if not self.config.boundary_recovery or outer_step < self.config.boundary_start:
            return None
        seed, api = self.config.seed, self.apis[index]
        with seeded(seed, "student", outer_step):
            adapted = adapt_to_api(
                module,
                dict(module.named_parameters()),
                support.images,
                support.recovered.scores,
                # First order: nothing is differentiated through the adaptation here.
                self.config.distillation.inner._replace(first_order=True),
                scores_kind=api.spec.returned_kind,
                paper_compat=self.config.paper_compat,
            )
        parameters = {name: value.detach() for name, value in adapted.items()}
        steps = itertools.count(first_step)

        def student(points: Tensor) -> Tensor:
            with seeded(
                seed, "task model", support.api_index, next(steps)
            ):  # dropout draws from the global generator
                return forward(module, parameters, api.spec.to_unit(points))

        return student
