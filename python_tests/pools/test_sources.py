"""Load pools that list local, ONNX and remote APIs, and check what their lists may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bidfmkd_fast.black_box import (
    GrpcBlackBox,
    JSONBlackBox,
    OnnxBlackBox,
    RemoteBlackBox,
    TorchBlackBox,
)
from bidfmkd_fast.data import make_glyphs
from bidfmkd_fast.errors import APIUnavailable, InputError
from bidfmkd_fast.pools import load_modules, load_pool, read_pool, train_pool

SPEC: dict[str, Any] = {"n_classes": 3, "image_shape": [1, 28, 28], "data_set": "glyphs"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    train_pool(make_glyphs(), folder, n_apis=2, n_way=3, width=4, epochs=1, progress=False)
    return folder


def pool_of(trained: Path, folder: Path, *more: dict[str, Any]) -> Path:
    """Return a copy of the pool with more APIs in its list."""
    folder.mkdir(exist_ok=True)
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = yaml.safe_load((folder / "pool.yaml").read_text())
    content["apis"] += more
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_all_kinds_in_one_list(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL_TOKEN", "s3cret")
    remote = {
        "kind": "remote",
        "url": "http://127.0.0.1:9",
        "model": "m1",
        "spec": SPEC,
        "inverted": True,
    }
    more = [
        {
            **remote,
            "in_flight": 2,
            "images_per_second": 100,
            "token_variable": "POOL_TOKEN",
            "transport": "binary",
        },
        {
            "kind": "json",
            "url": "http://127.0.0.1:9/score",
            "mapping": "tf_serving",
            "spec": {**SPEC, "name": "tf"},
        },
    ]
    folder = pool_of(trained, tmp_path / "pool", *more)
    apis = load_pool(folder)  # nothing is sent: the servers are not there
    assert [type(api) for api in apis] == [
        TorchBlackBox,
        TorchBlackBox,
        RemoteBlackBox,
        JSONBlackBox,
    ]
    assert [api.name for api in apis] == ["api_000", "api_001", "m1", "tf"]
    pool = read_pool(folder)
    assert [entry.data_set for entry in pool.entries] == ["glyphs"] * 4
    assert [entry.inverted for entry in pool.entries] == [False, False, True, False]
    assert len(pool.accuracies) == 2 and 0 <= pool.accuracy <= 1
    with pytest.raises(
        InputError, match="API 2 of .* is of kind 'remote'; only local APIs can be opened"
    ):
        load_modules(folder)


def test_grpc_and_onnx(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 28, 28])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 784])
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["scores"])], "flat", [images], [scores]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    more = [
        {"kind": "grpc", "url": "grpc://127.0.0.1:9", "model": "m2", "spec": SPEC},
        {"kind": "onnx", "file": "flat.onnx"},
    ]
    folder = pool_of(trained, tmp_path / "pool", *more)
    onnx.save(model, folder / "flat.onnx")
    apis = load_pool(folder)
    assert [type(api) for api in apis[2:]] == [GrpcBlackBox, OnnxBlackBox]
    sent = torch.rand(2, 1, 28, 28)
    assert torch.equal(apis[3](sent), sent.flatten(1))


REMOTE = {"kind": "remote", "url": "http://127.0.0.1:9", "model": "m", "spec": SPEC}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "soap"}, "API 2: kind must be one of remote, grpc, json, onnx"),
        ({"kind": ["json"]}, "API 2: kind must be one of remote, grpc, json, onnx"),
        ({"kind": {"json": 1}}, "API 2: kind must be one of remote, grpc, json, onnx"),
        (
            {**REMOTE, "requests_per_second": 1e-300},
            "requests_per_second must be above 0 and finite, at least one a day",
        ),
        ({**REMOTE, "spec": {**SPEC, "name": "a\nb\x1b[31m"}}, "name must be one line of text"),
        ({"kind": "remote", "url": "http://h"}, "API 2: an API of kind 'remote' needs model"),
        ({"kind": "onnx"}, "needs file"),
        ({**REMOTE, "spec": 3}, "spec must map fields of APISpec; got 3"),
        (
            {**REMOTE, "spec": {**SPEC, "colour": 1}},
            "API 2: unknown key 'spec.colour'; known: spec.n_classes, ",
        ),
        (
            {**REMOTE, "spec": {**SPEC, "image_shape": [3, 10**5, 10**5]}},
            "at most 67,108,864 .*, 30,000,000,000",
        ),
        (
            {**REMOTE, "spec": {**SPEC, "n_classes": 1}},
            "API 2: APISpec: n_classes must be at least 2",
        ),
        (
            {**REMOTE, "token": "s3cret"},
            "API 2: unknown option 'token'; did you mean 'token_variable'",
        ),
        ({**REMOTE, "headers": "s3cret"}, "API 2: headers must be of type .*Mapping.*; got str"),
        (
            {**REMOTE, "timeout": float("inf")},
            "API 2: m: timeout must be a number of seconds above 0, at most 86,400",
        ),
        ({**REMOTE, "timeout": "long"}, "API 2: timeout must be of type float; got str"),
        (
            {**REMOTE, "backoff": float("inf")},
            "API 2: m: backoff must be a number of seconds from 0 to 86,400",
        ),
        (
            {**REMOTE, "in_flight": 10**6},
            "API 2: m: in_flight must be at most 1024; got 1000000",
        ),
        (
            # Without n_classes the server is asked first, which fills a pool of connections.
            {**REMOTE, "spec": {}, "in_flight": 10**6},
            "API 2: m: in_flight must be at most 1024; got 1000000",
        ),
        (
            {**REMOTE, "spec": {**SPEC, "std": [0.5]}},
            r"API 2: APISpec: mean and std go together.*; got std=\(0.5,\) alone; give mean",
        ),
        ({**REMOTE, "retries": 10**9}, "API 2: m: retries must be at most 100; got 1000000000"),
        (
            {**REMOTE, "images_per_second": float("inf")},
            "images_per_second must be above 0 and finite",
        ),
        (
            {**REMOTE, "url": "http://[::1"},
            "API 2: m: url must be http://host",
        ),
        ({**REMOTE, "url": "http://h:99999"}, "API 2: m: url must be http://host"),
        ({**REMOTE, "url": "http://h:s3cret"}, "API 2: m: url must be http://host"),
        ({**REMOTE, "url": 3}, "API 2: url must be of type str; got int"),
        ({**REMOTE, 5: 3}, "API 2: keys must be text; got 5"),
        ({**REMOTE, "spec": {**SPEC, "name": "api_000"}}, "APIs 0 and 2 are both called 'api_000'"),
        (
            {"kind": "onnx", "file": "../../x.onnx"},
            "API 2: file must lie in the pool's folder; got '../../x.onnx'",
        ),
        ({"kind": "onnx", "file": "/x.onnx"}, "API 2: file must lie in the pool's folder"),
        (
            {"kind": "onnx", "file": "x.onnx", "path": "y"},
            "unknown option 'path'; known: file, providers",
        ),
        ({**REMOTE, "inverted": "no"}, "inverted must be of type bool"),
        ({**REMOTE, "url": "ftp://h"}, "API 2: m: url must be http"),
        (
            {"kind": "json", "url": "http://h", "mapping": "tf_serving"},
            "needs n_classes and image_shape in its spec",
        ),
        (
            {"kind": "json", "url": "http://h", "mapping": "soap", "spec": SPEC},
            "API 2: api_002: mapping must be one of",
        ),
        (
            {"kind": "onnx", "file": "nowhere.onnx", "spec": SPEC},
            "there is no file|onnxruntime is not installed",
        ),
    ],
)
def test_entries_that_do_not_fit(
    trained: Path, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    folder = pool_of(trained, tmp_path / "pool", entry)
    with pytest.raises(InputError, match=message) as raised:
        load_pool(folder)
    assert "s3cret" not in str(raised.value) and "\n" not in str(raised.value)


def test_two_services_of_one_name_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = pool_of(trained, tmp_path / "pool", REMOTE, {**REMOTE, "url": "http://127.0.0.1:10"})
    with pytest.raises(
        InputError,
        match="APIs 2 and 3 are both called 'm'; give one of them another name in its spec",
    ):
        load_pool(folder)
    folder = pool_of(
        trained, tmp_path / "pool", REMOTE, {**REMOTE, "spec": {**SPEC, "name": "other"}}
    )
    assert [api.name for api in load_pool(folder)[2:]] == ["m", "other"]


@pytest.mark.parametrize("kind", ["remote", "json", "grpc"])
def test_every_argument_of_a_black_box_is_an_option(
    trained: Path, tmp_path: Path, kind: str
) -> None:
    """Check that at least the documented arguments are known options of the list."""
    if kind == "grpc":
        pytest.importorskip("tritonclient.grpc")
    url = "grpc://127.0.0.1:9" if kind == "grpc" else "http://127.0.0.1:9"
    entry: dict[str, Any] = {
        "kind": kind,
        "url": url,
        "spec": {**SPEC, "name": "m"},
        "retries": 1,
        "timeout": 3,
    }
    entry |= {
        "backoff": 0.5,
        "in_flight": 2,
        "images_per_second": 5,
        "requests_per_second": 1.5,
        "ca_file": None,
    }
    entry |= {"mapping": "tf_serving"} if kind == "json" else {"model": "m", "version": "1"}
    entry |= {} if kind == "grpc" else {"longest_wait": 3, "headers": {"a": "b"}}
    assert load_pool(pool_of(trained, tmp_path / "pool", entry))[2].name == "m"


def test_a_server_that_has_to_tell_the_spec_must_be_there(trained: Path, tmp_path: Path) -> None:
    entry = {"kind": "remote", "url": "http://127.0.0.1:9", "model": "m", "retries": 0}
    with pytest.raises(APIUnavailable, match="m: no answer"):
        load_pool(pool_of(trained, tmp_path / "pool", entry))
