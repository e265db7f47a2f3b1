"""Ask image-classification APIs of which only the scores are seen, and count what that costs."""

from __future__ import annotations

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.ledger import Ledger
from bidfmkd_fast.black_box.local.function import FunctionBlackBox
from bidfmkd_fast.black_box.local.onnx_file import OnnxBlackBox
from bidfmkd_fast.black_box.local.open_box import OpenBox
from bidfmkd_fast.black_box.local.torch_module import TorchBlackBox
from bidfmkd_fast.black_box.remote.json_api import JSONBlackBox, JSONMapping
from bidfmkd_fast.black_box.remote.v2_grpc import GrpcBlackBox
from bidfmkd_fast.black_box.remote.v2_http import RemoteBlackBox
from bidfmkd_fast.black_box.spec import SCORES_KINDS, APISpec

__all__ = [
    "SCORES_KINDS",
    "APISpec",
    "BlackBox",
    "Budget",
    "FunctionBlackBox",
    "GrpcBlackBox",
    "JSONBlackBox",
    "JSONMapping",
    "Ledger",
    "OnnxBlackBox",
    "OpenBox",
    "RemoteBlackBox",
    "TorchBlackBox",
]
