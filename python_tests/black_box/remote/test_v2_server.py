"""Check how models of a server are listed and which of them are taken for models of images."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bidfmkd_fast.black_box.remote.v2_messages import ServerMismatch, V2Model
from bidfmkd_fast.black_box.remote.v2_server import V2Server, image_spec, server_address
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v2/", "http://127.0.0.1:8000"),
        ("https://Models.Example.test/a/V2/v2", "https://models.example.test/a/V2"),
        ("https://models.example.test/a//", "https://models.example.test/a"),
    ],
)
def test_an_address_ends_with_its_path(given: str, wanted: str) -> None:
    assert server_address(given) == wanted


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "url must be http://host:port or https://host; got '127.0.0.1:8000'"),
        ("grpc://127.0.0.1:8001", "url must be http://host:port"),
        ("http://me:pass-word@host", "no user or password"),
        ("http://host/?key=pass-word", r"got 'http://host/\?<secret>' with more behind it"),
        ("http://host#pass-word", "with more behind it"),
    ],
)
def test_addresses_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        V2Server(url)
    assert "pass-word" not in str(raised.value)


def listing(*models: dict[str, Any]) -> Any:
    return lambda sent: (200, {}, json.dumps(models).encode())


def test_models_are_listed_with_their_states(server: Any) -> None:
    server.post = listing(
        {"name": "cats", "version": "1", "state": "UNAVAILABLE"},
        {"name": "cats", "version": "2", "state": "READY"},
        {"name": "dogs", "version": "1", "state": "READY"},
        {"name": "dogs", "version": "2", "state": "LOADING"},
        {"name": "owls", "state": "LOADING"},
        {"name": "rays"},
    )
    states = {"cats": "", "dogs": "", "owls": "LOADING", "rays": "not loaded"}
    assert V2Server(f"{server.url}/v2").models() == states
    assert [sent.path for sent in server.posts] == ["/v2/repository/index"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"does not list its models \(.*: 404\); name them \(model\)$"),
        (405, r"405\); name them \(model\)$"),
        (403, r"403\); name them \(model\), or the environment variable that .*token_variable\)$"),
    ],
)
def test_a_server_without_an_index(server: Any, status: int, message: str) -> None:
    server.post = lambda sent: (status, {}, b"no")
    with pytest.raises(InputError, match=message):
        V2Server(server.url).models()


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"models": ["a"]}', b'[{"title": "a"}]', b'[{"name": 3}]', b"7"]
)
def test_an_index_that_is_none(server: Any, body: bytes) -> None:
    server.post = lambda sent: (200, {}, body)
    with pytest.raises(BadAnswer, match=server.url) as raised:
        V2Server(server.url).models()
    assert "\n" not in str(raised.value)


def test_a_token_is_sent_and_a_refusal_names_its_variable(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATS_TOKEN", "s3cret")
    server.post = lambda sent: (400, {}, sent.headers["Authorization"].encode())
    with pytest.raises(APIUnavailable, match="answered 400: 'Bearer <token>'"):
        V2Server(server.url, "CATS_TOKEN").models()
    with pytest.raises(InputError, match="a token is sent encrypted only"):
        V2Server("http://example.test", "CATS_TOKEN")


def test_a_model_that_is_not_there(server: Any) -> None:
    assert V2Server(server.url).read("a/b ü") is None
    assert server.gets == ["/v2/models/a%2Fb%20%C3%BC"]


def model(datatype: str, shape: list[int], *outputs: tuple[str, list[int]], **config: Any) -> Any:
    metadata = {
        "inputs": [{"name": "x", "datatype": datatype, "shape": shape}],
        "outputs": [
            {"name": f"y{number}", "datatype": kind, "shape": size}
            for number, (kind, size) in enumerate(outputs or [("FP32", [-1, 5])])
        ],
    }
    return V2Model.read("m", metadata, config)


@pytest.mark.parametrize(
    ("described", "wanted"),
    [
        (model("FP32", [-1, 3, 32, 40]), ((3, 32, 40), "NCHW", "float32", None)),
        (model("UINT8", [-1, 32, 40, 1]), ((1, 32, 40), "NHWC", "uint8", None)),
        (model("FP32", [1, 1, 28, 28]), ((1, 28, 28), "NCHW", "float32", 1)),
        (
            model("FP32", [-1, 1, 28, 28], ("FP16", [-1, 5, 1, 1]), max_batch_size=8),
            ((1, 28, 28), "NCHW", "float32", 8),
        ),
    ],
)
def test_models_of_images(described: V2Model, wanted: Any) -> None:
    spec = image_spec("m", described)
    assert (spec.image_shape, spec.layout, spec.dtype, spec.max_batch) == wanted
    assert (spec.n_classes, spec.name) == (5, "m")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (model("FP32", [-1, 128]), r"m: it takes FP32 \[-1, 128\], and images are"),
        (model("FP32", [-1, 8, 3, 32, 32]), "and images are"),
        (model("BYTES", [-1, 1]), "if these are picture files, write its entry by hand"),
        (model("FP32", [-1, 3, -1, -1]), "leaves their size open"),
        (model("FP32", [-1, 16, 32, 32]), "pictures have 1 or 3 channels"),
        (model("FP32", [-1, 1, 2, 28]), "sides of at least 4"),
        (model("FP32", [8, 3, 32, 32]), "exactly 8 images a request"),
        (model("FP16", [-1, 3, 32, 32]), "the server takes FP16, the spec sends FP32"),
        (model("FP32", [-1, 3, 32, 32], ("FP32", [-1, -1])), r"it gives FP32 \[-1, -1\], where"),
        (model("FP32", [-1, 3, 32, 32], ("FP32", [-1, 5, 32, 32])), "where one output of scores"),
        (
            model("FP32", [-1, 3, 32, 32], ("FP32", [-1, 2]), ("INT64", [-1, 2])),
            r"it gives FP32 \[-1, 2\], INT64 \[-1, 2\], where .* best classes only",
        ),
        (model("FP32", [-1, 3, 32, 32], ("INT64", [-1, 5])), "answers labels only"),
    ],
)
def test_models_that_are_left_out(described: V2Model, message: str) -> None:
    with pytest.raises(ServerMismatch, match=message):
        image_spec("m", described)
