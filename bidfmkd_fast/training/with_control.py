"""Run the algorithm and its no-recovery control from the same start and under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from bidfmkd_fast.black_box import BlackBox, Budget
from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.recovery.cost import Cost, first_step_cost
from bidfmkd_fast.runtime.ranks import current
from bidfmkd_fast.survey.cost import survey_cost
from bidfmkd_fast.training.bidf_mkd import BiDfMKD
from bidfmkd_fast.training.budgets import under_budget
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.counted_queries import counted_queries
from bidfmkd_fast.training.finished_run import finished_run
from bidfmkd_fast.training.loop import run_loop
from bidfmkd_fast.training.run import Run
from bidfmkd_fast.training.run_checkpoint import checkpointed
from bidfmkd_fast.training.run_cost import as_known, run_cost
from bidfmkd_fast.training.run_folder import CONFIG, RunFolder


def fit_with_control(
    apis: Sequence[BlackBox],
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    budget: Budget | None = None,
    progress: bool = True,
) -> tuple[Run, Run]:
    """Make a run in `run_dir` and its no-recovery control in `run_dir/control`: (run, control).

    The control asks each API for the scores of untrained generators' images only. It comes first,
    so that one budget serves both. If either was cut off, nothing that was recovered is asked for
    again, and a complete control is read instead of being made again.

    Raises:
        BudgetExhausted: `budget` does not pay for the control, the survey and one recovery step;
            nothing has been asked then.
        Everything else that `BiDfMKD.fit` raises.
    """
    config = TrainConfig() if config is None else config
    learner = BiDfMKD(apis, config=config, device=device, budget=budget)
    control = BiDfMKD(apis, config=config.control(), device=device, budget=budget)
    control.label = "control"
    folder, ranks = Path(run_dir), current()

    def begin() -> FolderLock:
        RunFolder.check_new(folder)
        lock = stack.enter_context(FolderLock(folder))
        RunFolder.check_new(folder)  # another process may have finished it in the meantime
        if budget is not None and not (folder / "control").exists():
            _check_budget(learner, control, budget)
        # What the run itself has spent counts before the control asks anything.
        count_spent(RunFolder(folder), config, learner.apis, budget)
        RunFolder.check_writable(folder)  # the run's own files, before the control asks anything
        return lock

    with ExitStack() as stack:
        lock = ranks.first_alone(begin)
        with control._begun(folder / "control", progress, again=True) as state:
            complete = state.folder is not None and state.folder.complete
            complete = any(ranks.exchange(complete))
            with checkpointed(state):
                control_run = finished_run(state) if complete else run_loop(state)
        with learner._begun(folder, progress, lock=lock) as state, checkpointed(state):
            return run_loop(state), control_run


def count_spent(
    folder: RunFolder, config: TrainConfig, apis: Sequence[BlackBox], budget: Budget | None
) -> None:
    """Take what the run in `folder` has asked, if it has begun, from `budget`.

    Raises InputError if the run has other settings or another pool.
    """
    if (folder.path / CONFIG).exists():
        folder.check_settings(config)
        with under_budget(apis, budget), counted_queries(folder, apis):
            pass


def _check_budget(learner: BiDfMKD, control: BiDfMKD, budget: Budget) -> None:
    """Raise BudgetExhausted unless `budget` reaches from the control into the run."""
    config, apis = learner.config, learner.apis
    needed = sum((run_cost(api, control.config) for api in apis), Cost())
    for api in apis:
        needed += survey_cost(as_known(api), config.survey)
    for api in apis:
        if config.recovers_from(api.spec):  # the first API from which something is recovered
            n_images = config.n_per_class * api.spec.n_classes
            needed += first_step_cost(as_known(api), config.recovery, n_images, config.paper_compat)
            break
    if not budget.affords(needed.queries, needed.requests, needed.price):
        raise BudgetExhausted(
            f"fit_with_control: control, survey and one recovery step ask {needed.queries:,} "
            f"queries in {needed.requests:,} requests, more than is left of {budget}; raise the "
            "budget, or lower survey.n_images, n_per_class or num_directions"
        )
