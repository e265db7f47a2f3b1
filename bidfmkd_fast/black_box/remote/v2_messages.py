"""Write and read messages of the Open Inference Protocol v2 with the binary tensor extension.

Nothing is sent here. `serving/protocol.py` implements the same protocol from the server's side,
independently, so that a misreading on one side fails against the other.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bidfmkd_fast.black_box.remote.reading import reading, short, shown
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError
from bidfmkd_fast.ops.scores import SCORES_KINDS

HEADER_LENGTH = "Inference-Header-Content-Length"
Array = np.ndarray[Any, Any]

_DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_FLOATS = ("FP16", "FP32", "FP64", "BF16")


class ServerMismatch(InputError, BadAnswer):
    """The server describes a model that the spec does not fit.

    For the user who makes the box this is bad input. In a run, which may be under way for hours
    when a server changes, it is a reason to skip the API; so it is both errors.
    """


@dataclass(frozen=True)
class V2Model:
    """The metadata of a model: its only input, its outputs, its batch limit.

    Attributes:
        input_name, datatype, shape: name, datatype and shape of the only input.
        outputs: `(name, datatype, shape)` of each output.
        max_batch: most images per request; None if the server states none.
        scores_kind: kind of the scores, if the server states one that the package knows.
    """

    input_name: str
    datatype: str
    shape: tuple[int, ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    max_batch: int | None
    scores_kind: str | None = None

    @classmethod
    def read(cls, name: str, metadata: Any, config: Any) -> V2Model:
        """Read a model's metadata and, if the server has it, its configuration.

        From the configuration of Triton only `max_batch_size` is taken, and the parameter
        `scores_kind`, which `bidfmkd serve` sets.

        Raises:
            BadAnswer: the metadata are not those of a model.
            InputError: the model takes more than one input.
        """
        with reading(
            name,
            f"the server must describe the model's inputs and outputs; it sent {shown(metadata)}",
        ):
            inputs = [_described(tensor) for tensor in metadata["inputs"]]
            outputs = [_described(tensor) for tensor in metadata["outputs"]]
            limit = max(0, int((config or {}).get("max_batch_size", 0)))
        if len(inputs) != 1:
            raise ServerMismatch(
                f"{name}: the model must take one input, the images; it takes {len(inputs)}"
            )
        return cls(*inputs[0], tuple(outputs), limit or None, _scores_kind(config))

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Return the shape of one image; None if the server leaves a size open."""
        shape = self.shape[-3:]
        return shape if len(shape) == 3 and all(size > 0 for size in shape) else None

    def fields(self) -> dict[str, Any]:
        """Return the fields of an `APISpec` that follow from the metadata."""
        fields: dict[str, Any] = {"max_batch": self.max_batch} if self.max_batch else {}
        if self.scores_kind is not None:
            fields["scores_kind"] = self.scores_kind
        if self.datatype == "UINT8":
            fields["dtype"] = "uint8"
        if self.image_shape is not None and self.datatype != "BYTES":
            first, _, last = self.image_shape
            if first not in (1, 3) and last in (1, 3):
                fields["layout"] = "NHWC"
                fields["image_shape"] = (last, *self.image_shape[:2])
            else:
                fields["image_shape"] = self.image_shape
        if len(self.outputs) == 1 and (width := _width(self.outputs[0][2])):
            fields["n_classes"] = width
        return fields

    def check(self, spec: APISpec) -> None:
        """Raise InputError, which names the field to set, if the server wants other images."""
        wanted = {
            "UINT8": "dtype='uint8'",
            "FP32": "dtype='float32'",
            "BYTES": "encoding='png' or 'jpeg'",
        }
        sent = "BYTES" if spec.encoding != "raw" else "UINT8" if spec.dtype == "uint8" else "FP32"
        if self.datatype != sent:
            advice = wanted.get(self.datatype, "a model that takes one of FP32, UINT8 and BYTES")
            raise ServerMismatch(
                f"{spec.name}: the server takes {short(self.datatype)}, the spec sends {sent}; "
                f"use {advice}"
            )
        channels, height, width = spec.wire_shape
        ours = (height, width, channels) if spec.layout == "NHWC" else (channels, height, width)
        if sent != "BYTES" and any(
            size > 0 and size != our for size, our in zip(self.shape[-3:], ours)
        ):
            raise ServerMismatch(
                f"{spec.name}: the server takes images {shown(list(self.shape[-3:]))}, the spec "
                f"sends {list(ours)} ({spec.layout}); set server_shape=(C, H, W) and layout"
            )

    def wanted_outputs(self, spec: APISpec) -> tuple[str, ...]:
        """Return the names of the outputs to request: the scores, for top-k also the labels.

        For an API of labels it is the output of labels, or else that of scores, if the model has
        one only.
        """
        scores = [name for name, datatype, _ in self.outputs if datatype in _FLOATS]
        labels = [name for name, datatype, _ in self.outputs if datatype not in _FLOATS]
        if len(scores) > 1:
            scores = [
                name
                for name, _, shape in self.outputs
                if name in scores and _width(shape) == spec.n_classes
            ]
        outputs = short(
            ", ".join(f"{name} {datatype} {list(shape)}" for name, datatype, shape in self.outputs)
        )
        if spec.labels_only and len(labels or scores) != 1:
            raise ServerMismatch(
                f"{spec.name}: the model must have one output of labels, or else of scores; it has "
                f"{outputs}"
            )
        if spec.labels_only:
            return tuple(labels or scores)
        if not scores and labels:
            raise ServerMismatch(
                f"{spec.name}: the model answers labels only ({outputs}); a label alone gives no "
                "gradient; set scores_kind='labels', from which the survey alone can learn"
            )
        if len(scores) != 1:
            raise ServerMismatch(
                f"{spec.name}: the model must have one output of scores; it has {outputs}"
            )
        return (
            (scores[0], labels[0])
            if spec.scores_kind == "top_k" and len(labels) == 1
            else (scores[0],)
        )


