"""Define the estimator `BiDfMKD`, which checks the arguments of a run and runs it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox, Budget
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.meta.inner_loop import forward
from bidfmkd_fast.runtime.allocator import keep_freed_memory
from bidfmkd_fast.runtime.machine import usable_device
from bidfmkd_fast.runtime.ranks import current
from bidfmkd_fast.secrets import scrub
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.survey.backbone import check_backbone
from bidfmkd_fast.survey.pictures import check_drawable
from bidfmkd_fast.training.budgets import shared_budgets, under_budget
from bidfmkd_fast.training.callbacks import Callback, RunInfo, check_callbacks, started
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.counted_queries import counted_queries
from bidfmkd_fast.training.default_model import initial_module, task_shape
from bidfmkd_fast.training.loop import run_loop
from bidfmkd_fast.training.run import Run
from bidfmkd_fast.training.run_checkpoint import checkpointed, restore
from bidfmkd_fast.training.run_cost import check_learnable, keep_plan, run_cost
from bidfmkd_fast.training.run_folder import RunFolder
from bidfmkd_fast.training.run_memory import check_run_memory
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.shared_folder import follow
from bidfmkd_fast.training.spending import CONTROL


class BiDfMKD:
    """Black-box data-free meta-learning by bi-level distillation (Hu et al., ICML 2023, arXiv
    2305.18413).

    Args:
        apis: the black boxes; they may differ in their number of classes.
        meta_model: any module from images `[N, C, H, W]` (unit range) to logits, one per class
            of the API with the most. A copy of it is trained, in the mode in which it is given.
            None for a Conv4 that always uses batch statistics: a plain Conv4 if all APIs take
            images of one shape, else one that takes any size (`AnySizeConv4`).
        generator: the image generator, as for `recover`; None for the built-in generator.
        config: the settings.
        device: where the generators and the meta-model live.
        budget: a cap on what all APIs together may cost. `fit` puts it on every API that has no
            budget of its own. When it ends, recovery stops, and the sets recovered so far are
            distilled and replayed.

    Attributes:
        label: the name of the run on its progress bars.

    Raises:
        InputError: bad arguments, an empty pool, a meta-model that does not take the images of the
            APIs, a run that the memory cannot hold, an API that gives labels only where
            `survey.n_images` is 0.
    """

    label = "run"

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
        self.generator, self.budget = generator, budget
        self.device = usable_device("BiDfMKD", device)
        if not isinstance(self.config, TrainConfig):
            raise InputTypeError(
                f"BiDfMKD: config must be a TrainConfig; got {type(config).__name__}"
            )
        if budget is not None and not isinstance(budget, Budget):
            raise InputTypeError(
                f"BiDfMKD: budget must be a Budget or None; got {type(budget).__name__}"
            )
        _check_apis(self.apis, budget)
        check_learnable("BiDfMKD", self.apis, self.config)
        own = generator is not None
        check_run_memory("BiDfMKD", self.apis, self.config, self.device, own_generator=own)
        if meta_model is None:
            module = initial_module([api.spec for api in self.apis], self.config)
        elif isinstance(meta_model, nn.Module):
            module = copy.deepcopy(meta_model)
        else:
            raise InputTypeError(
                f"BiDfMKD: meta_model must be a torch.nn.Module; got {type(meta_model).__name__}"
            )
        self._module = module.to(self.device)
        self._check_meta_model()
        _check_data_sets(self.apis)

    def __repr__(self) -> str:
        cap = "" if self.budget is None else f", {self.budget!r}"
        module = type(self._module).__name__
        return f"BiDfMKD({len(self.apis)} APIs, {module}, seed={self.config.seed}{cap})"

    def planned_queries(self) -> int:
        """Count the queries that `fit` asks of all APIs together if no budget ends it."""
        return sum(run_cost(api, self.config).queries for api in self.apis)

    def fit(
        self,
        run_dir: str | Path | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> Run:
        """Run the whole algorithm; with `run_dir`, write the run to that folder as it proceeds.

        Every call starts anew, unless `run_dir` holds a run of the same settings that was cut off.
        Then the sets recovered so far are not asked for again, sets under way continue where they
        stopped, training continues from its last checkpoint (every 30 seconds, and when a signal
        ends the run), and what was spent counts. With equal APIs the same seed gives the same run,
        bit for bit (on a CPU with the same number of threads). With `progress`, a terminal or a
        notebook shows bars; elsewhere stderr gets one line a minute.

        Several services are recovered at once. A service that does not answer, or whose answers are
        no scores, is skipped with a warning and asked again at the end. If it fails then too, the
        report names it.

        The `callbacks` are called when the run starts, for every new record of `metrics.jsonl`, and
        when it ends; see `Callback`. What they raise ends the run, which can be continued.

        Raises:
            InputError: `run_dir` holds a finished run, a run of other settings or of another pool,
                or a run that is under way; or it cannot be written to.
            BudgetExhausted: no budget pays for a single recovery step; nothing has been asked then.
            BadAnswer: a local API answered something that is no set of scores, or every service
                did; what was recovered before is in `run_dir`.
            APIUnavailable: no service answers.

        Warns:
            ServiceWarning: a service was skipped or left out.
            UserWarning: the settings have neither a survey nor recovery steps, as a control has.
        """
        learns = self.config.survey.n_images or self.config.recovery.steps
        if not learns and self.label != CONTROL and current().first:
            warnings.warn(
                "BiDfMKD: survey.n_images and recovery.steps are both 0, so this is a no-recovery "
                "control, which learns from images of untrained generators; raise either",
                stacklevel=2,
            )
        callbacks = check_callbacks("BiDfMKD.fit", callbacks) if current().first else []
        names = tuple(scrub(api.name) for api in self.apis)
        folder = None if run_dir is None else Path(run_dir)
        info = RunInfo(self.config, names, self.planned_queries(), folder)
        with (
            self._begun(run_dir, progress, callbacks=callbacks) as run,
            started(callbacks, info, run),
            checkpointed(run),
        ):
            return run_loop(run)

    @contextmanager
    def _begun(
        self,
        run_dir: str | Path | None,
        progress: bool,
        *,
        again: bool = False,
        lock: FolderLock | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Iterator[RunState]:
        """Give the state of a run at its start, with its budgets set and its folder locked.

        With `again`, `run_dir` may hold a finished run; `lock` is the folder's lock if the caller
        holds it. If the block fails before anything was recovered, the folder is removed, so that
        it serves the next attempt.
        """
        keep_freed_memory()
        ranks, folder = current(), None
        if run_dir is not None:
            folder = ranks.first_alone(
                lambda: RunFolder.create(run_dir, self.config, again=again, lock=lock)
            )
            if folder is None:
                folder = follow(run_dir, self.config)
        elif ranks.size > 1:
            raise InputError(
                f"BiDfMKD.fit: {ranks.size} processes share what they recover through the folder "
                "of the run; give run_dir, on a disk that all of them see"
            )
        try:
            with ExitStack() as stack:
                stack.enter_context(under_budget(self.apis, self.budget))
                stack.enter_context(shared_budgets(self.apis, ranks))
                ledger = None
                if folder is not None:
                    ledger = stack.enter_context(counted_queries(folder, self.apis, ranks))
                    if ranks.first and not folder.complete:
                        keep_plan(folder.path, self.apis, self.config)
                run = RunState(
                    self.apis,
                    copy.deepcopy(self._module),
                    self.generator,
                    self.config,
                    self.device,
                    folder,
                    ledger,
                    progress and ranks.first,
                    self.label,
                    callbacks,
                    ranks,
                )
                restore(run)
                yield run
        except Exception:
            if folder is not None and ranks.first:
                folder.withdraw()
            raise
        finally:
            if folder is not None:
                folder.close()

    def _check_meta_model(self) -> None:
        """Raise InputError unless the meta-model maps images of every API to logits."""
        n_classes = max(api.spec.n_classes for api in self.apis)
        specs = [api.spec for api in self.apis]
        if self.config.survey.n_images:
            for spec in specs:
                check_drawable(spec)
        _, height, width = task_shape(specs, self.config) or specs[0].image_shape
        if height != width and self.config.replay.rotations == 4:
            raise InputError(
                f"BiDfMKD: images of {height} x {width} cannot be turned by 90 degrees; set "
                "replay.rotations to 2 or 1"
            )
        shapes = {spec.image_shape for spec in specs} | {task_shape(specs, self.config) or ()}
        draws = torch.Generator()
        for shape in sorted(shapes - {()}):
            images = torch.rand(2, *shape, generator=draws.manual_seed(0)).to(self.device)
            try:
                with seeded(0, "meta_model", "check"), torch.no_grad():
                    logits = forward(self._module, dict(self._module.named_parameters()), images)
            except (RuntimeError, ValueError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise InputError(
                    f"BiDfMKD: meta_model fails on images {list(images.shape)}: {reason}"
                ) from error
            if not isinstance(logits, Tensor) or logits.shape != (2, n_classes):
                came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(
                    f"BiDfMKD: meta_model must map images {list(images.shape)} to logits "
                    f"[2, {n_classes}], the most classes of an API; got {came}"
                )
            if self.config.survey.n_images:
                check_backbone("BiDfMKD", self._module, images)


def _check_apis(apis: list[BlackBox], budget: Budget | None) -> None:
    """Raise InputError unless `apis` are different black boxes, each under one budget."""
    if not apis:
        raise InputError("BiDfMKD: apis is empty; give at least one black box")
    for api in apis:
        if not isinstance(api, BlackBox):
            raise InputTypeError(
                f"BiDfMKD: apis must be black boxes such as TorchBlackBox; got {type(api).__name__}"
            )
    if len({id(api) for api in apis}) < len(apis):
        raise InputError("BiDfMKD: apis holds the same black box twice; give each once")
    for api in apis:
        if budget is not None and api.budget is not None and api.budget is not budget:
            raise InputError(
                f"BiDfMKD: {api.name} has a budget of its own; give either that or budget=, not "
                "both"
            )


def _check_data_sets(apis: list[BlackBox]) -> None:
    """Raise InputError unless the images of a data set have one shape, as the memory holds them."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for api in apis:
        data_set, shape = api.spec.data_set, api.spec.image_shape
        if data_set and shapes.setdefault(data_set, shape) != shape:
            raise InputError(
                f"BiDfMKD: the APIs of the data set {data_set!r} must take images of one shape; "
                f"{api.name} takes {list(shape)}, another {list(shapes[data_set])}; name the data "
                "sets differently"
            )
