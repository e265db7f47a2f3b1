"""The loop: recover data from each API, distil it into the meta-model on two levels, replay it as tasks across APIs."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox, Budget
from bidfmkd_fast.errors import BudgetExhausted, InputError, InputTypeError
from bidfmkd_fast.meta import DistillationTask, MetaModel, TaskMemory, adapt_to_api
from bidfmkd_fast.meta import outer_distillation_step, outer_replay_step
from bidfmkd_fast.meta.model import forward
from bidfmkd_fast.models import build_model
from bidfmkd_fast.recovery import Recovered, recover
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.checkpoint import RunFolder
from bidfmkd_fast.training.config import TrainConfig

_REPLAY_RECORD_STEPS = 25  # replay steps whose mean makes one record of the history


@dataclass(frozen=True, eq=False)
class RecoveredSet:
    """One set recovered from an API: its number in the pool, "support" or "query", and the images, in unit range.

    `images` float32 `[N, C, H, W]` in [0, 1]; `recovered` holds the wanted labels, the API's scores and the history.
    """

    api_index: int
    api_name: str
    class_names: tuple[str, ...]
    part: str
    images: Tensor
    recovered: Recovered


@dataclass(frozen=True, eq=False)
class Run:
    """What `BiDfMKD.fit` gives.

    Attributes:
        meta_model: the meta-learned model; `.adapt(images, labels)` gives a classifier.
        initial_model: the same model before anything was learned.
        memory: every recovered image by (data set, class).
        recovered: the recovered sets in order.
        history: the records that `metrics.jsonl` holds, one per recovered set, distillation step and 25 replay steps.
        queries, requests: what the run asked of all APIs together.
        seconds: wall time per stage: "recovery", "distillation", "replay".
        complete: False when a budget ended before every API was recovered in full.
        config: the settings.
    """

    meta_model: MetaModel
    initial_model: MetaModel
    memory: TaskMemory
    recovered: list[RecoveredSet]
    history: list[dict[str, Any]]
    queries: int
    requests: int
    seconds: dict[str, float]
    complete: bool
    config: TrainConfig


class BiDfMKD:
    """Black-box data-free meta-learning by bi-level distillation (Hu et al., ICML 2023, arXiv 2305.18413).

    Args:
        apis: the black boxes; all with the same number of classes and the same image shape.
        meta_model: any module from images `[N, C, H, W]` (unit range) to logits `[N, n_classes]`; a copy of it is
            trained, in the mode it is in. None for a Conv4 that always uses batch statistics.
        generator: as for `recover`; None for the built-in one.
        config: the settings.
        device: where generator and meta-model live.
        budget: a cap on what all APIs together may cost, put on those that have none while `fit` runs. When it ends,
            recovery stops, and what there is is distilled and replayed.

    Raises:
        InputError: bad arguments, an empty pool, APIs that differ in classes or shape, a meta-model of another shape.
    """

    def __init__(
        self,
        apis: Sequence[BlackBox],
        meta_model: nn.Module | None = None,
        generator: nn.Module | None = None,
        config: TrainConfig | None = None,
        device: torch.device | str = "cpu",
        budget: Budget | None = None,
    ) -> None:
        self.apis = list(apis)
        self.config = TrainConfig() if config is None else config
        self.generator, self.device, self.budget = generator, torch.device(device), budget
        if not isinstance(self.config, TrainConfig):
            raise InputTypeError(f"BiDfMKD: config must be a TrainConfig; got {type(config).__name__}")
        if budget is not None and not isinstance(budget, Budget):
            raise InputTypeError(f"BiDfMKD: budget must be a Budget or None; got {type(budget).__name__}")
        _check_apis(self.apis, budget)
        spec = self.apis[0].spec
        if meta_model is None:
            with seeded(self.config.seed, "meta_model"):
                module = build_model(
                    "conv4",
                    in_channels=spec.image_shape[0],
                    n_classes=spec.n_classes,
                    image_size=spec.image_shape[1:],
                    width=self.config.meta_model_width,
                    batch_statistics=True,
                )
        elif isinstance(meta_model, nn.Module):
            module = copy.deepcopy(meta_model)
        else:
            raise InputTypeError(f"BiDfMKD: meta_model must be a torch.nn.Module; got {type(meta_model).__name__}")
        self._module = module.to(self.device)
        self._check_meta_model()

    def planned_queries(self) -> int:
        """How many queries `fit` asks of all APIs together if no budget ends it."""
        recovery = self.config.recovery
        per_image = recovery.steps * (1 + recovery.num_directions) if recovery.steps else 1
        return 2 * per_image * self.config.n_per_class * sum(api.spec.n_classes for api in self.apis)

    def fit(self, run_dir: str | Path | None = None, progress: bool = True) -> Run:
        """Run the whole loop, and write it to `run_dir` as it goes if one is given.

        Every call starts anew; with equal APIs the same seed gives the same run, bit for bit (on a CPU with the same
        number of threads). Progress bars show on a terminal only.

        Raises:
            InputError: `run_dir` holds a run already.
            BudgetExhausted: no budget pays a single recovery step; nothing has been asked then.
            BadAnswer: an API answered something that is no set of scores; what was recovered before is in `run_dir`.
        """
        folder = None if run_dir is None else RunFolder.create(run_dir, self.config)
        with _under_budget(self.apis, self.budget):
            fitting = _Fit(self, copy.deepcopy(self._module), folder, progress)
            run = fitting.run()
        if folder is not None:
            folder.finish(run)
        return run

    def initial_model(self) -> MetaModel:
        """The meta-model as it is before any learning."""
        return self._as_meta_model(copy.deepcopy(self._module))

    def _as_meta_model(self, module: nn.Module) -> MetaModel:
        return MetaModel(module, adapt_steps=self.config.adapt_steps, adapt_learning_rate=self.config.adapt_lr)

    def _check_meta_model(self) -> None:
        spec = self.apis[0].spec
        images = torch.rand(2, *spec.image_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        try:
            with seeded(0, "meta_model", "check"), torch.no_grad():
                logits = forward(self._module, dict(self._module.named_parameters()), images)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"BiDfMKD: meta_model fails on images {list(images.shape)}: {reason}") from error
        if not isinstance(logits, Tensor) or logits.shape != (2, spec.n_classes):
            came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"BiDfMKD: meta_model must map images {list(images.shape)} to logits [2, {spec.n_classes}], one per class "
                f"of an API; got {came}"
            )


class _Fit:
    """The state of one run."""

    def __init__(self, owner: BiDfMKD, module: nn.Module, folder: RunFolder | None, progress: bool) -> None:
        self.owner, self.config, self.module = owner, owner.config, module
        self.folder, self.progress = folder, progress
        # Two optimisers: the two losses differ in scale, so Adam's moments of one would mis-scale steps on the other.
        self.distillation_optimizer = torch.optim.Adam(module.parameters(), lr=self.config.distillation.outer_lr)
        self.replay_optimizer = torch.optim.Adam(module.parameters(), lr=self.config.replay.outer_lr)
        self.memory = TaskMemory()
        self.recovered: list[RecoveredSet] = []
        self.history: list[dict[str, Any]] = []
        self.seconds = {"recovery": 0.0, "distillation": 0.0, "replay": 0.0}
        self.spent_before = [(api.ledger.queries, api.ledger.requests) for api in owner.apis]
        self.outer_step = self.replay_step = 0
        self.complete = True

    def run(self) -> Run:
        size, apis = self.config.meta_batch_size, list(enumerate(self.owner.apis))
        for first in range(0, len(apis), size):
            tasks = [self._recover_api(index, api) for index, api in apis[first : first + size]]
            self._distil([task for task in tasks if task is not None])
            if first + size < len(apis):
                self._replay(self.config.replay.steps_per_round, self.config.replay.patience)
        self._replay(self.config.replay.final_steps)
        queries, requests = self._spent()
        return Run(
            meta_model=self.owner._as_meta_model(self.module),
            initial_model=self.owner.initial_model(),
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
        student = self._student(api, images, scores) if self.outer_step >= self.config.boundary_start else None
        query = self._recover_set(index, api, "query", student)
        if query is None:
            return None
        return DistillationTask(images, scores, query.images, query.recovered.scores, api.spec.scores_kind)

    def _recover_set(self, index: int, api: BlackBox, part: str, student: Any) -> RecoveredSet | None:
        with self._timed("recovery"):
            try:
                recovered = recover(
                    api,
                    self.config.n_per_class,
                    student,
                    self.config.recovery,
                    generator=self.owner.generator,
                    seed=derive_seed(self.config.seed, "api", index, part),
                    device=self.owner.device,
                    progress=self.progress,
                )
            except BudgetExhausted:
                if not self.recovered and index + 1 == len(self.owner.apis):
                    raise
                self.complete = False
                return None
        self.complete &= recovered.complete
        spec = api.spec
        images = spec.to_unit(recovered.images)
        one = RecoveredSet(index, api.name, spec.names, part, images, recovered)
        self.recovered.append(one)
        self.memory.add(images, [_class_key(api, index, label) for label in recovered.labels.tolist()])
        matched = (recovered.scores.argmax(1) == recovered.labels).float().mean().item()
        self._record(
            "recovery", api=api.name, set=part, loss=recovered.losses.mean().item(), accuracy=matched,
            complete=recovered.complete,
        )  # fmt: skip
        if self.folder is not None:
            self.folder.save_recovered(one)
        return one

    def _student(self, api: BlackBox, images: Tensor, scores: Tensor) -> Any:
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
            )
        parameters = {name: value.detach() for name, value in adapted.items()}
        return lambda points: forward(self.module, parameters, api.spec.to_unit(points))

    def _distil(self, tasks: list[DistillationTask]) -> None:
        if not tasks:
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
            )
        self.outer_step += 1
        self._record("distillation", loss=metrics["loss"], accuracy=metrics["agreement"])

    def _replay(self, steps: int, patience: int = 0) -> None:
        """`steps` outer steps on tasks from the memory; with `patience`, fewer once accuracy has stopped improving."""
        from tqdm import tqdm

        if not self.recovered:
            return
        best, best_step, since_record = -1.0, 0, []
        for step in tqdm(range(steps), desc="replay", disable=None if self.progress else True):
            metrics = self._replay_once()
            since_record.append(metrics)
            best, best_step = max((best, best_step), (metrics["accuracy"], step), key=lambda pair: pair[0])
            stop = step + 1 == steps or (patience and step - best_step >= patience)
            if stop or len(since_record) == _REPLAY_RECORD_STEPS:
                means = {key: sum(one[key] for one in since_record) / len(since_record) for key in metrics}
                self._record("replay", loss=means["loss"], accuracy=means["accuracy"])
                since_record = []
            if stop:
                break

    def _replay_once(self) -> dict[str, float]:
        replay, n_way = self.config.replay, self.owner.apis[0].spec.n_classes
        with self._timed("replay"), seeded(self.config.seed, "replay", self.replay_step):
            n_query = min(replay.n_query, self._images_in_every_task(n_way) - replay.n_shot)
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

    def _images_in_every_task(self, n_way: int) -> int:
        """Images per class that at least `n_way` classes hold: fewer than planned if a budget ended after a support set."""
        return sorted((len(self.memory.images_of(key)) for key in self.memory.classes), reverse=True)[n_way - 1]

    def _spent(self) -> tuple[int, int]:
        now = [(api.ledger.queries, api.ledger.requests) for api in self.owner.apis]
        queries = sum(q - before for (q, _), (before, _) in zip(now, self.spent_before))
        requests = sum(r - before for (_, r), (_, before) in zip(now, self.spent_before))
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


def _class_key(api: BlackBox, index: int, label: int) -> tuple[str, str]:
    """Whose classes have no names shares no class with any other API."""
    spec = api.spec
    return spec.data_set, spec.class_names[label] if spec.class_names else f"API {index} class {label}"


def _check_apis(apis: list[BlackBox], budget: Budget | None) -> None:
    if not apis:
        raise InputError("BiDfMKD: apis is empty; give at least one black box")
    for api in apis:
        if not isinstance(api, BlackBox):
            raise InputTypeError(f"BiDfMKD: apis must be black boxes such as TorchBlackBox; got {type(api).__name__}")
    if len({id(api) for api in apis}) < len(apis):
        raise InputError("BiDfMKD: apis holds the same black box twice; give each once")
    first = apis[0].spec
    for api in apis:
        for what in ("n_classes", "image_shape"):
            if getattr(api.spec, what) != getattr(first, what):
                raise InputError(
                    f"BiDfMKD: all APIs must have the same {what}; {first.name} has {getattr(first, what)} and "
                    f"{api.name} has {getattr(api.spec, what)}; run them as separate pools"
                )
        if budget is not None and api.budget is not None and api.budget is not budget:
            raise InputError(f"BiDfMKD: {api.name} has a budget of its own; give either that or budget=, not both")


@contextmanager
def _under_budget(apis: list[BlackBox], budget: Budget | None) -> Iterator[None]:
    before = [api.budget for api in apis]
    try:
        for api in apis:
            api.budget = api.budget if budget is None else budget
        yield
    finally:
        for api, its in zip(apis, before):
            api.budget = its
