"""The whole run: from a set of black-box APIs to a meta-model, with its settings, its folder and its report."""

from bidfmkd_fast.training.bidf_mkd import BiDfMKD, fit_with_control
from bidfmkd_fast.training.config import DistillationConfig, ReplayConfig, TrainConfig, paper
from bidfmkd_fast.training.run import RecoveredSet, Run

__all__ = [
    "BiDfMKD",
    "DistillationConfig",
    "RecoveredSet",
    "ReplayConfig",
    "Run",
    "TrainConfig",
    "fit_with_control",
    "paper",
]
