"""Train a meta-model on pseudo-tasks of procedural pictures: what can be learned for nothing.

A class is one scene of the picture library and its images are jittered copies. No API is asked and
no real picture is used, so a run on APIs must reach more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.meta import TaskMemory, outer_replay_step
from bidfmkd_fast.priors.library import draw_pictures
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.default_model import initial_module, task_shape

# Scenes, and jittered copies of each; there are more copies if a task has as many images per class.
PSEUDO_CLASSES, PSEUDO_MEMBERS = 200, 20


def learn_from_pictures(
    specs: Sequence[APISpec],
    config: TrainConfig,
    n_steps: int,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """Train the default meta-model of a run by MAML on pseudo-tasks, as the replay would.

    Args:
        specs: those of the APIs, for the shape of the images and the number of classes of a task.
        config: settings of the run; its replay settings are used.
        n_steps: outer steps.
        device: where the module is trained.
        progress: whether to show a bar.

    Returns:
        The module, which starts from the same parameters as the run.
    """
    replay, n_tasks = config.replay, config.meta_batch_size
    shape = task_shape(specs, config) or specs[0].image_shape
    n_members = max(PSEUDO_MEMBERS, replay.n_shot + 1)
    scenes = torch.arange(PSEUDO_CLASSES).repeat_interleave(n_members)
    members = torch.arange(n_members).repeat(PSEUDO_CLASSES)
    seed = derive_seed(config.seed, "zero_query")
    memory = TaskMemory(shape)
    memory.add(
        draw_pictures(scenes, members, shape, seed),
        [("pictures", str(scene)) for scene in scenes.tolist()],
    )
    module = initial_module(specs, config).to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=replay.outer_lr)
    n_way = min(spec.n_classes for spec in specs)
    n_query = min(replay.n_query, n_members - replay.n_shot)
    with Bar("zero_query: train", n_steps, "steps", progress) as bar:
        for step in bar.over(range(n_steps)):
            episodes = [
                memory.sample_episode(
                    n_way,
                    replay.n_shot,
                    n_query,
                    seed=seed,
                    index=step * n_tasks + task,
                    rotations=replay.rotations,
                )
                for task in range(n_tasks)
            ]
            with seeded(config.seed, "zero_query", step):
                outer_replay_step(module, optimizer, episodes, replay.inner)
    return module
