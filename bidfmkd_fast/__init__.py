"""Black-box data-free meta-learning: one small meta-model from a set of APIs of which only the scores are seen.

BiDf-MKD (Hu et al., ICML 2023, arXiv 2305.18413).
"""

import logging as _logging
import os as _os
import sys as _sys
from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from bidfmkd_fast.runtime.signals import end_at_once_while_loading as _end_at_once_while_loading

# Before torch loads OpenMP, unless it has already or the user has chosen: threads that spin long at
# the end of every operation make a machine that does anything else beside up to 70 times slower
# (docs/architecture.md).
if "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_logging.getLogger("bidfmkd_fast").addHandler(
    _logging.NullHandler()
)  # what happens is told to whoever asks for it

# The command too may be interrupted before torch is there. Who uses the library handles signals by
# rules of their own.
if _os.path.basename((getattr(_sys, "argv", None) or [""])[0]) == "bidfmkd":
    _end_at_once_while_loading()

from bidfmkd_fast import errors, ops
from bidfmkd_fast.black_box import (
    APISpec,
    BlackBox,
    Budget,
    FunctionBlackBox,
    GrpcBlackBox,
    JSONBlackBox,
    OnnxBlackBox,
    RemoteBlackBox,
    TorchBlackBox,
)
from bidfmkd_fast.data import Dataset, Episode, EpisodeSampler, load_dataset
from bidfmkd_fast.meta import Classifier, Evaluation, MetaModel, evaluate, paired_difference
from bidfmkd_fast.pools import load_pool, train_pool
from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.recovery import Recovered, RecoveryConfig, recover
from bidfmkd_fast.training import BiDfMKD, DistillationConfig, ReplayConfig, Run, TrainConfig
from bidfmkd_fast.zeroth_order import ZerothOrder, as_differentiable

try:
    __version__ = _version("bidfmkd-fast")
except _NotInstalled:  # used from a source tree that was never installed
    __version__ = "unknown"

__all__ = [
    "APISpec",
    "BiDfMKD",
    "BlackBox",
    "Budget",
    "Classifier",
    "Dataset",
    "DistillationConfig",
    "Episode",
    "EpisodeSampler",
    "Evaluation",
    "FunctionBlackBox",
    "GrpcBlackBox",
    "JSONBlackBox",
    "MetaModel",
    "OnnxBlackBox",
    "Recovered",
    "RecoveryConfig",
    "RemoteBlackBox",
    "ReplayConfig",
    "Run",
    "TorchBlackBox",
    "TrainConfig",
    "ZerothOrder",
    "__version__",
    "as_differentiable",
    "errors",
    "evaluate",
    "load_dataset",
    "load_pool",
    "ops",
    "paired_difference",
    "procedural_images",
    "recover",
    "train_pool",
]
