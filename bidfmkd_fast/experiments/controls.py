"""Train the controls: what the meta-model reaches without asking the APIs, or without recovery.

Whoever pays for an API must get more than these give for nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bidfmkd_fast.black_box import TorchBlackBox
from bidfmkd_fast.experiments.experiment import Experiment, finish_method, fit_run
from bidfmkd_fast.pools.pool import load_pool
from bidfmkd_fast.priors.library import draw_pictures
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.training import BiDfMKD
from bidfmkd_fast.training.pseudo_tasks import learn_from_pictures
from bidfmkd_fast.training.records import Records
from bidfmkd_fast.training.run_folder import META_MODEL, METRICS, STAND_INS, RunFolder
from bidfmkd_fast.training.step_records import StepRecords

# Standard deviation of the logits of `random_teachers`, as trained APIs have it: the share of the
# highest class is about 0.8 then. A network with random weights gives all classes nearly alike.
TEACHER_SPREAD = 3.0


def random_initialisation(experiment: Experiment, folder: Path) -> None:
    """Keep the meta-model as it starts."""
    finish_method(folder, experiment, experiment.fresh(), 0, 0.0)


def control(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD on images of untrained generators: meta-learning without recovery."""
    fit_run(
        experiment, load_pool(experiment.pool.folder), experiment.train.control(), folder, "control"
    )


def zero_query(experiment: Experiment, folder: Path) -> None:
    """Replay pseudo-tasks of procedural pictures, for as many steps as BiDf-MKD replays.

    Neither an API nor a real picture is used.
    """
    records = StepRecords(folder / METRICS)
    module = learn_from_pictures(
        [entry.spec for entry in experiment.pool.trained],
        experiment.train,
        experiment.replay_steps,
        device=experiment.device,
        progress=experiment.progress,
        folder=folder,
        records=records,
    )
    finish_method(folder, experiment, module, 0, records.seconds)


def random_teachers(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD on networks with random weights in place of the APIs.

    What is learned from them is what any images and scores teach, and not what APIs know.
    """
    config = experiment.train
    boxes = []
    for number, entry in enumerate(experiment.pool.trained):
        with seeded(config.seed, "random teacher", number):
            module = entry.build()
        scaled = _Scaled(module.eval(), entry.spec.image_shape, config.seed)
        boxes.append(TorchBlackBox(scaled, entry.spec, device=experiment.device))
    run = RunFolder(folder / STAND_INS)
    if not (run.path / META_MODEL).is_file():
        learner = BiDfMKD(boxes, config=config, device=experiment.device)
        learner.label = "random_teachers"
        learner.fit(run.path, experiment.progress)
    records = Records(folder / METRICS)
    for record in run.metrics():
        records.add({**record, "queries": 0})  # none of them to an API
    records.tell()
    seconds = sum(run.summary()["seconds"].values())
    finish_method(folder, experiment, run.meta_model().module, 0, seconds)


class _Scaled(nn.Module):
    """A network whose logits are shifted and scaled to mean 0 and standard deviation
    `TEACHER_SPREAD` on procedural pictures, for each class.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], seed: int) -> None:
        super().__init__()
        self.module = module
        scenes = torch.arange(256)
        pictures = draw_pictures(scenes, torch.zeros_like(scenes), image_shape, seed)
        with torch.no_grad():
            logits = module(pictures)
        self.register_buffer("shift", logits.mean(0))
        self.register_buffer("scale", TEACHER_SPREAD / logits.std(0).clamp_min(1e-12))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = (self.module(images) - self.shift) * self.scale
        return logits
