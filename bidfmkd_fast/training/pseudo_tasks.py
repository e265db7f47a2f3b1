"""Train a meta-model on pseudo-tasks of procedural pictures: what can be learned for nothing.

A class is one scene of the picture library and its images are jittered copies. No API is asked and
no real picture is used, so a run on APIs must reach more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec, BlackBox
from bidfmkd_fast.files.checkpoints import Checkpoints
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.meta import MetaModel, TaskMemory, outer_replay_step
from bidfmkd_fast.meta.replay_on_device import DeviceReplay
from bidfmkd_fast.meta.stacked import can_stack
from bidfmkd_fast.priors.library import draw_pictures
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.default_model import initial_module, task_shape
from bidfmkd_fast.training.kept_steps import KeptSteps
from bidfmkd_fast.training.run_folder import CHECKPOINTS, META_MODEL, RunFolder
from bidfmkd_fast.training.step_records import StepRecords

# Scenes, and jittered copies of each; there are more if a task has as many classes, or as many
# images per class.
PSEUDO_CLASSES, PSEUDO_MEMBERS = 200, 20


def learn_from_pictures(
    specs: Sequence[APISpec],
    config: TrainConfig,
    n_steps: int,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    folder: Path | None = None,
    records: StepRecords | None = None,
) -> nn.Module:
    """Train the default meta-model of a run by MAML on pseudo-tasks, as the replay would.

    Args:
        specs: those of the APIs, for the shape of the images and the number of classes of a task.
        config: settings of the run; its replay settings are used.
        n_steps: outer steps.
        device: where the module is trained.
        progress: whether to show a bar.
        folder: where checkpoints are kept, from the newest of which the training goes on; None to
            keep none.
        records: gets loss and accuracy of every step.

    Returns:
        The module, which starts from the same parameters as the run.
    """
    records = StepRecords(None) if records is None else records
    replay, n_tasks = config.replay, config.meta_batch_size
    shape = task_shape(specs, config) or specs[0].image_shape
    n_way = min(spec.n_classes for spec in specs)
    n_scenes, n_members = max(PSEUDO_CLASSES, n_way), max(PSEUDO_MEMBERS, replay.n_shot + 1)
    scenes = torch.arange(n_scenes).repeat_interleave(n_members)
    members = torch.arange(n_members).repeat(n_scenes)
    seed = derive_seed(config.seed, "zero_query")
    memory = TaskMemory(shape)
    memory.add(
        draw_pictures(scenes, members, shape, seed),
        [("pictures", str(scene)) for scene in scenes.tolist()],
    )
    module = initial_module(specs, config).to(device)
    optimizer = torch.optim.Adam(
        module.parameters(),
        lr=replay.outer_lr,
        capturable=next(module.parameters()).is_cuda,
    )
    n_query = min(replay.n_query, n_members - replay.n_shot)
    on_device = None
    if next(module.parameters()).is_cuda and can_stack(module, n_way):
        on_device = DeviceReplay(
            module,
            optimizer,
            memory,
            (n_way, replay.n_shot, n_query),
            n_tasks,
            replay.inner,
            rotations=replay.rotations,
        )

    def step(number: int) -> dict[str, float] | None:
        if on_device is not None:
            on_device.step(seed, number * n_tasks)
            return None
        episodes = [
            memory.sample_episode(
                n_way,
                replay.n_shot,
                n_query,
                seed=seed,
                index=number * n_tasks + task,
                rotations=replay.rotations,
            )
            for task in range(n_tasks)
        ]
        with seeded(config.seed, "zero_query", number):
            return outer_replay_step(module, optimizer, episodes, replay.inner)

    with (
        KeptSteps(folder, module, optimizer, records) as kept,
        Bar("zero_query: train", n_steps, "steps", progress) as bar,
    ):
        kept.train(n_steps, bar, step, None if on_device is None else on_device.records)
    return module


def zero_query_file(run_dir: Path) -> Path:
    """Return the path of zero_query's meta-model in the folder of a run."""
    return run_dir / "zero_query" / META_MODEL


def keep_zero_query(
    folder: RunFolder,
    apis: Sequence[BlackBox],
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> None:
    """Train on pictures for as many steps as the finished run in `folder` replays at most.

    The meta-model is written to `zero_query_file`. If it is there already, nothing is trained.
    """
    file, config = zero_query_file(folder.path), folder.config()
    with FolderLock(folder.path):
        if not file.is_file():
            specs = [api.spec for api in apis]
            n_steps = config.replay_steps(sum(not spec.labels_only for spec in specs))
            module = learn_from_pictures(
                specs, config, n_steps, device=device, progress=progress, folder=file.parent
            )
            MetaModel(
                module, adapt_steps=config.adapt_steps, adapt_learning_rate=config.adapt_lr
            ).save(file)
        Checkpoints(file.with_name(CHECKPOINTS)).remove()
