"""Learn one small meta-model from many image-classification APIs that return scores only.

This is black-box data-free meta-learning by BiDf-MKD (Hu et al., ICML 2023, arXiv 2305.18413).
"""

import logging as _logging
import os as _os
import sys as _sys
from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from bidfmkd_fast.runtime.signals import end_at_once_while_loading as _end_at_once_while_loading

# OpenMP threads spin for a while at the end of every operation. On a machine that runs anything
# else at the same time this costs up to a factor of 70 (docs/architecture.md). So limit the
# spinning unless the user has set a policy, before torch loads OpenMP.
if "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# A library logs nothing unless its user configures logging.
_logging.getLogger("bidfmkd_fast").addHandler(_logging.NullHandler())

# The command may be interrupted while torch is loaded. A program that uses the library handles
# signals by its own rules.
if _os.path.basename((getattr(_sys, "argv", None) or [""])[0]) == "bidfmkd":
    _end_at_once_while_loading()
    # If another process of a job dies, the command says so in one line; torch would write a stack
    # trace of its C++ code besides.
    _os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

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
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    Callback,
    DistillationConfig,
    ReplayConfig,
    Run,
    TensorBoardCallback,
    TrainConfig,
)
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
    "Callback",
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
    "SurveyConfig",
    "TensorBoardCallback",
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
