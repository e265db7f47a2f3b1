"""Make a whole run: from a set of black-box APIs to a meta-model, a folder and a report."""

from bidfmkd_fast.training.bidf_mkd import BiDfMKD
from bidfmkd_fast.training.callbacks import Callback, RunInfo
from bidfmkd_fast.training.config import DistillationConfig, ReplayConfig, TrainConfig, paper
from bidfmkd_fast.training.run import RecoveredSet, Run
from bidfmkd_fast.training.tensorboard import TensorBoardCallback
from bidfmkd_fast.training.with_control import fit_with_control

__all__ = [
    "BiDfMKD",
    "Callback",
    "DistillationConfig",
    "RecoveredSet",
    "ReplayConfig",
    "Run",
    "RunInfo",
    "TensorBoardCallback",
    "TrainConfig",
    "fit_with_control",
    "paper",
]
