"""The loop: data recovered from each API, distilled on two levels into the meta-model, replayed as tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import BudgetExhausted, InputError, InputTypeError
from bidfmkd_fast.folder_lock import FolderLock
from bidfmkd_fast.meta.model import forward
from bidfmkd_fast.models import build_model
from bidfmkd_fast.ops.workspace import keep_freed_memory
from bidfmkd_fast.recovery.cost import first_step_cost
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.training.checkpoint import CONFIG, RunFolder
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.finished_run import finished_run
from bidfmkd_fast.training.plan import as_known, run_cost
from bidfmkd_fast.training.run import Run
from bidfmkd_fast.training.stages import Stages, task_shape


class BiDfMKD:
    """Black-box data-free meta-learning by bi-level distillation (Hu et al., ICML 2023, arXiv 2305.18413).

    Args:
        apis: the black boxes; all with the same number of classes.
        meta_model: any module from images `[N, C, H, W]` (unit range) to logits `[N, n_classes]`; a copy of it is
            trained, in the mode it is in. None for a Conv4 that always uses batch statistics: a plain one where all
            APIs take images of one shape, one that takes any size where they differ (`AnySizeConv4`).
        generator: as for `recover`; None for the built-in one.
        config: the settings.
        device: where generator and meta-model live.
        budget: a cap on what all APIs together may cost, put on those that have none while `fit` runs. When it ends,
            recovery stops, and what there is is distilled and replayed.

    Raises:
        InputError: bad arguments, an empty pool, APIs that differ in their number of classes, a meta-model that does
            not take their images.
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
        self.generator, self.device, self.budget = generator, _usable_device(device), budget
        if not isinstance(self.config, TrainConfig):
            raise InputTypeError(f"BiDfMKD: config must be a TrainConfig; got {type(config).__name__}")
        if budget is not None and not isinstance(budget, Budget):
            raise InputTypeError(f"BiDfMKD: budget must be a Budget or None; got {type(budget).__name__}")
        _check_apis(self.apis, budget)
        if meta_model is None:
            module = initial_module([api.spec for api in self.apis], self.config)
        elif isinstance(meta_model, nn.Module):
            module = copy.deepcopy(meta_model)
        else:
            raise InputTypeError(f"BiDfMKD: meta_model must be a torch.nn.Module; got {type(meta_model).__name__}")
        self._module = module.to(self.device)
        self._check_meta_model()

    def __repr__(self) -> str:
        cap = "" if self.budget is None else f", {self.budget!r}"
        return f"BiDfMKD({len(self.apis)} APIs, {type(self._module).__name__}, seed={self.config.seed}{cap})"

    def planned_queries(self) -> int:
        """How many queries `fit` asks of all APIs together if no budget ends it."""
        return sum(run_cost(api, self.config).queries for api in self.apis)

    def fit(self, run_dir: str | Path | None = None, progress: bool = True) -> Run:
        """Run the whole loop, and write it to `run_dir` as it goes if one is given.

        Every call starts anew, but for a `run_dir` that holds a run of the same settings that was cut off: what that
        recovered is not asked for again, sets under way go on where they were, and what it spent counts. With equal
        APIs the same seed gives the same run, bit for bit (on a CPU with the same number of threads). With `progress`,
        a terminal or a notebook shows bars; elsewhere stderr gets one line a minute.

        Services are recovered several at once. One that does not answer, or answers no scores, is skipped with a
        warning, asked again at the end, and named in the report where that fails too.

        Raises:
            InputError: `run_dir` holds a finished run, one of other settings or another pool, or one that is under way;
                or it cannot be written to.
            BudgetExhausted: no budget pays a single recovery step; nothing has been asked then.
            BadAnswer: a local API answered something that is no set of scores, or every service did; what was recovered
                before is in `run_dir`.
            APIUnavailable: no service answers.

        Warns:
            ServiceWarning: a service was skipped or left out.
        """
        return self._fit(run_dir, progress)

    def _fit(
        self,
        run_dir: str | Path | None,
        progress: bool,
        again: bool = False,
        lock: FolderLock | None = None,
        label: str = "run",
    ) -> Run:
        """`fit`; with `again` a finished and complete run in `run_dir` is read, not made again."""
        keep_freed_memory()
        folder = None if run_dir is None else RunFolder.create(run_dir, self.config, again=again, lock=lock)
        try:
            return self._fit_in(folder, progress, label)
        except Exception:
            if folder is not None:
                folder.withdraw()  # if nothing came of it, the same folder serves the next attempt
            raise
        finally:
            if folder is not None:
                folder.close()

    def _fit_in(self, folder: RunFolder | None, progress: bool, label: str) -> Run:
        with ExitStack() as stack:
            stack.enter_context(_under_budget(self.apis, self.budget))
            if folder is not None:
                _restore_budgets(self.apis, stack.enter_context(folder.counting(self.apis)))
                if folder.complete:
                    return finished_run(folder, self.apis, self.device)
            module = copy.deepcopy(self._module)
            run = Stages(self.apis, module, self.generator, self.config, self.device, folder, progress, label).run()
        if folder is not None:
            folder.finish(run)
        return run

    def _check_meta_model(self) -> None:
        n_classes = self.apis[0].spec.n_classes
        specs = [api.spec for api in self.apis]
        _, height, width = task_shape(specs, self.config) or specs[0].image_shape
        if height != width and self.config.replay.rotations == 4:
            raise InputError(
                f"BiDfMKD: images of {height} x {width} cannot be turned by 90 degrees; set replay.rotations to 2 or 1"
            )
        for shape in sorted({spec.image_shape for spec in specs} | {task_shape(specs, self.config) or ()} - {()}):
            images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(self.device)
            try:
                with seeded(0, "meta_model", "check"), torch.no_grad():
                    logits = forward(self._module, dict(self._module.named_parameters()), images)
            except (RuntimeError, ValueError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"BiDfMKD: meta_model fails on images {list(images.shape)}: {reason}") from error
            if not isinstance(logits, Tensor) or logits.shape != (2, n_classes):
                came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(
                    f"BiDfMKD: meta_model must map images {list(images.shape)} to logits [2, {n_classes}], one per "
                    f"class of an API; got {came}"
                )


