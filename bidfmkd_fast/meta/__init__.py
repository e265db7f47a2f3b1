"""Learn the meta-model: inner loop, distillation, replay from the task memory, and evaluation."""

from bidfmkd_fast.meta.classifier import Classifier
from bidfmkd_fast.meta.distill import (
    DistillationTask,
    adapt_to_api,
    distillation_loss,
    outer_distillation_step,
)
from bidfmkd_fast.meta.evaluate import Evaluation, PairedDifference, evaluate, paired_difference
from bidfmkd_fast.meta.inner_loop import InnerLoop, adapt_parameters
from bidfmkd_fast.meta.maml import maml_loss, outer_replay_step
from bidfmkd_fast.meta.memory import TaskMemory
from bidfmkd_fast.meta.model import MetaModel

__all__ = [
    "Classifier",
    "DistillationTask",
    "Evaluation",
    "InnerLoop",
    "MetaModel",
    "PairedDifference",
    "TaskMemory",
    "adapt_parameters",
    "adapt_to_api",
    "distillation_loss",
    "evaluate",
    "maml_loss",
    "outer_distillation_step",
    "outer_replay_step",
    "paired_difference",
]
