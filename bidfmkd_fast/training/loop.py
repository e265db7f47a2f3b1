"""The three stages of a run and the state they share: recovery, bi-level distillation, task memory replay."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec, BlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerRow, row_of
from bidfmkd_fast.errors import BudgetExhausted, ServiceWarning
from bidfmkd_fast.meta import (
    DistillationTask,
    MetaModel,
    TaskMemory,
    outer_distillation_step,
    outer_replay_step,
)
from bidfmkd_fast.meta.replay_on_device import DeviceReplay
from bidfmkd_fast.meta.stacked import can_stack
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.plan import keep_plan, run_cost
from bidfmkd_fast.training.recoveries import Outcome, Recoveries
from bidfmkd_fast.training.run import RecoveredSet, Run
from bidfmkd_fast.training.run_folder import RunFolder

_log = logging.getLogger("bidfmkd_fast")  # the one whose filter removes secrets
_REPLAY_RECORD_STEPS = 25  # replay steps whose mean makes one record of the history


class Stages:
    """One run: `module` is trained in place, records and recovered sets go to `folder` as they are
    made.
    """

    def __init__(
        self,
        apis: Sequence[BlackBox],
        module: nn.Module,
        generator: nn.Module | None,
        config: TrainConfig,
        device: torch.device,
        folder: RunFolder | None,
        progress: bool,
        label: str = "run",
    ) -> None:
        self.apis, self.module, self.generator, self.config, self.device = (
            apis,
            module,
            generator,
            config,
            device,
        )
        self.folder, self.progress, self.label = folder, progress, label
        self.initial_module = copy.deepcopy(module)
        # Two optimisers: the two losses differ in scale, so Adam's moments of one would mis-scale
        # steps on the other.
        self.distillation_optimizer = torch.optim.Adam(
            module.parameters(), lr=config.distillation.outer_lr
        )
        on_gpu = device.type == "cuda"  # where replay steps are captured in a graph
        self.replay_optimizer = torch.optim.Adam(
            module.parameters(), lr=config.replay.outer_lr, capturable=on_gpu
        )
        self.memory = TaskMemory(task_shape([api.spec for api in apis], config))
        self.recovered: list[RecoveredSet] = []
        self.history: list[dict[str, Any]] = []
        self.seconds = {"recovery": 0.0, "distillation": 0.0, "replay": 0.0}
        self._before = [row_of(number, api) for number, api in enumerate(apis)]
        self.outer_step = self.replay_step = 0
        self.budget_ended = False
        self.skipped: dict[int, str] = {}
        self._failed_before: set[int] = set()
        self._last_error: Exception | None = None

    def run(self) -> Run:
        """All rounds: recover a group of APIs, distil them in one outer step, replay; then the
        final replay.

        Services that fail are left out at first and asked once more after all others.
        """
        if self.folder is not None:
            keep_plan(self.folder.path, self.apis, self.config)
        with (
            self._recovery_bar() as bar,
            Recoveries(
                self.apis, self.generator, self.config, self.device, self.folder, bar
            ) as recoveries,
        ):
            self._rounds(recoveries, list(range(len(self.apis))))
            self._round(recoveries.rest)
            failed, self.skipped = self.skipped, {}
            self._rounds(recoveries, sorted(failed))
            self._round(recoveries.rest)
        if not self.recovered and self._last_error is not None:
            raise self._last_error
        self._replay(self.config.replay.final_steps)
        return Run(
            meta_model=self._meta_model(self.module),
            initial_model=self._meta_model(self.initial_module),
            memory=self.memory,
            recovered=self.recovered,
            history=self.history,
            queries=sum(row.queries for row in self._ledger()),
            requests=sum(row.requests for row in self._ledger()),
            seconds=self.seconds,
            complete=not (self.budget_ended or self.skipped),
            config=self.config,
            budget_ended=self.budget_ended,
            skipped={self.apis[index].name: reason for index, reason in self.skipped.items()},
            ledger=self._ledger(),
        )

    def _recovery_bar(self) -> Bar:
        """The queries that are answered of those that the run asks if nothing goes wrong."""
        answered = sum(api.ledger.answered_queries for api in self.apis)
        return Bar(
            f"{self.label}: recover",
            sum(run_cost(api, self.config).queries for api in self.apis),
            "queries",
            self.progress,
            position=lambda: sum(api.ledger.answered_queries for api in self.apis) - answered,
        )

    def _rounds(self, recoveries: Recoveries, indices: list[int]) -> None:
        size = self.config.meta_batch_size
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            if self.recovered:
                self._replay(self.config.replay.steps_per_round, self.config.replay.patience)
            self._round(partial(recoveries.group, part, self.module, self.outer_step))

    def _round(self, recover: Callable[[], list[Outcome]]) -> None:
        """What `recover` gives is kept and distilled in one outer step."""
        with self._timed("recovery"):
            outcomes = recover()
        tasks = []
        for outcome in outcomes:
            # Of an API that is asked again, the set that it gave before is here already.
            before = {(one.api_index, one.part) for one in self.recovered}
            for one in outcome.sets:
                if (one.api_index, one.part) not in before:
                    self._keep(one)
            api = self.apis[outcome.index]
            tasks.append(outcome.task(api))
            if outcome.error is not None:
                self._fail(outcome.index, outcome.error)
        self._distil([task for task in tasks if task is not None])

    def _fail(self, index: int, error: Exception) -> None:
        self._last_error = error
        if isinstance(error, BudgetExhausted):
            self.budget_ended = True
            return
        name, reason = self.apis[index].name, " ".join(str(error).split())
        again = (
            "it is left out"
            if index in self._failed_before
            else "it is skipped and asked again at the end"
        )
        warnings.warn(f"{name}: {again}: {reason}", ServiceWarning, stacklevel=2)
        _log.info("%s: %s: %s", name, again, reason)
        self._failed_before.add(index)
        self.skipped[index] = reason

    def _meta_model(self, module: nn.Module) -> MetaModel:
        return MetaModel(
            module, adapt_steps=self.config.adapt_steps, adapt_learning_rate=self.config.adapt_lr
        )

    def _keep(self, one: RecoveredSet) -> None:
        api = self.apis[one.api_index]
        self.recovered.append(one)
        self.memory.add(
            one.images,
            [_class_key(api, one.api_index, label) for label in one.recovered.labels.tolist()],
        )
        self.budget_ended |= not one.recovered.complete
        _log.info("%s: %s set of %s images kept", api.name, one.part, len(one.images))
        self._record(
            "recovery",
            api=api.name,
            set=one.part,
            loss=one.recovered.losses.mean().item(),
            accuracy=one.matched.float().mean().item(),
            complete=one.recovered.complete,
        )

    def _distil(self, tasks: list[DistillationTask]) -> None:
        if not tasks or not self.config.bilevel_distillation:
            return
        distillation = self.config.distillation
        with self._timed("distillation"), seeded(self.config.seed, "distillation", self.outer_step):
            metrics = outer_distillation_step(
                self.module,
                self.distillation_optimizer,
                tasks,
                distillation.inner,
                paper_compat=self.config.paper_compat,
            )
        self.outer_step += 1
        self._record("distillation", loss=metrics["loss"], accuracy=metrics["agreement"])

    def _replay(self, steps: int, patience: int = 0) -> None:
        """`steps` outer steps on tasks from the memory; with `patience`, fewer once accuracy has
        stopped improving.
        """
        if not self.recovered or not self.config.task_replay:
            return
        take = self._replayer(min(_REPLAY_RECORD_STEPS, patience or _REPLAY_RECORD_STEPS))
        best, best_step = -1.0, 0
        since_record: list[dict[str, float]] = []
        with Bar(f"{self.label}: replay", steps, "steps", self.progress, keep=False) as bar:
            for step in bar.over(range(steps)):
                last = step + 1 == steps
                told = take(last)
                for at, metrics in enumerate(told, start=step + 1 - len(told)):
                    since_record.append(metrics)
                    if metrics["accuracy"] > best:
                        best, best_step = metrics["accuracy"], at
                stop = last or (bool(told) and patience > 0 and step - best_step >= patience)
                if since_record and (stop or len(since_record) >= _REPLAY_RECORD_STEPS):
                    means = {
                        key: sum(one[key] for one in since_record) / len(since_record)
                        for key in since_record[0]
                    }
                    self._record("replay", loss=means["loss"], accuracy=means["accuracy"])
                    bar.show(loss=means["loss"], accuracy=means["accuracy"])
                    since_record = []
                if stop:
                    break

    def _replayer(self, tell_every: int) -> Callable[[bool], list[dict[str, float]]]:
        """Takes one replay step, told whether it is the last one, and tells the metrics of the
        steps not told yet.

        On a GPU it tells them every `tell_every` steps, so that the host need not wait for each.
        """
        n_way = self.apis[0].spec.n_classes
        if self.device.type != "cuda" or not can_stack(self.module, n_way):
            return lambda last: [self._replay_once()]
        n_tasks, replay = self.config.meta_batch_size, self.config.replay
        n_query = min(replay.n_query, self._images_per_class(n_way) - replay.n_shot)
        on_device = DeviceReplay(
            self.module,
            self.replay_optimizer,
            self.memory,
            (n_way, replay.n_shot, n_query),
            n_tasks,
            replay.inner,
            rotations=replay.rotations,
        )

        def take(last: bool) -> list[dict[str, float]]:
            with self._timed("replay"):
                on_device.step(derive_seed(self.config.seed, "replay"), self.replay_step * n_tasks)
                self.replay_step += 1
                self.outer_step += 1
                return on_device.records() if last or on_device.untold == tell_every else []

        return take

    def _replay_once(self) -> dict[str, float]:
        replay, n_way = self.config.replay, self.apis[0].spec.n_classes
        with self._timed("replay"), seeded(self.config.seed, "replay", self.replay_step):
            # Fewer than planned when a budget ended after the support sets.
            n_query = min(replay.n_query, self._images_per_class(n_way) - replay.n_shot)
            first = self.replay_step * self.config.meta_batch_size
            episodes = [
                self.memory.sample_episode(
                    n_way,
                    replay.n_shot,
                    n_query,
                    seed=derive_seed(self.config.seed, "replay"),
                    index=first + i,
                    rotations=replay.rotations,
                )
                for i in range(self.config.meta_batch_size)
            ]
            metrics = outer_replay_step(
                self.module,
                self.replay_optimizer,
                episodes,
                replay.inner,
            )
        self.replay_step += 1
        self.outer_step += 1
        return metrics

    def _images_per_class(self, n_way: int) -> int:
        """The most images per class that at least `n_way` classes of the memory hold."""
        return sorted(
            (len(self.memory.images_of(key)) for key in self.memory.classes), reverse=True
        )[n_way - 1]

    def _ledger(self) -> list[LedgerRow]:
        """What each API was asked for this run, before a kill included."""
        if self.folder is not None:
            return self.folder.ledger.rows()
        return [
            row_of(row.number, api, row) for api, row in zip(self.apis, self._before, strict=True)
        ]

    def _record(self, stage: str, **values: Any) -> None:
        record = {"stage": stage, "step": self.outer_step, **values}
        record |= {
            "queries": sum(row.queries for row in self._ledger()),
            "seconds": round(sum(self.seconds.values()), 3),
        }
        self.history.append(record)
        if self.folder is not None:
            self.folder.append_metrics(record)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


def task_shape(specs: Sequence[APISpec], config: TrainConfig) -> tuple[int, int, int] | None:
    """(C, H, W) to which tasks are brought; None where all APIs take images of one shape, and no
    other is wanted.
    """
    shapes = {spec.image_shape for spec in specs}
    if len(shapes) == 1 and not config.meta_model_side:
        return None
    side = config.meta_model_side or max(max(height, width) for _, height, width in shapes)
    return max(channels for channels, _, _ in shapes), side, side


def _class_key(api: BlackBox, index: int, label: int) -> tuple[str, str]:
    """Whose classes have no names shares no class with any other API."""
    spec = api.spec
    return spec.data_set, spec.class_names[
        label
    ] if spec.class_names else f"API {index} class {label}"