def initial_module(specs: Sequence[APISpec], config: TrainConfig) -> nn.Module:
    """The default meta-model for APIs of these `specs` before anything is learned; a function of the seed."""
    shape = task_shape(specs, config)
    channels, *size = shape or specs[0].image_shape
    with seeded(config.seed, "meta_model"):
        return build_model(
            "conv4_any_size" if shape else "conv4",
            in_channels=channels,
            n_classes=specs[0].n_classes,
            image_size=(size[0], size[1]),
            width=config.meta_model_width,
            batch_statistics=True,
        )


def fit_with_control(
    apis: Sequence[BlackBox],
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    budget: Budget | None = None,
    progress: bool = True,
) -> tuple[Run, Run]:
    """A run in `run_dir` and its no-recovery control in `run_dir/control`, from the same start: (run, control).

    The control comes first, so that one budget serves both; its images are asked once each, for their scores. Where
    either was cut off, nothing that was recovered is asked for again, and a complete control is read, not made again.
    Raises as `BiDfMKD.fit`; BudgetExhausted also if `budget` does not reach from the control into the run.
    """
    config = TrainConfig() if config is None else config
    learner = BiDfMKD(apis, config=config, device=device, budget=budget)
    control = BiDfMKD(apis, config=config.control(), device=device, budget=budget)
    RunFolder.check_new(run_dir)
    with FolderLock(run_dir) as lock:
        return _fit_both(learner, control, Path(run_dir), budget, progress, lock)


def _fit_both(
    learner: BiDfMKD, control: BiDfMKD, run_dir: Path, budget: Budget | None, progress: bool, lock: FolderLock
) -> tuple[Run, Run]:
    RunFolder.check_new(run_dir)  # another process may have finished it since
    config, apis = learner.config, learner.apis
    begun = (run_dir / "control").exists()
    n_images = config.n_per_class * apis[0].spec.n_classes
    first_step = first_step_cost(as_known(apis[0]), config.recovery, n_images, config.paper_compat)
    needed = sum((run_cost(api, control.config) for api in apis), first_step)
    if budget is not None and not begun and not budget.affords(needed.queries, needed.requests, needed.price):
        raise BudgetExhausted(
            f"fit_with_control: the control and one recovery step ask {needed.queries:,} queries in "
            f"{needed.requests:,} requests; more than is left of {budget}; raise it or take a lower n_per_class or "
            "num_directions"
        )
    if (run_dir / CONFIG).exists():  # what it has spent counts before the control asks anything
        begun_run = RunFolder(run_dir)
        begun_run.check_settings(config)
        with _under_budget(apis, budget), begun_run.counting(apis) as ledger:
            _restore_budgets(apis, ledger)
    RunFolder.check_writable(run_dir)  # the run's own place, before the control asks anything
    control_run = control._fit(run_dir / "control", progress, again=True, label="control")
    return learner._fit(run_dir, progress, lock=lock), control_run


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"BiDfMKD: device must be one that torch can use here; got {device!r}: {reason}") from None


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
        if api.spec.n_classes != first.n_classes:
            raise InputError(
                f"BiDfMKD: all APIs must have the same n_classes; {first.name} has {first.n_classes} and "
                f"{api.name} has {api.spec.n_classes}; run them as separate pools"
            )
        if budget is not None and api.budget is not None and api.budget is not budget:
            raise InputError(f"BiDfMKD: {api.name} has a budget of its own; give either that or budget=, not both")


def _restore_budgets(apis: list[BlackBox], ledger: LedgerFile) -> None:
    """Count what a run that was cut off has spent."""
    for number, api in enumerate(apis):
        if api.budget is not None:
            api.budget.restore_from(ledger, number)


@contextmanager
def _under_budget(apis: list[BlackBox], budget: Budget | None) -> Iterator[None]:
    before = [api.budget for api in apis]
    try:
        for api in apis:
            api.budget = api.budget if budget is None else budget
        yield
    finally:
        for api, its in zip(apis, before, strict=True):
            api.budget = its
