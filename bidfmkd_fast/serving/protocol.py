"""Read requests and write answers of the Open Inference Protocol v2: pure functions on bytes.

Tensors are JSON or raw bytes. This is the protocol's second implementation in this package, on
purpose: it shares no code with `black_box/remote/v2_messages.py`, so that a misreading on one side
fails against the other. Source: the protocol's REST page and Triton's extensions for binary
tensors, model configuration and statistics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

HEADER_LENGTH = "Inference-Header-Content-Length"
_DTYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "UINT8": np.dtype("u1"),
    "INT64": np.dtype("<i8"),
}


class Refused(Exception):
    """A request that cannot be served: the status of the answer, and the reason in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model; the first number of `shape` is -1, for the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def metadata(self) -> dict[str, Any]:
        """Return the entry of the model's metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def config(self, batched: bool) -> dict[str, Any]:
        """Return the entry of the model's configuration.

        If the model has a `max_batch_size` (`batched`), the shape is without the batch.
        """
        return {
            "name": self.name,
            "data_type": f"TYPE_{self.datatype}",
            "dims": list(self.shape[1:] if batched else self.shape),
        }


@dataclass(frozen=True)
class Request:
    """The content of a request.

    Attributes:
        id: id of the request; None without one.
        images: the only input of the request.
        outputs: the outputs that it wants, and whether each is sent as raw bytes.
    """

    id: str | None
    images: np.ndarray[Any, Any]
    outputs: dict[str, bool]


def read_request(
    body: bytes, header_length: str | None, wanted: TensorInfo, outputs: list[str]
) -> Request:
    """Read an inference request for a model with the only input `wanted` and these outputs.

    Raises:
        Refused: with status 400, if it is no such request, or the model takes another tensor.
    """
    header, raw = _split(body, header_length)
    inputs = header.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, f"the model takes exactly one input, {wanted.name!r}")
    tensor = inputs[0]
    for key, value in (("name", wanted.name), ("datatype", wanted.datatype)):
        if tensor.get(key) != value:
            raise Refused(400, f"input {key} must be {value!r}; got {tensor.get(key)!r}")
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or not all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
        or len(shape) != len(wanted.shape)
        or tuple(shape[1:]) != wanted.shape[1:]
        or shape[0] < 1
    ):
        raise Refused(
            400,
            f"input {wanted.name!r} must have shape {list(wanted.shape)}, -1 for any; "
            f"got {shape!r}",
        )
    return Request(
        header.get("id"), _tensor(tensor, raw, tuple(shape)), _outputs_wanted(header, outputs)
    )


def write_answer(
    model: str, request: Request, outputs: Mapping[str, np.ndarray[Any, Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of the answer: the wanted outputs, each as JSON or raw bytes."""
    written, raw = [], []
    for name, binary in request.outputs.items():
        array = outputs[name]
        datatype = "INT64" if array.dtype.kind == "i" else "FP32"
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            raw.append(array.astype(_DTYPES[datatype]).tobytes())
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = array.ravel().tolist()
        written.append(output)
    header: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": written}
    if request.id is not None:
        header["id"] = request.id
    text = json.dumps(header).encode()
    if not raw:
        return text, {"Content-Type": "application/json"}
    return b"".join((text, *raw)), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(text)),
    }


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes]:
    """Split a request into its JSON header and the raw bytes behind it."""
    if header_length is not None and (
        not header_length.isdecimal() or int(header_length) > len(body)
    ):
        raise Refused(
            400,
            f"{HEADER_LENGTH} must be a number up to the body's {len(body)} bytes; "
            f"got {header_length!r}",
        )
    length = len(body) if header_length is None else int(header_length)
    try:
        header = json.loads(body[:length])
    except ValueError as error:
        raise Refused(400, f"the request is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise Refused(400, f"the request must be a JSON object; got a {type(header).__name__}")
    if not isinstance(header.get("id", ""), str):
        raise Refused(400, f"id must be a string; got {header['id']!r}")
    return header, body[length:]


def _tensor(tensor: dict[str, Any], raw: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return the numbers of a request's tensor, from its JSON data or from the raw bytes."""
    dtype = _DTYPES[tensor["datatype"]]
    size = _parameters(tensor).get("binary_data_size")
    if size is not None:
        if "data" in tensor:
            raise Refused(400, "an input has either data or binary_data_size")
        if size != len(raw) or size != math.prod(shape) * dtype.itemsize:
            wanted = f"{math.prod(shape) * dtype.itemsize} for the shape {list(shape)}"
            raise Refused(
                400, f"binary_data_size must be {wanted}; got {size!r}, but {len(raw)} bytes follow"
            )
        return np.frombuffer(raw, dtype).reshape(shape)
    try:
        values = np.asarray(tensor.get("data"), np.float64)
    except (TypeError, ValueError):
        raise Refused(400, "data must be numbers, flat or nested as the shape says") from None
    if values.size != math.prod(shape) or values.ndim not in (1, len(shape)):
        raise Refused(
            400,
            f"data must be {math.prod(shape)} numbers for the shape {list(shape)}; "
            f"got {values.size}",
        )
    if (
        dtype.kind == "u"
        and not ((values >= 0) & (values <= 255) & (values == values.round())).all()
    ):
        raise Refused(400, "data of a UINT8 input must be whole numbers from 0 to 255")
    return values.astype(dtype).reshape(shape)


def _outputs_wanted(header: dict[str, Any], outputs: list[str]) -> dict[str, bool]:
    """Return the outputs that a request wants, and whether each is sent as raw bytes."""
    default = bool(_parameters(header).get("binary_data_output", False))
    wanted = header.get("outputs")
    if not wanted:
        return dict.fromkeys(outputs, default)
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise Refused(400, "outputs must be a list of objects")
    for output in wanted:
        if output.get("name") not in outputs:
            raise Refused(400, f"the outputs are {', '.join(outputs)}; got {output.get('name')!r}")
    return {
        output["name"]: bool(_parameters(output).get("binary_data", default)) for output in wanted
    }


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    """Return the `parameters` of a request, an input or an output."""
    parameters = holder.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refused(400, f"parameters must be an object; got {parameters!r}")
    return parameters
