"""Hold the state of a run from its start to the finished `Run`: arguments and results so far."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile, LedgerRow, row_of, sum_of
from bidfmkd_fast.black_box.spec import NOTHING_RECOVERED
from bidfmkd_fast.files.checkpoints import Checkpoints
from bidfmkd_fast.meta import DistillationTask, MetaModel, TaskMemory
from bidfmkd_fast.runtime.ranks import ALONE, Ranks
from bidfmkd_fast.runtime.signals import held_back
from bidfmkd_fast.training.callbacks import Callback
from bidfmkd_fast.training.class_key import class_key
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.default_model import task_shape
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.position import Position
from bidfmkd_fast.training.records import Records
from bidfmkd_fast.training.round_start import RoundStart
from bidfmkd_fast.training.run import RecoveredSet, Run
from bidfmkd_fast.training.run_checkpoint import write_checkpoint
from bidfmkd_fast.training.run_folder import CHECKPOINTS, METRICS, RunFolder
from bidfmkd_fast.training.shortfalls import Shortfalls

_log = logging.getLogger("bidfmkd_fast")  # the logger whose filter removes secrets


@dataclass(eq=False)
class RunState:
    """The state of one run, which every step of the loop reads and changes.

    Args:
        apis: the black boxes, in the order of the pool.
        module: the meta-model's module, trained in place.
        generator: the user's image generator; None for the built-in one.
        config: the settings.
        device: where the module and the generators live.
        folder: where records and recovered sets are written as they are made; None to keep them in
            memory only.
        ledger: the ledger of `folder`.
        progress: whether to show progress bars.
        label: the name of the run on its progress bars.
        callbacks: what to call for every new record.
        ranks: the processes that share the run out. Rank 0 writes its files, but for what each
            asks; all hold the same models, sets and position.

    Attributes:
        memory: the recovered images by class, for replay.
        recovered: the recovered sets, in the order in which they were kept.
        records: the records of `metrics.jsonl`.
        seconds: wall time per stage.
        outer_step: steps that the meta-model has taken, distillation and replay together.
        replay_step: the replay steps among them.
        surveyed: the number of APIs that have answered the survey.
        shortfalls: what keeps the run from being complete.
        position: where in the loop the run is.
        stragglers: what the services began with that earlier rounds did not wait for, by number.
        survey_state: returns the state of the survey's distillation that is under way.
        survey_tensors: such a state, of the process that was cut off.
        consistent: whether models, moments, counters and position belong together; False inside a
            step, and after one that failed.
        checkpoints: the checkpoints in `folder`.
        others_rows: what other ranks had asked when the ranks last met, by number of the API.
        result: the finished run; None until `finish` has written its files.
    """

    apis: Sequence[BlackBox]
    module: nn.Module
    generator: nn.Module | None
    config: TrainConfig
    device: torch.device
    folder: RunFolder | None = None
    ledger: LedgerFile | None = None
    progress: bool = True
    label: str = "run"
    callbacks: Sequence[Callback] = ()
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.initial_module = copy.deepcopy(self.module)
        # Distillation and replay have an optimiser each: their losses differ in scale, so Adam's
        # moments from one loss would set wrong step lengths for the other.
        parameters = list(self.module.parameters())
        self.distillation_optimizer = torch.optim.Adam(
            parameters, lr=self.config.distillation.outer_lr
        )
        self.replay_optimizer = torch.optim.Adam(
            parameters,
            lr=self.config.replay.outer_lr,
            capturable=self.device.type == "cuda",  # a CUDA graph captures the replay steps
        )
        self.memory = TaskMemory(task_shape([api.spec for api in self.apis], self.config))
        self._sized = len({api.spec.image_shape for api in self.apis}) > 1
        self.recovered: list[RecoveredSet] = []
        writing = self.folder if self.ranks.first else None
        self.records = Records(None if writing is None else writing.path / METRICS, self.callbacks)
        self.seconds = {"survey": 0.0, "recovery": 0.0, "distillation": 0.0, "replay": 0.0}
        self.outer_step = self.replay_step = self.surveyed = 0
        self.shortfalls, self.position = Shortfalls(), Position()
        self.stragglers: dict[int, RoundStart] = {}
        self.survey_state: Callable[[], dict[str, Tensor]] | None = None
        self.survey_tensors: dict[str, Tensor] = {}
        self.result: Run | None = None
        self.consistent = True
        place = None if self.folder is None else self.folder.path / CHECKPOINTS
        self.checkpoints = Checkpoints(place)
        self.others_rows: dict[int, LedgerRow] = {}
        self._ledger_before = [row_of(number, api) for number, api in enumerate(self.apis)]

    @property
    def n_way(self) -> int:
        """Return the number of classes of a replay task, the fewest that an API has.

        APIs from which nothing is recovered do not count.
        """
        return min(self.apis[index].spec.n_classes for index in self.recoverable)

    @property
    def recoverable(self) -> list[int]:
        """Return the numbers of the APIs from which sets are recovered."""
        apis = enumerate(self.apis)
        return [index for index, api in apis if self.config.recovers_from(api.spec)]

    def log(self, what: str) -> None:
        """Write to the log what the run does, at level INFO."""
        _log.info("%s: %s", self.label, what)

    def note_labels_only(self) -> None:
        """Write to the log from which APIs nothing is recovered; the report says so, too."""
        for api in self.apis:
            if api.spec.labels_only:
                _log.info("%s: %s", api.name, NOTHING_RECOVERED)

    def keep(self, outcomes: Sequence[Outcome]) -> list[DistillationTask]:
        """Keep the sets of `outcomes` in memory and in the history; return the tasks they make.

        An API that gave only one of its sets makes no task. Failures are noted and reported.
        """
        tasks = []
        for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
            # A service that is asked again also returns the set that it gave the first time.
            kept = {(known.api_index, known.part) for known in self.recovered}
            for recovered_set in outcome.sets:
                if (recovered_set.api_index, recovered_set.part) not in kept:
                    self._keep_set(recovered_set)
            if (task := outcome.task(self.apis[outcome.index])) is not None:
                tasks.append(task)
            if outcome.error is not None:
                name = self.apis[outcome.index].name
                self.shortfalls.note_failure(outcome.index, name, outcome.error)
        return tasks

    def record(self, stage: str, **values: Any) -> None:
        """Append a record of `stage` to the history; `whole` tells the file and the callbacks."""
        record = {"stage": stage, "step": self.outer_step, **values}
        record |= {
            "queries": sum(row.queries for row in self._ledger_rows()),
            "seconds": round(sum(self.seconds.values()), 3),
        }
        self.records.add(record)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to the seconds of `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def finish(self) -> Run:
        """Return the finished run, and write its models and summary to its folder."""
        rows = self._ledger_rows()
        run = Run(
            meta_model=self._meta_model(self.module),
            initial_model=self._meta_model(self.initial_module),
            memory=self.memory,
            recovered=self.recovered,
            history=self.records.history,
            queries=sum(row.queries for row in rows),
            requests=sum(row.requests for row in rows),
            seconds=self.seconds,
            complete=self.shortfalls.complete,
            config=self.config,
            budget_ended=self.shortfalls.budget_ended,
            skipped=self.shortfalls.unsurveyed
            | {self.apis[i].name: reason for i, reason in self.shortfalls.skipped.items()},
            ledger=rows,
            labels_only=tuple(api.name for api in self.apis if api.spec.labels_only),
        )
        self.records.write()
        if self.folder is not None and self.ranks.first:
            with held_back():
                self.folder.finish(run)
                self.checkpoints.remove()
                self.result = run
        self.log(
            f"finished with {len(run.recovered)} sets, {run.queries:,} queries in "
            f"{run.requests:,} requests"
        )
        self.result = run
        return run

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let no signal interrupt the block, a step of the run.

        Afterwards the callbacks get the new records, and a checkpoint is written if one is due.

        Raises InputError if it cannot be written, and what a callback raises.
        """
        with held_back():
            self.consistent = False
            yield
            self.consistent = True
        self.records.tell()
        if self.ranks.first and self.checkpoints.due:
            write_checkpoint(self)

    @contextmanager
    def survey_step(self, state: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
        """Do as `whole` for a step of the survey's distillation, whose state `state` returns."""
        self.survey_state = state
        with self.whole():
            yield

    def start_again(self) -> None:
        """Drop the checkpoints of a run that has learned nothing, so that all is asked again."""
        if self.ranks.first:
            self.checkpoints.remove()
        self.consistent = False

    def round_start(self) -> RoundStart:
        """Return a copy of the meta-model as it is now."""
        return RoundStart(copy.deepcopy(self.module), self.outer_step)

    def note_stragglers(
        self, remote: Sequence[int], outcomes: Sequence[Outcome], start: RoundStart
    ) -> None:
        """Note which services of a round, `remote`, and of earlier ones gave no outcome yet."""
        self.stragglers |= dict.fromkeys(remote, start)
        for outcome in outcomes:
            self.stragglers.pop(outcome.index, None)

    def hold_set(self, recovered_set: RecoveredSet) -> None:
        """Add one set to the recovered sets and to the memory."""
        api, recovered = self.apis[recovered_set.api_index], recovered_set.recovered
        self.recovered.append(recovered_set)
        keys = [
            class_key(api, recovered_set.api_index, label, self._sized)
            for label in recovered.labels.tolist()
        ]
        self.memory.add(recovered_set.images, keys)
        self.shortfalls.budget_ended |= not recovered.complete

    def _keep_set(self, recovered_set: RecoveredSet) -> None:
        """Hold one set, and add it to the history."""
        self.hold_set(recovered_set)
        api, recovered = self.apis[recovered_set.api_index], recovered_set.recovered
        _log.info(
            "%s: kept the %s set of %s images",
            api.name,
            recovered_set.part,
            len(recovered_set.images),
        )
        self.record(
            "recovery",
            api=api.name,
            set=recovered_set.part,
            sets=len(self.recovered),
            loss=recovered.losses.mean().item(),
            accuracy=recovered_set.matched.float().mean().item(),
            complete=recovered.complete,
        )

    def _meta_model(self, module: nn.Module) -> MetaModel:
        return MetaModel(
            module, adapt_steps=self.config.adapt_steps, adapt_learning_rate=self.config.adapt_lr
        )

    def _ledger_rows(self) -> list[LedgerRow]:
        """Return what each API was asked for this run, by processes that were killed as well."""
        if self.ledger is not None:
            others = self.others_rows
            return [
                sum_of(row, others[row.number]) if row.number in others else row
                for row in self.ledger.rows()
            ]
        return [
            row_of(before.number, api, before)
            for api, before in zip(self.apis, self._ledger_before, strict=True)
        ]
