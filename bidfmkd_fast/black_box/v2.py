"""The Open Inference Protocol, version 2, with the binary tensor extension: messages in and out, nothing sent here."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError

HEADER_LENGTH = "Inference-Header-Content-Length"
Array = np.ndarray[Any, Any]

_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class V2Model:
    """What a server tells of a model: its one input, its outputs as `(name, datatype, shape)`, its batch limit."""

    input_name: str
    datatype: str
    shape: tuple[int, ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    max_batch: int | None

    @classmethod
    def read(cls, name: str, metadata: Any, config: Any) -> V2Model:
        """From a model's metadata and, where the server has one, its configuration (Triton's `max_batch_size`).

        Raises:
            BadAnswer: the metadata are not those of a model. InputError: the model takes more than one input.
        """
        try:
            inputs = [
                (str(one["name"]), str(one["datatype"]), tuple(map(int, one["shape"]))) for one in metadata["inputs"]
            ]
            outputs = [
                (str(one["name"]), str(one["datatype"]), tuple(map(int, one["shape"]))) for one in metadata["outputs"]
            ]
            limit = int((config or {}).get("max_batch_size", 0))
        except (KeyError, TypeError, ValueError, AttributeError):
            what = " ".join(repr(metadata).split())[:200]
            raise BadAnswer(
                f"{name}: the server must describe the model's inputs and outputs; it told {what}"
            ) from None
        if len(inputs) != 1:
            raise InputError(f"{name}: the model must take one input, the images; it takes {len(inputs)}")
        return cls(*inputs[0], tuple(outputs), limit or None)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of one image where all of it is told, else None."""
        shape = self.shape[-3:]
        return shape if len(shape) == 3 and all(size > 0 for size in shape) else None

    def fields(self) -> dict[str, Any]:
        """The fields of an `APISpec` that follow from this."""
        fields: dict[str, Any] = {"max_batch": self.max_batch} if self.max_batch else {}
        if self.datatype == "UINT8":
            fields["dtype"] = "uint8"
        if self.image_shape is not None and self.datatype != "BYTES":
            first, _, last = self.image_shape
            if first not in (1, 3) and last in (1, 3):
                fields["layout"] = "NHWC"
                fields["image_shape"] = (last, *self.image_shape[:2])
            else:
                fields["image_shape"] = self.image_shape
        if len(self.outputs) == 1 and self.outputs[0][2] and (width := self.outputs[0][2][-1]) > 1:
            fields["n_classes"] = width
        return fields

    def check(self, spec: APISpec) -> None:
        """Raises InputError where the server wants other images than the spec sends, telling the field to set."""
        wanted = {"UINT8": "dtype='uint8'", "FP32": "dtype='float32'", "BYTES": "encoding='png' or 'jpeg'"}
        sent = "BYTES" if spec.encoding != "raw" else "UINT8" if spec.dtype == "uint8" else "FP32"
        if self.datatype != sent:
            advice = wanted.get(self.datatype, "a model that takes one of FP32, UINT8 and BYTES")
            raise InputError(f"{spec.name}: the server takes {self.datatype}, the spec sends {sent}; use {advice}")
        channels, height, width = spec.wire_shape
        ours = (height, width, channels) if spec.layout == "NHWC" else (channels, height, width)
        if sent != "BYTES" and any(size > 0 and size != our for size, our in zip(self.shape[-3:], ours)):
            raise InputError(
                f"{spec.name}: the server takes images {list(self.shape[-3:])}, the spec sends {list(ours)} "
                f"({spec.layout}); set server_shape=(C, H, W) and layout"
            )

    def wanted_outputs(self, spec: APISpec) -> tuple[str, ...]:
        """The names of the outputs to ask for: the scores; for top-k answers the scores and the labels."""
        scores = [name for name, datatype, _ in self.outputs if datatype.startswith("FP")]
        labels = [name for name, datatype, _ in self.outputs if not datatype.startswith("FP")]
        if len(scores) > 1:
            scores = [name for name, _, shape in self.outputs if name in scores and shape[-1:] == (spec.n_classes,)]
        told = ", ".join(f"{name} {datatype} {list(shape)}" for name, datatype, shape in self.outputs)
        if not scores and labels:
            raise InputError(f"{spec.name}: the model answers labels only ({told}); a label alone gives no gradient")
        if len(scores) != 1:
            raise InputError(f"{spec.name}: the model must have one output of scores; it has {told}")
        return (scores[0], labels[0]) if spec.scores_kind == "top_k" and len(labels) == 1 else (scores[0],)


def infer_request(
    identity: str, model: V2Model, images: Array | Sequence[bytes], outputs: Sequence[str], binary: bool
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of one inference request: an array, or image files as BYTES (base64 in JSON)."""
    if isinstance(images, np.ndarray):
        shape, raw = list(images.shape), images.astype(_DTYPES[model.datatype], copy=False).tobytes()
    else:
        shape = [len(images), 1] if len(model.shape) > 1 else [len(images)]
        raw = b"".join(struct.pack("<I", len(file)) + file for file in images)
    tensor: dict[str, Any] = {"name": model.input_name, "datatype": model.datatype, "shape": shape}
    request: dict[str, Any] = {"id": identity, "inputs": [tensor]}
    request["outputs"] = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
    if binary:
        tensor["parameters"] = {"binary_data_size": len(raw)}
        header = json.dumps(request).encode()
        return header + raw, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    if isinstance(images, np.ndarray):
        tensor["data"] = images.ravel().tolist()
    else:
        tensor["parameters"] = {"content_type": "base64"}
        tensor["data"] = [base64.b64encode(file).decode() for file in images]
    return json.dumps(request).encode(), {"Content-Type": "application/json"}


def infer_response(name: str, identity: str, headers: Mapping[str, str], body: bytes) -> dict[str, Array]:
    """The tensors of an answer by name; its header says whether and where its binary part begins.

    Raises:
        BadAnswer: it is no answer of the protocol, or one to another request.
    """
    try:
        length = int(headers.get(HEADER_LENGTH, len(body)))
        answer = json.loads(body[:length])
        if answer.get("id", identity) not in (identity, ""):
            raise BadAnswer(f"{name}: the server answered request {answer['id']!r}; asked was {identity!r}")
        tensors, at = {}, length
        for one in answer["outputs"]:
            size = one.get("parameters", {}).get("binary_data_size")
            if size is None:
                values = np.array(one["data"])
            else:
                if at + size > len(body):
                    raise ValueError(f"{size} bytes announced, {len(body) - at} came")
                raw, at = body[at : at + size], at + size
                values = _strings(raw) if one["datatype"] == "BYTES" else np.frombuffer(raw, _DTYPES[one["datatype"]])
            tensors[str(one["name"])] = values.reshape([int(n) for n in one["shape"]])
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadAnswer(f"{name}: the server's answer is none of the v2 protocol: {reason}") from None
    return tensors


def _strings(raw: bytes) -> Array:
    strings, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        strings.append(raw[at + 4 : at + 4 + length].decode("utf-8", "replace"))
        at += 4 + length
    return np.array(strings)
