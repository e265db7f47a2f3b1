"""The three stages of a run and the state they share: recovery, bi-level distillation, task memory replay."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bidfmkd_fast.black_box import APISpec, BlackBox
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.meta import (
    DistillationTask,
    MetaModel,
    TaskMemory,
    adapt_to_api,
    outer_distillation_step,
    outer_replay_step,
)
from bidfmkd_fast.meta.model import forward
from bidfmkd_fast.recovery.objective import Student
from bidfmkd_fast.recovery.recover import recover
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.checkpoint import RunFolder
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.run import RecoveredSet, Run

_REPLAY_RECORD_STEPS = 25  # replay steps whose mean makes one record of the history


class Stages:
    """One run: `module` is trained in place, records and recovered sets go to `folder` as they are made."""

    def __init__(
        self,
        apis: Sequence[BlackBox],
        module: nn.Module,
        generator: nn.Module | None,
        config: TrainConfig,
        device: torch.device,
        folder: RunFolder | None,
        progress: bool,
    ) -> None:
        self.apis, self.module, self.generator, self.config, self.device = apis, module, generator, config, device
        self.folder, self.progress = folder, progress
        self.initial_module = copy.deepcopy(module)
        # Two optimisers: the two losses differ in scale, so Adam's moments of one would mis-scale steps on the other.
        self.distillation_optimizer = torch.optim.Adam(module.parameters(), lr=config.distillation.outer_lr)
        self.replay_optimizer = torch.optim.Adam(module.parameters(), lr=config.replay.outer_lr)
        self.memory = TaskMemory(task_shape([api.spec for api in apis], config))
        self.recovered: list[RecoveredSet] = []
        self.history: list[dict[str, Any]] = []
        self.seconds = {"recovery": 0.0, "distillation": 0.0, "replay": 0.0}
        self.spent_before = [(api.ledger.queries, api.ledger.requests) for api in apis]
        self.outer_step = self.replay_step = 0
        self.complete = True

    def run(self) -> Run:
        """All rounds: recover a group of APIs, distil them in one outer step, replay; then the final replay."""
        size, apis = self.config.meta_batch_size, list(enumerate(self.apis))
        with tqdm(total=len(apis), desc="recover", unit="API", disable=None if self.progress else True) as bar:
            for first in range(0, len(apis), size):
                tasks = []
                for index, api in apis[first : first + size]:
                    tasks.append(self._recover_api(index, api))
                    bar.update()
                self._distil([task for task in tasks if task is not None])
                if first + size < len(apis):
                    self._replay(self.config.replay.steps_per_round, self.config.replay.patience)
        self._replay(self.config.replay.final_steps)
        queries, requests = self._spent()
        return Run(
            meta_model=self._meta_model(self.module),
            initial_model=self._meta_model(self.initial_module),
            memory=self.memory,
            recovered=self.recovered,
            history=self.history,
            queries=queries,
            requests=requests,
            seconds=self.seconds,
            complete=self.complete,
            config=self.config,
        )

    def _recover_api(self, index: int, api: BlackBox) -> DistillationTask | None:
        """Both sets of one API; None when its budget does not reach the second one."""
        support = self._recover_set(index, api, "support", None)
        if support is None:
            return None
        images, scores = support.images, support.recovered.scores
        bounded = self.config.boundary_recovery and self.outer_step >= self.config.boundary_start
        student = self._student(api, images, scores) if bounded else None
        query = self._recover_set(index, api, "query", student)
        if query is None:
            return None
        return DistillationTask(images, scores, query.images, query.recovered.scores, api.spec.scores_kind)

    def _meta_model(self, module: nn.Module) -> MetaModel:
        return MetaModel(module, adapt_steps=self.config.adapt_steps, adapt_learning_rate=self.config.adapt_lr)

    def _recover_set(self, index: int, api: BlackBox, part: str, student: Student | None) -> RecoveredSet | None:
        # Seeded: a task model with dropout draws from the global generator.
        with self._timed("recovery"), seeded(self.config.seed, "task model", index, part):
            try:
                recovered = recover(
                    api,
                    self.config.n_per_class,
                    student,
                    self.config.recovery,
                    generator=self.generator,
                    seed=derive_seed(self.config.seed, "api", index, part),
                    device=self.device,
                    paper_compat=self.config.paper_compat,
                )
            except BudgetExhausted:
                if not self.recovered and index + 1 == len(self.apis):
                    raise  # nothing was asked of any API
                self.complete = False
                return None
        self.complete &= recovered.complete
        spec = api.spec
        images = spec.to_unit(recovered.images)
        one = RecoveredSet(index, api.name, spec.names, part, images, recovered)
        self.recovered.append(one)
        self.memory.add(images, [_class_key(api, index, label) for label in recovered.labels.tolist()])
        self._record(
            "recovery",
            api=api.name,
            set=part,
            loss=recovered.losses.mean().item(),
            accuracy=one.matched.float().mean().item(),
            complete=recovered.complete,
        )
        if self.folder is not None:
            self.folder.save_recovered(one)
        return one

    def _student(self, api: BlackBox, images: Tensor, scores: Tensor) -> Student:
        """The task model theta_A as a function from images in the API's input range to logits."""
        with self._timed("distillation"), seeded(self.config.seed, "student", self.outer_step):
            adapted = adapt_to_api(
                self.module,
                dict(self.module.named_parameters()),
                images,
                scores,
                steps=self.config.distillation.inner_steps,
                learning_rate=self.config.distillation.inner_lr,
                first_order=True,  # only its values are used
                scores_kind=api.spec.scores_kind,
                paper_compat=self.config.paper_compat,
            )
        parameters = {name: value.detach() for name, value in adapted.items()}
        return lambda points: forward(self.module, parameters, api.spec.to_unit(points))

    def _distil(self, tasks: list[DistillationTask]) -> None:
        if not tasks or not self.config.bilevel_distillation:
            return
        distillation = self.config.distillation
        with self._timed("distillation"), seeded(self.config.seed, "distillation", self.outer_step):
            metrics = outer_distillation_step(
                self.module,
                self.distillation_optimizer,
                tasks,
                steps=distillation.inner_steps,
                learning_rate=distillation.inner_lr,
                first_order=distillation.first_order,
                paper_compat=self.config.paper_compat,
            )
        self.outer_step += 1
        self._record("distillation", loss=metrics["loss"], accuracy=metrics["agreement"])

    def _replay(self, steps: int, patience: int = 0) -> None:
        """`steps` outer steps on tasks from the memory; with `patience`, fewer once accuracy has stopped improving."""
        if not self.recovered or not self.config.task_replay:
            return
        best, best_step = -1.0, 0
        since_record: list[dict[str, float]] = []
        for step in tqdm(
            range(steps), desc="replay", unit="step", leave=False, disable=None if self.progress else True
        ):
            metrics = self._replay_once()
            since_record.append(metrics)
            if metrics["accuracy"] > best:
                best, best_step = metrics["accuracy"], step
            stop = step + 1 == steps or (patience > 0 and step - best_step >= patience)
            if stop or len(since_record) == _REPLAY_RECORD_STEPS:
                means = {key: sum(one[key] for one in since_record) / len(since_record) for key in metrics}
                self._record("replay", loss=means["loss"], accuracy=means["accuracy"])
                since_record = []
            if stop:
                break

    def _replay_once(self) -> dict[str, float]:
        replay, n_way = self.config.replay, self.apis[0].spec.n_classes
        with self._timed("replay"), seeded(self.config.seed, "replay", self.replay_step):
            # Fewer than planned when a budget ended after the support sets.
            n_query = min(replay.n_query, self._images_per_class(n_way) - replay.n_shot)
            first = self.replay_step * self.config.meta_batch_size
            episodes = [
                self.memory.sample_episode(
                    n_way, replay.n_shot, n_query, seed=derive_seed(self.config.seed, "replay"), index=first + i
                )
                for i in range(self.config.meta_batch_size)
            ]
            metrics = outer_replay_step(
                self.module,
                self.replay_optimizer,
                episodes,
                steps=replay.inner_steps,
                learning_rate=replay.inner_lr,
                first_order=replay.first_order,
            )
        self.replay_step += 1
        self.outer_step += 1
        return metrics

    def _images_per_class(self, n_way: int) -> int:
        """The most images per class that at least `n_way` classes of the memory hold."""
        return sorted((len(self.memory.images_of(key)) for key in self.memory.classes), reverse=True)[n_way - 1]

    def _spent(self) -> tuple[int, int]:
        now = [(api.ledger.queries, api.ledger.requests) for api in self.apis]
        queries = sum(q - before for (q, _), (before, _) in zip(now, self.spent_before, strict=True))
        requests = sum(r - before for (_, r), (_, before) in zip(now, self.spent_before, strict=True))
        return queries, requests

    def _record(self, stage: str, **values: Any) -> None:
        record = {"stage": stage, "step": self.outer_step, **values}
        record |= {"queries": self._spent()[0], "seconds": round(sum(self.seconds.values()), 3)}
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
    """(C, H, W) to which tasks are brought; None where all APIs take images of one shape, and no other is wanted."""
    shapes = {spec.image_shape for spec in specs}
    if len(shapes) == 1 and not config.meta_model_side:
        return None
    side = config.meta_model_side or max(max(height, width) for _, height, width in shapes)
    return max(channels for channels, _, _ in shapes), side, side


def _class_key(api: BlackBox, index: int, label: int) -> tuple[str, str]:
    """Whose classes have no names shares no class with any other API."""
    spec = api.spec
    return spec.data_set, spec.class_names[label] if spec.class_names else f"API {index} class {label}"
