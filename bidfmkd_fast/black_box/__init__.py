"""Black boxes: image-classification APIs of which only the scores are seen, and what asking them costs."""

from __future__ import annotations

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.grpc import GrpcBlackBox
from bidfmkd_fast.black_box.json_api import JSONBlackBox, JSONMapping
from bidfmkd_fast.black_box.ledger import Budget, Ledger
from bidfmkd_fast.black_box.local import FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.black_box.onnx import OnnxBlackBox
from bidfmkd_fast.black_box.open_box import OpenBox
from bidfmkd_fast.black_box.remote import RemoteBlackBox
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
