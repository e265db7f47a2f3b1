"""Check what the server reads, refuses and writes of the Open Inference Protocol v2."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from bidfmkd_fast.serving.protocol import (
    HEADER_LENGTH,
    Refused,
    Request,
    TensorInfo,
    read_request,
    write_answer,
)

INPUT = TensorInfo("images", "FP32", (-1, 1, 2, 2))
VALUES = [0.5, -1.0, 2.0, 0.25, 1.0, 3.0, -4.0, 0.125]  # exact in float32
OUTPUTS = ["scores", "labels"]


def message(**changes: object) -> dict:
    tensor = {
        "name": "images",
        "datatype": "FP32",
        "shape": [2, 1, 2, 2],
        "data": VALUES,
        **changes,
    }
    return {
        "id": "7",
        "inputs": [{key: value for key, value in tensor.items() if value is not None}],
    }


def read(content: object, raw: bytes | None = None, wanted: TensorInfo = INPUT) -> Request:
    text = json.dumps(content).encode()
    return read_request(
        text + (raw or b""), None if raw is None else str(len(text)), wanted, OUTPUTS
    )


def test_flat_and_nested_json() -> None:
    nested = [[[VALUES[0:2], VALUES[2:4]]], [[VALUES[4:6], VALUES[6:8]]]]
    for data in (VALUES, nested):
        request = read(message(data=data))
        assert request.images.dtype == np.float32
        assert request.images.tolist() == nested
        assert request.id == "7"
        assert request.outputs == {"scores": False, "labels": False}


def test_raw_bytes() -> None:
    raw = struct.pack("<8f", *VALUES)
    request = read(message(data=None, parameters={"binary_data_size": 32}), raw)
    assert request.images.ravel().tolist() == VALUES
    pixels = TensorInfo("images", "UINT8", (-1, 1, 2, 2))
    tensor = message(data=None, datatype="UINT8", parameters={"binary_data_size": 8})
    assert read(tensor, bytes(range(248, 256)), pixels).images.ravel().tolist() == list(
        range(248, 256)
    )
    assert (
        read(
            message(data=[0, 1, 2, 3, 4, 5, 254, 255], datatype="UINT8"), None, pixels
        ).images.max()
        == 255
    )


def test_which_outputs_in_which_form() -> None:
    assert read({**message(), "parameters": {"binary_data_output": True}}).outputs == {
        "scores": True,
        "labels": True,
    }
    assert read({**message(), "outputs": [{"name": "labels"}]}).outputs == {"labels": False}
    binary = {"name": "scores", "parameters": {"binary_data": True}}
    assert read({**message(), "outputs": [binary]}).outputs == {"scores": True}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "must be a JSON object; got a list"),
        ({"inputs": []}, "exactly one input"),
        ({**message(), "id": 7}, "id must be a string; got 7"),
        (message(name="x"), "input name must be 'images'; got 'x'"),
        (message(datatype="FP64"), "input datatype must be 'FP32'; got 'FP64'"),
        (message(shape=[2, 4]), r"shape \[-1, 1, 2, 2\], -1 for any; got \[2, 4\]"),
        (message(shape=[0, 1, 2, 2], data=[]), "must have shape"),
        (message(shape=[2, 1, 2, "2"]), "must have shape"),
        (message(shape=None), "must have shape"),
        (message(data=VALUES[:7]), "data must be 8 numbers .* got 7"),
        (message(data=["a"] * 8), "data must be numbers"),
        (message(data=[[1.0], [1.0, 2.0]]), "data must be numbers"),
        (message(data=None), "data must be"),
        (message(parameters={"binary_data_size": 32}), "either data or binary_data_size"),
        (message(data=None, parameters={"binary_data_size": 32}), "got 32, but 0 bytes follow"),
        (message(parameters=[]), "parameters must be an object"),
        (
            {**message(), "outputs": [{"name": "logits"}]},
            "the outputs are scores, labels; got 'logits'",
        ),
        ({**message(), "outputs": ["scores"]}, "outputs must be a list of objects"),
    ],
)
def test_refused(content: object, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        read(content)
    assert refused.value.status == 400


def test_refused_bytes() -> None:
    with pytest.raises(Refused, match="not JSON"):
        read_request(b"{", None, INPUT, OUTPUTS)
    for length in ("x", "-1", "99"):
        with pytest.raises(Refused, match=HEADER_LENGTH):
            read_request(b"{}", length, INPUT, OUTPUTS)
    for size in (28, 36):
        with pytest.raises(Refused, match="binary_data_size must be 32"):
            read(message(data=None, parameters={"binary_data_size": size}), bytes(size))
    pixels = TensorInfo("images", "UINT8", (-1, 1, 2, 2))
    for value in (-1, 256, 0.5):
        with pytest.raises(Refused, match="whole numbers from 0 to 255"):
            read(message(datatype="UINT8", data=[value] * 8), None, pixels)


def test_answers() -> None:
    request = read(
        {
            **message(),
            "outputs": [
                {"name": "scores", "parameters": {"binary_data": True}},
                {"name": "labels"},
            ],
        }
    )
    outputs = {"scores": np.array([[0.5, 0.25]], np.float32), "labels": np.array([[3, 1]])}
    body, headers = write_answer("api", request, outputs)
    length = int(headers[HEADER_LENGTH])
    assert headers["Content-Type"] == "application/octet-stream"
    assert json.loads(body[:length]) == {
        "model_name": "api",
        "model_version": "1",
        "id": "7",
        "outputs": [
            {
                "name": "scores",
                "datatype": "FP32",
                "shape": [1, 2],
                "parameters": {"binary_data_size": 8},
            },
            {"name": "labels", "datatype": "INT64", "shape": [1, 2], "data": [3, 1]},
        ],
    }
    assert body[length:] == struct.pack("<2f", 0.5, 0.25)

    body, headers = write_answer("api", Request(None, request.images, {"scores": False}), outputs)
    assert headers == {"Content-Type": "application/json"}
    assert "id" not in json.loads(body)


def test_metadata_and_configuration() -> None:
    assert INPUT.metadata() == {"name": "images", "datatype": "FP32", "shape": [-1, 1, 2, 2]}
    assert INPUT.config(batched=True) == {
        "name": "images",
        "data_type": "TYPE_FP32",
        "dims": [1, 2, 2],
    }
    assert INPUT.config(batched=False)["dims"] == [-1, 1, 2, 2]