def infer_request(
    identity: str,
    model: V2Model,
    images: Array | Sequence[bytes],
    outputs: Sequence[str],
    binary: bool,
) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of an inference request.

    `images` are an array, or image files, which are sent as BYTES (base64 in JSON).
    """
    if isinstance(images, np.ndarray):
        shape, raw = (
            list(images.shape),
            images.astype(_DTYPES[model.datatype], copy=False).tobytes(),
        )
    else:
        shape = [len(images), 1] if len(model.shape) > 1 else [len(images)]
        raw = b"".join(struct.pack("<I", len(file)) + file for file in images)
    tensor: dict[str, Any] = {"name": model.input_name, "datatype": model.datatype, "shape": shape}
    request: dict[str, Any] = {"id": identity, "inputs": [tensor]}
    request["outputs"] = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
    if binary:
        tensor["parameters"] = {"binary_data_size": len(raw)}
        header = json.dumps(request).encode()
        return header + raw, {
            "Content-Type": "application/octet-stream",
            HEADER_LENGTH: str(len(header)),
        }
    if isinstance(images, np.ndarray):
        tensor["data"] = images.ravel().tolist()
    else:
        tensor["parameters"] = {"content_type": "base64"}
        tensor["data"] = [base64.b64encode(file).decode() for file in images]
    return json.dumps(request).encode(), {"Content-Type": "application/json"}


def infer_response(
    name: str, identity: str, headers: Mapping[str, str], body: bytes
) -> dict[str, Array]:
    """Return the tensors of an answer by name.

    The HTTP header of the answer says where its binary part begins, if it has a binary part.

    Raises:
        BadAnswer: the answer does not follow the protocol, or belongs to another request.
    """
    with reading(name, "the server's answer does not follow the v2 protocol", body):
        length = int(headers.get(HEADER_LENGTH, len(body)))
        if not 0 <= length <= len(body):
            raise ValueError(f"{HEADER_LENGTH} is {length} of {len(body)} bytes")
        answer = json.loads(body[:length])
        if answer.get("id", identity) not in (identity, ""):
            raise BadAnswer(
                f"{name}: the server answered request {shown(answer['id'])} instead of {identity!r}"
            )
        tensors, at = {}, length
        for output in answer["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                values = np.array(output["data"])
            else:
                if not 0 <= size <= len(body) - at:
                    raise ValueError(f"{size} bytes announced, {len(body) - at} came")
                raw, at = body[at : at + size], at + size
                values = _decoded(raw, output["datatype"])
            tensors[str(output["name"])] = values.reshape([int(n) for n in output["shape"]])
    return tensors


def per_image(values: Array) -> Array:
    """Return an output as `[N, n]` if only one of its axes after the first is longer than 1."""
    wide = [size for size in values.shape[1:] if size != 1]
    return values.reshape(len(values), *wide) if values.ndim > 2 and len(wide) == 1 else values


def _scores_kind(config: Any) -> str | None:
    """Return the parameter `scores_kind` of a configuration; None for one that says nothing."""
    try:
        kind = config["parameters"]["scores_kind"]["string_value"]
    except (KeyError, TypeError):
        return None
    return kind if kind in SCORES_KINDS else None


def _described(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
    """Return name, datatype and shape of a tensor from its metadata."""
    return str(tensor["name"]), str(tensor["datatype"]), tuple(map(int, tensor["shape"]))


def _width(shape: Sequence[int]) -> int:
    """Return how many numbers an output holds per image; 0 if its shape leaves that open."""
    wide = [size for size in shape[1:] or shape if size > 1]
    return wide[0] if len(wide) == 1 else 0


def _decoded(raw: bytes, datatype: str) -> Array:
    """Return the numbers or strings of a binary tensor."""
    if datatype == "BYTES":
        return _strings(raw)
    if datatype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, _DTYPES[datatype])


def _strings(raw: bytes) -> Array:
    """Read strings from bytes: each has 4 bytes of length before it."""
    strings, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        strings.append(raw[at + 4 : at + 4 + length].decode("utf-8", "replace"))
        at += 4 + length
    return np.array(strings)
