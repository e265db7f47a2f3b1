"""Check RemoteBlackBox against a scripted server: messages, counts and failures."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import torch

from bidfmkd_fast.black_box import APISpec, Budget, RemoteBlackBox
from bidfmkd_fast.black_box.remote.v2_messages import V2Model
from bidfmkd_fast.errors import (
    APIUnavailable,
    BadAnswer,
    BudgetExhausted,
    InputError,
    ServiceWarning,
)

SHAPE, N = (1, 4, 4), 3
SPEC = APISpec(N, SHAPE, name="cats")
QUICK: dict[str, Any] = {"backoff": 0.0, "timeout": 30}


def score(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return three numbers of each image, so that answers in a wrong order are noticed."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat[:, 0], flat.mean(1), flat[:, -1] * 2], axis=1)


def images_of(n: int, seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def header_of(sent: Any) -> Any:
    return json.loads(
        sent.body[: int(sent.headers.get("Inference-Header-Content-Length", len(sent.body)))]
    )


def check(scores: torch.Tensor, images: torch.Tensor) -> None:
    torch.testing.assert_close(scores, torch.from_numpy(score(images.numpy())).float())


def counts(api: RemoteBlackBox) -> tuple[int, int, int, int]:
    ledger = api.ledger
    return ledger.queries, ledger.requests, ledger.answered_queries, ledger.answered_requests


@pytest.mark.parametrize("transport", ["binary", "json", "auto"])
def test_scores_in_order_over_several_requests(server: Any, seed: int, transport: str) -> None:
    server.serve_v2(score, list(SHAPE), N, config={"max_batch_size": 4})
    api = RemoteBlackBox(server.url, "m", SPEC, transport=transport, in_flight=3, **QUICK)
    assert server.gets == []  # nothing is sent before the first question
    images = images_of(10, seed)
    check(api(images), images)
    assert counts(api) == (10, 3, 10, 3)
    assert len(server.posts) == 3 and {sent.path for sent in server.posts} == {"/v2/models/m/infer"}
    binary = ["Inference-Header-Content-Length" in sent.headers for sent in server.posts]
    assert all(binary) if transport != "json" else not any(binary)
    bodies = [
        json.loads(
            sent.body[: int(sent.headers.get("Inference-Header-Content-Length", len(sent.body)))]
        )
        for sent in server.posts
    ]
    assert len({body["id"] for body in bodies}) == 3
    assert sorted(body["inputs"][0]["shape"][0] for body in bodies) == [3, 3, 4]


def test_the_spec_may_come_from_the_server(server: Any, seed: int) -> None:
    server.serve_v2(score, [8, 6, 3], N, datatype="UINT8", config={"max_batch_size": 8})
    api = RemoteBlackBox(
        server.url, "m", {"scores_kind": "logits", "class_names": ["a", "b", "c"]}, **QUICK
    )
    wanted = APISpec(
        N,
        (3, 8, 6),
        class_names=("a", "b", "c"),
        name="m",
        layout="NHWC",
        dtype="uint8",
        max_batch=8,
    )
    assert api.spec == wanted
    images = images_of(2, seed, (3, 8, 6))
    sent = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    torch.testing.assert_close(api(images), torch.from_numpy(score(sent)).float())
    resampled = RemoteBlackBox(server.url, "m", {"image_shape": (1, 4, 4)}, **QUICK)
    assert resampled.spec.server_shape == (3, 8, 6)
    assert resampled(images_of(1, seed)).shape == (1, N)


def test_what_the_server_wants_otherwise_is_told(server: Any) -> None:
    server.serve_v2(score, [3, 4, 4], N)
    with pytest.raises(
        InputError, match=r"cats: the server takes images \[3, 4, 4\], the spec sends \[1, 4, 4\]"
    ):
        RemoteBlackBox(server.url, "m", SPEC, **QUICK)(images_of(1, 0))
    server.serve_v2(score, list(SHAPE), N, datatype="UINT8")
    with pytest.raises(InputError, match="takes UINT8, the spec sends FP32; use dtype='uint8'"):
        RemoteBlackBox(server.url, "m", SPEC, **QUICK)(images_of(1, 0))
    server.get["/v2/models/m"]["outputs"] = [{"name": "label", "datatype": "INT64", "shape": [-1]}]
    with pytest.raises(InputError, match="labels only .*a label alone gives no gradient"):
        RemoteBlackBox(server.url, "m", APISpec(N, SHAPE, dtype="uint8"), **QUICK)(images_of(1, 0))
    assert server.posts == []


def test_faults_are_retried_and_every_attempt_counts(server: Any, seed: int) -> None:
    faults = [(503, {}, b""), "drop", (429, {"Retry-After": "0"}, b""), None, (500, {}, b""), None]
    server.serve_v2(score, list(SHAPE), N, fault=lambda number, sent: faults[number])
    budget = Budget()
    api = RemoteBlackBox(server.url, "m", SPEC, budget=budget, in_flight=1, **QUICK)
    images = images_of(5, seed)
    check(api(images), images)
    assert counts(api) == (20, 4, 5, 1)
    check(api(images), images)
    assert counts(api) == (30, 6, 10, 2) and (budget.queries, budget.requests) == (30, 6)
    assert len(server.posts) == 6


def test_retries_are_paid_and_a_budget_ends_them(server: Any) -> None:
    server.serve_v2(score, list(SHAPE), N, fault=lambda number, sent: (503, {}, b""))
    api = RemoteBlackBox(server.url, "m", SPEC, budget=Budget(max_queries=11), **QUICK)
    with pytest.raises(BudgetExhausted, match="5 more queries wanted, 1 of 11 left"):
        api(images_of(5, 0))
    assert counts(api) == (10, 2, 0, 0) and len(server.posts) == 2


def test_a_dead_server_and_one_that_says_why(server: Any) -> None:
    api = RemoteBlackBox("http://127.0.0.1:9", "m", SPEC, retries=2, **QUICK)
    with pytest.raises(APIUnavailable, match="cats: no answer in 3 attempts"):
        api(images_of(1, 0))
    server.serve_v2(
        score, list(SHAPE), N, fault=lambda number, sent: (503, {}, b'{"error": "out of memory"}')
    )
    api = RemoteBlackBox(server.url, "m", SPEC, retries=1, **QUICK)
    with pytest.raises(
        APIUnavailable,
        match="cats: the service answered 503 to the last of 2 attempts.*out of memory",
    ):
        api(images_of(1, 0))
    assert counts(api) == (2, 2, 0, 0)
    with pytest.raises(
        APIUnavailable, match="cats: the server at .* has no model at /v2/models/other"
    ):
        RemoteBlackBox(server.url, "other", SPEC, **QUICK)(images_of(1, 0))


def test_a_long_retry_after_is_not_waited_for(server: Any) -> None:
    server.serve_v2(
        score, list(SHAPE), N, fault=lambda number, sent: (429, {"Retry-After": "3600"}, b"")
    )
    api = RemoteBlackBox(server.url, "m", SPEC, **QUICK)
    with pytest.raises(
        APIUnavailable, match=r"cats: it asks to wait 3600 s \(Retry-After\), longer than 60 s"
    ):
        api(images_of(1, 0))
    assert len(server.posts) == 1


def test_a_short_retry_after_is_waited_for(
    server: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("bidfmkd_fast.black_box.remote.retries.pause", waits.append)
    fault = lambda number, sent: (429, {"Retry-After": "7"}, b"") if number == 0 else None  # noqa: E731
    server.serve_v2(score, list(SHAPE), N, fault=fault)
    images = images_of(1, seed)
    check(RemoteBlackBox(server.url, "m", SPEC, **QUICK)(images), images)
    assert waits == [7]


def test_a_hidden_batch_limit_is_found_by_halving(server: Any, seed: int) -> None:
    def fault(number: int, sent: Any) -> Any:
        too_large = header_of(sent)["inputs"][0]["shape"][0] > 3
        return (400, {}, b'{"error": "batch too large"}') if too_large else None

    server.serve_v2(score, list(SHAPE), N, fault=fault)
    api = RemoteBlackBox(server.url, "m", SPEC, in_flight=1, **QUICK)
    images = images_of(10, seed)
    check(api(images), images)  # 10 and 5 and 5 are refused, then 3, 2, 3, 2
    assert counts(api) == (30, 7, 10, 4)
    check(api(images), images)
    assert api.ledger.requests == api.ledger.answered_requests + 3 == 11
    server.post = lambda sent: (400, {}, b'{"error": "no such thing"}')
    with pytest.raises(APIUnavailable, match="cats: the server answered 400: .*no such thing"):
        api(images)


@pytest.mark.parametrize("status", [500, 400, 501])
def test_json_where_binary_is_refused_with_a_warning(server: Any, seed: int, status: int) -> None:
    def fault(number: int, sent: Any) -> Any:
        return (status, {}, b"") if "Inference-Header-Content-Length" in sent.headers else None

    server.serve_v2(score, list(SHAPE), N, extensions=["statistics"], fault=fault)
    api = RemoteBlackBox(server.url, "m", SPEC, **QUICK)
    images = images_of(3, seed)
    with pytest.warns(
        ServiceWarning, match=f"cats: the server answered {status} to binary tensors.*JSON"
    ):
        check(api(images), images)
    assert counts(api) == (6, 2, 3, 1)
    check(api(images), images)  # no more warnings
    assert counts(api) == (9, 3, 6, 2)


def test_no_binary_request_where_no_extension_is_listed(server: Any, seed: int) -> None:
    server.serve_v2(score, list(SHAPE), N, extensions=[])
    api, images = RemoteBlackBox(server.url, "m", SPEC, **QUICK), images_of(3, seed)
    with pytest.warns(ServiceWarning, match="cats: the server lists no extension; JSON is used"):
        check(api(images), images)
    assert counts(api) == (3, 1, 3, 1)


@pytest.mark.parametrize("extensions", [[], ["binary_tensor_data"]])
def test_an_explicit_transport_never_falls_back(server: Any, extensions: list[str]) -> None:
    server.serve_v2(
        score, list(SHAPE), N, extensions=extensions, fault=lambda number, sent: (500, {}, b"")
    )
    api = RemoteBlackBox(server.url, "m", SPEC, transport="binary", retries=1, **QUICK)
    with pytest.raises(APIUnavailable, match="answered 500 to the last of 2"):
        api(images_of(1, 0))
    assert all("Inference-Header-Content-Length" in sent.headers for sent in server.posts)


def test_a_listed_extension_means_binary_whatever_happens_first(server: Any, seed: int) -> None:
    server.serve_v2(
        score, list(SHAPE), N, fault=lambda number, sent: (500, {}, b"") if number == 0 else None
    )
    images = images_of(1, seed)
    check(RemoteBlackBox(server.url, "m", SPEC, **QUICK)(images), images)
    assert all("Inference-Header-Content-Length" in sent.headers for sent in server.posts)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda sent: (200, {}, b"<html>"), "does not follow the v2 protocol: JSONDecodeError"),
        (lambda sent: (200, {}, b'{"outputs": []}'), "the answer must hold y; it holds"),
        (lambda sent: (200, {}, b'{"id": "5", "outputs": []}'), "answered request '5'"),
        (
            lambda sent: (200, {}, b'{"outputs": [{"name": "y", "shape": [2, 3], "data": [1]}]}'),
            "ValueError",
        ),
        (
            lambda sent: (
                200,
                {},
                b'{"outputs": [{"name": "y", "shape": [1, 3], "data": [1, 2, 3]}]}',
            ),
            r"shape \[1, 3\]",
        ),
        (
            lambda sent: (
                200,
                {},
                b'{"outputs": [{"name": "y", "shape": [2, 3], "data": [1, 2, 3, NaN, 5, 6]}]}',
            ),
            "NaN or infinity",
        ),
        (
            lambda sent: (
                200,
                {"Inference-Header-Content-Length": "9"},
                b'{"outputs": [{"name": "y"}]}',
            ),
            "does not follow the v2 protocol",
        ),
    ],
)
def test_bad_answers_name_the_api_and_count_as_unanswered(
    server: Any, answer: Any, message: str
) -> None:
    server.serve_v2(score, list(SHAPE), N)
    server.post = answer
    api = RemoteBlackBox(server.url, "m", SPEC, **QUICK)
    with pytest.raises(BadAnswer, match=f"cats: .*{message}") as raised:
        api(images_of(2, 0))
    assert "\n" not in str(raised.value)
    assert counts(api) == (2, 1, 0, 0)


def test_a_failed_call_gives_back_what_was_not_sent(server: Any) -> None:
    server.serve_v2(score, list(SHAPE), N, config={"max_batch_size": 1})
    server.post = lambda sent: (403, {}, b"go away")
    budget = Budget()
    api = RemoteBlackBox(server.url, "m", SPEC, budget=budget, in_flight=1, **QUICK)
    with pytest.raises(APIUnavailable, match=r"answered 403: 'go away'; name the .*token_variable"):
        api(images_of(50, 0))
    assert budget.queries == api.ledger.queries == len(server.posts) < 50


def test_top_k_answers_with_labels(server: Any) -> None:
    server.serve_v2(score, list(SHAPE), N)
    server.get["/v2/models/m"]["outputs"] = [
        {"name": "p", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "l", "datatype": "INT64", "shape": [-1, 2]},
    ]

    def post(sent: Any) -> Any:
        outputs = [
            {"name": "l", "datatype": "INT64", "shape": [2, 2], "data": [2, 0, 1, 2]},
            {"name": "p", "datatype": "FP32", "shape": [2, 2], "data": [0.7, 0.2, 0.6, 0.3]},
        ]
        return 200, {}, json.dumps({"outputs": outputs}).encode()

    server.post = post
    api = RemoteBlackBox(server.url, "m", APISpec(N, SHAPE, scores_kind="top_k", top_k=2), **QUICK)
    torch.testing.assert_close(
        api(images_of(2, 0)), torch.tensor([[0.2, 0.1, 0.7], [0.1, 0.6, 0.3]])
    )
    with pytest.raises(BadAnswer, match="must answer top_k = 3 classes; it answered 2"):
        RemoteBlackBox(server.url, "m", APISpec(N, SHAPE, scores_kind="top_k", top_k=3), **QUICK)(
            images_of(2, 0)
        )


def test_tokens_come_from_the_environment_and_are_never_told(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="cats: the environment variable CATS_TOKEN must hold the token"
    ):
        RemoteBlackBox(server.url, "m", SPEC, token_variable="CATS_TOKEN", **QUICK)
    monkeypatch.setenv("CATS_TOKEN", "s3cret")
    server.serve_v2(score, list(SHAPE), N)
    api = RemoteBlackBox(server.url, "m", SPEC, token_variable="CATS_TOKEN", **QUICK)
    api(images_of(1, 0))
    assert server.posts[0].headers["Authorization"] == "Bearer s3cret"
    server.post = lambda sent: (401, {}, sent.headers["Authorization"].encode())
    with pytest.raises(
        APIUnavailable, match="401: 'Bearer <token>'; check .* CATS_TOKEN"
    ) as raised:
        api(images_of(1, 0))
    assert "s3cret" not in repr(raised.value) + repr(api) + repr(vars(api)) + repr(
        vars(api._client)
    )
    with pytest.raises(InputError, match="a token is sent encrypted only"):
        RemoteBlackBox("http://example.test", "m", SPEC, token_variable="CATS_TOKEN")


def test_redirects_are_not_followed(server: Any) -> None:
    server.serve_v2(score, list(SHAPE), N)
    server.post = lambda sent: (307, {"Location": "http://127.0.0.1:9/"}, b"")
    with pytest.raises(APIUnavailable, match="cats: the service answered 307"):
        RemoteBlackBox(server.url, "m", SPEC, **QUICK)(images_of(1, 0))


def test_requests_are_in_flight_together(server: Any, seed: int) -> None:
    together = threading.Barrier(3, timeout=60)

    def fault(number: int, sent: Any) -> Any:
        together.wait()  # answers only once three requests are there
        return None

    server.serve_v2(score, list(SHAPE), N, config={"max_batch_size": 2}, fault=fault)
    images = images_of(6, seed)
    check(RemoteBlackBox(server.url, "m", SPEC, in_flight=3, **QUICK)(images), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://host"}, "url must be http"),
        ({"url": "http://me:secret@host"}, "no user or password"),
        ({"transport": "grpc"}, "transport must be one of auto, binary, json"),
        ({"in_flight": 0}, "in_flight must be at least 1; got 0"),
        ({"in_flight": 1025}, "in_flight must be at most 1024; got 1025"),
        ({"in_flight": 2.0}, "in_flight must be an integer; got 2.0"),
        ({"in_flight": 1025, "spec": None}, "in_flight must be at most 1024; got 1025"),
        ({"retries": -1}, "cats: retries must be at least 0; got -1"),
        ({"retries": 101}, "cats: retries must be at most 100; got 101"),
        ({"retries": True}, "cats: retries must be an integer; got True"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"backoff": "1"}, "backoff must be a number of seconds"),
        ({"images_per_second": 0}, "images_per_second must be above 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        RemoteBlackBox(**{"url": "http://127.0.0.1:9", "model": "m", "spec": SPEC, **arguments})
    assert "secret" not in str(raised.value)


def test_bad_specs(server: Any) -> None:
    server.serve_v2(score, [-1, -1, -1], N)
    with pytest.raises(
        InputError, match="m: the server does not state image_shape; give it in the spec"
    ):
        RemoteBlackBox(server.url, "m", **QUICK)
    with pytest.raises(InputError, match="m: spec has no field colour"):
        RemoteBlackBox(server.url, "m", {"colour": 3}, **QUICK)
    with pytest.raises(
        InputError, match="m: spec must be an APISpec or a mapping of its fields; got int"
    ):
        RemoteBlackBox(server.url, "m", 3, **QUICK)  # type: ignore[arg-type]
    server.get["/v2/models/m"] = {"name": "m"}
    with pytest.raises(
        BadAnswer, match="m: the server must describe the model's inputs and outputs"
    ):
        RemoteBlackBox(server.url, "m", **QUICK)


@pytest.mark.parametrize(
    ("outputs", "tensor"),
    [
        ([("l", "INT64", [-1])], {"data": [2, 0, 1], "shape": [3]}),
        ([("l", "UINT8", [-1, 1])], {"data": [2, 0, 1], "shape": [3, 1]}),
        ([("l", "BYTES", [-1, 1])], {"data": ["owl", "cat", "dog"], "shape": [3, 1]}),
        ([("p", "FP32", [-1, N]), ("l", "INT32", [-1])], {"data": [2, 0, 1], "shape": [3]}),
        ([("l", "FP32", [-1, N])], {"data": [0, 0, 0.7, 1, 0, 0, 0, 0.5, 0.2], "shape": [3, N]}),
        ([("l", "INT32", [-1, N])], {"data": [0, 0, 1, 1, 0, 0, 0, 1, 0], "shape": [3, N]}),
    ],
)
def test_labels_alone(server: Any, outputs: list[Any], tensor: dict[str, Any]) -> None:
    server.serve_v2(score, list(SHAPE), N)
    server.get["/v2/models/m"]["outputs"] = [
        {"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in outputs
    ]
    given = {"name": "l", "datatype": {name: d for name, d, _ in outputs}["l"], **tensor}
    server.post = lambda sent: (200, {}, json.dumps({"outputs": [given]}).encode())
    spec = APISpec(N, SHAPE, scores_kind="labels", class_names=("cat", "dog", "owl"), name="cats")
    api = RemoteBlackBox(server.url, "m", spec, **QUICK)
    assert torch.equal(api(images_of(3, 0)), torch.eye(N)[[2, 0, 1]])
    assert header_of(server.posts[0])["outputs"][0]["name"] == "l"
    assert counts(api) == (3, 1, 3, 1)


@pytest.mark.parametrize(
    ("data", "datatype", "said"),
    [
        ([0, 3, 1], "INT64", "labels must be from 0 to 2; got 0 to 3"),
        ([0, 1], "INT64", r"as integers \[3\] or numbers \[3, 3\]; it answered torch.int64 \[2\]"),
        (["cat", "dog", "newt"], "BYTES", "labels must be among the spec's class_names; got newt"),
        ([0, 1, 10**30], "INT64", "labels must be among"),
    ],
)
def test_bad_labels(server: Any, data: list[Any], datatype: str, said: str) -> None:
    server.serve_v2(score, list(SHAPE), N)
    server.get["/v2/models/m"]["outputs"] = [{"name": "l", "datatype": datatype, "shape": [-1]}]
    given = {"name": "l", "datatype": datatype, "shape": [len(data)], "data": data}
    server.post = lambda sent: (200, {}, json.dumps({"outputs": [given]}).encode())
    spec = APISpec(N, SHAPE, scores_kind="labels", class_names=("cat", "dog", "owl"), name="cats")
    with pytest.raises(BadAnswer, match=f"cats: .*{said}"):
        RemoteBlackBox(server.url, "m", spec, **QUICK)(images_of(3, 0))


def test_a_model_of_two_labels_is_refused_before_it_is_asked(server: Any) -> None:
    server.serve_v2(score, list(SHAPE), N)
    server.get["/v2/models/m"]["outputs"] = [
        {"name": name, "datatype": "INT64", "shape": [-1]} for name in "ab"
    ]
    spec = APISpec(N, SHAPE, scores_kind="labels", name="cats")
    with pytest.raises(InputError, match="must have one output of labels"):
        RemoteBlackBox(server.url, "m", spec, **QUICK)(images_of(3, 0))
    assert server.posts == []


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        ({"scores_kind": {"string_value": "probabilities"}}, "probabilities"),
        ({"scores_kind": {"string_value": "labels"}}, None),
        ({"scores_kind": {"string_value": ["logits"]}}, None),
        ({"scores_kind": "logits"}, None),
        ([], None),
        (None, None),
    ],
)
def test_a_kind_of_scores_in_the_configuration(parameters: object, kind: str | None) -> None:
    """Check that a known kind is read, and that what other servers put there does no harm."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    metadata = {"inputs": [tensor | {"shape": [-1, 1, 4, 4]}], "outputs": [tensor]}
    model = V2Model.read("m", metadata, {"parameters": parameters})
    assert model.scores_kind == kind
    assert model.fields().get("scores_kind") == kind
