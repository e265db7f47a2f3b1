"""Check that any answer of a service becomes scores, or one error in one line with its name."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidfmkd_fast.black_box import APISpec, JSONBlackBox, RemoteBlackBox
from bidfmkd_fast.black_box.remote import v2_messages as v2
from bidfmkd_fast.black_box.remote.reading import short
from bidfmkd_fast.black_box.remote.retries import seconds_asked
from bidfmkd_fast.errors import APIUnavailable, BadAnswer
from bidfmkd_fast.files.atomic import write_text

N, SHAPE = 3, (1, 4, 4)
SPEC = APISpec(N, SHAPE, name="cats")
IMAGES = torch.zeros(2, *SHAPE)
QUICK: dict[str, Any] = {"backoff": 0.0, "retries": 1, "timeout": 60}
FORMS = ("v2 binary", "v2 json", "json")
DEEP = b"[" * 100_000 + b"]" * 100_000
LONG = b"1" + b"0" * 400


def box(form: str, server: Any, **options: Any) -> RemoteBlackBox | JSONBlackBox:
    if form == "json":
        return JSONBlackBox(server.url, SPEC, "tf_serving", **QUICK, **options)
    server.serve_v2(lambda images: images, list(SHAPE), N)
    return RemoteBlackBox(
        server.url, "m", SPEC, transport=form.removeprefix("v2 "), **QUICK, **options
    )


def outcome(api: RemoteBlackBox | JSONBlackBox) -> torch.Tensor | str:
    """Return finite scores, or the text of an error after which a run continues."""
    try:
        scores = api(IMAGES)
    except (APIUnavailable, BadAnswer) as error:
        text = str(error)
        assert text.startswith("cats: ") and "\n" not in text and len(text) < 1000
        return text
    assert scores.shape == (2, N) and scores.isfinite().all()
    return scores


def output(**changes: Any) -> bytes:
    return json.dumps(
        {"outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 3], **changes}]}
    ).encode()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"predictions": ' + DEEP + b"}",
        b'{"predictions": [[1, 2, ' + LONG + b"], [1, 2, 3]]}",
        b'{"predictions": [[1, 2, ' + b"9" * 10_000 + b"], [1, 2, 3]]}",
        b'{"predictions": [[1, 2, 1e400], [1, 2, 3]]}',
        b'{"predictions": [{"a": 1}, {"b": 2}]}',
        b'{"predictions": [["a", "b", "c"], ["d", "e", "f"]]}',
        b'{"predictions": [[null, null, null], [1, 2, 3]]}',
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, '
        + LONG
        + b"]}]}",
        output(data=[1, 2, 3, 4, 5, 1e300]),
        output(data=[{"a": 1}] * 6),
        output(data=["a"] * 6),
        output(data=[None] * 6),
        output(data={"a": 1}),
        output(data="text"),
        output(data=[1] * 6, shape=[2, "x"]),
        output(data=[1] * 6, shape=[10**30, 3]),
        output(data=[1] * 6, shape={"a": 1}),
        output(data=[1] * 6, shape=None),
        output(parameters={"binary_data_size": -5}),
        output(parameters={"binary_data_size": "24"}),
        output(parameters={"binary_data_size": 10**30}),
        output(parameters=None),
        output(parameters={"binary_data_size": 0}, datatype="FP128"),
        b'{"outputs": {"y": 1}}',
        b'{"outputs": [1, 2]}',
        b'{"id": {"a": [1]}, "outputs": []}',
        b"null",
        b"3",
        b"[]",
        b"",
        b"\xff\xfe\x00",
        b"\x00" * 100,
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_odd_bodies(server: Any, form: str, body: bytes) -> None:
    api = box(form, server)
    server.post = lambda sent: (200, {}, body)
    assert isinstance(outcome(api), str)
    assert api.ledger.answered_requests == 0


odd_value = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**400, 10**401)
    | st.floats()
    | st.text(max_size=5)
)
odd_json = st.recursive(
    odd_value,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
odd_data = st.lists(odd_value | odd_json, min_size=6, max_size=6) | odd_json
WHATEVER = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@WHATEVER
@given(
    value=odd_json,
    data=odd_data,
    field=st.sampled_from(("name", "datatype", "shape", "parameters", "data")),
)
@pytest.mark.parametrize("form", FORMS[::2])
def test_any_value_in_a_tensor_or_a_list(
    server: Any, form: str, value: Any, data: Any, field: str
) -> None:
    tensor: Any = {"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [0.0] * 6}
    tensor[field] = data if field == "data" else value
    predictions = [data[:3], data[3:]] if isinstance(data, list) else data
    api = box(form, server)
    server.post = lambda sent: (
        200,
        {},
        json.dumps({"outputs": [tensor], "predictions": predictions}).encode(),
    )
    outcome(api)


@WHATEVER
@given(
    value=odd_json,
    field=st.sampled_from(("output", "outputs", "id", "all")),
    length=st.integers(-(10**6), 10**6),
)
@pytest.mark.parametrize("form", FORMS[::2])
def test_any_value_as_the_answer(
    server: Any, form: str, value: Any, field: str, length: int
) -> None:
    answer: Any = {"outputs": [value]} if field == "output" else {"outputs": [], field: value}
    body = json.dumps(value if field == "all" else answer).encode()
    api = box(form, server)
    server.post = lambda sent: (200, {v2.HEADER_LENGTH: str(length)}, body)
    assert isinstance(outcome(api), str)


@WHATEVER
@given(
    value=odd_json | st.lists(odd_value, max_size=4),
    limit=odd_value,
    field=st.sampled_from(("name", "datatype", "shape", "input", "inputs", "outputs", "all")),
)
def test_any_metadata(server: Any, value: Any, limit: Any, field: str) -> None:
    """Change the metadata, which may happen while a run is under way."""
    api = box("v2 json", server)
    metadata = server.get["/v2/models/m"]
    if field in ("name", "datatype", "shape"):
        for tensors in (metadata["inputs"], metadata["outputs"]):
            tensors[0][field] = value
    elif field == "input":
        metadata["inputs"] = [value]
    elif field == "all":
        server.get["/v2/models/m"] = value
    else:
        metadata[field] = value
    server.get["/v2/models/m/config"] = {"max_batch_size": limit}
    server.post = lambda sent: (200, {}, b"")
    assert isinstance(outcome(api), str)


@pytest.mark.parametrize(
    "retry_after", ["0.5", "", "-5", " 0 ", "nonsense", "1,2", "nan", "0x10", "Mon, 99 Foo"]
)
def test_odd_retry_after_is_no_obstacle(server: Any, retry_after: str) -> None:
    answers = iter(
        [
            (429, {"Retry-After": retry_after}, b""),
            (200, {}, b'{"predictions": [[1, 2, 3], [4, 5, 6]]}'),
        ]
    )
    server.post = lambda sent: next(answers)
    assert isinstance(outcome(box("json", server)), torch.Tensor)


@pytest.mark.parametrize(
    "retry_after", ["Fri, 01 Jan 2099 00:00:00 GMT", "9" * 5000, "1e300", "inf", "3600.5"]
)
def test_a_far_retry_after_ends_the_request(server: Any, retry_after: str) -> None:
    server.post = lambda sent: (429, {"Retry-After": retry_after}, b"")
    result = outcome(box("json", server))
    assert isinstance(result, str) and "longer than 60 s" in result and len(server.posts) == 1


def test_seconds_asked() -> None:
    assert [seconds_asked(text) for text in ("0.5", "7", "-5", "", "soon")] == [
        0.5,
        7,
        0,
        None,
        None,
    ]
    assert seconds_asked("Fri, 01 Jan 1999 00:00:00 GMT") == 0
    assert seconds_asked("Fri, 01 Jan 9999999 00:00:00 GMT") is None


@pytest.fixture
def raw() -> Iterator[tuple[Any, list[Callable[[socket.socket], None]]]]:
    """Serve raw sockets: after a request, its connection goes to the last function of a list."""
    answers: list[Callable[[socket.socket], None]] = []

    class Address:
        url = ""

    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        Address.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.settimeout(60)

        def serve(connection: socket.socket) -> None:
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(2**16)
                head, _, body = request.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                while len(body) < length:
                    body += connection.recv(2**16)
                try:
                    answers[-1](connection)
                except OSError:
                    return  # the client has gone

        def accept() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve, args=[connection], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield Address, answers


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate, gzip, br, zstd\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n: \r\n\x00\r\nno colon\r\n\r\n{}",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 999 What\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: \r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: http://[::1\r\n\r\n",
    ],
)  # fmt: skip
def test_odd_http(raw: Any, answer: bytes) -> None:
    where, answers = raw
    answers.append(lambda connection: connection.sendall(answer))
    assert isinstance(outcome(box("json", where)), str)


def drip(first: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(b" ")
            time.sleep(0.1)

    return answer


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nX:",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n",
    ],
)
def test_a_service_that_drips_has_a_deadline(raw: Any, first: bytes) -> None:
    """Send each byte in time, but never the whole answer."""
    where, answers = raw
    answers.append(drip(first))
    api = JSONBlackBox(where.url, SPEC, "tf_serving", backoff=0.0, retries=1, timeout=0.5)
    at = time.monotonic()
    assert outcome(api) == "cats: no answer in 2 attempts: no whole answer within 0.5 s"
    assert time.monotonic() - at < 20
    assert (api.ledger.requests, api.ledger.answered_requests) == (2, 0)
    good = b'{"predictions": [[1, 2, 3], [4, 5, 6]]}'
    answers.append(lambda connection: connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + good))
    api._client._timeout = 60
    assert isinstance(outcome(api), torch.Tensor)  # its connections are free again


def test_a_small_answer_that_decompresses_to_a_large_one(server: Any) -> None:
    bomb = gzip.compress(b" " * 2**26, 9)
    assert len(bomb) < 2**17
    server.post = lambda sent: (200, {"Content-Encoding": "gzip"}, bomb)
    assert outcome(box("json", server)) == "cats: the service answered more than 16 MiB"
    assert len(server.posts) == 1
    good = gzip.compress(b'{"predictions": [[1, 2, 3], [4, 5, 6]]}')
    server.post = lambda sent: (200, {"Content-Encoding": "gzip"}, good)
    assert isinstance(outcome(box("json", server)), torch.Tensor)


def test_a_large_answer_of_many_scores_is_read(server: Any) -> None:
    spec = APISpec(30_000, SHAPE, name="cats")
    row = [0.0] * 30_000
    body = json.dumps({"predictions": [row, row]}).encode() + b" " * (2**24)
    server.post = lambda sent: (200, {}, body)
    assert JSONBlackBox(server.url, spec, "tf_serving", **QUICK)(IMAGES).shape == (2, 30_000)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "words", [b"<html><title>quota used up</title>", b'{"error": "quota used up"}']
)
def test_the_services_own_words_are_shown(server: Any, form: str, words: bytes) -> None:
    api = box(form, server)
    server.post = lambda sent: (200, {}, words)
    result = outcome(api)
    assert isinstance(result, str) and "quota used up" in result


def test_words_that_no_terminal_and_no_file_takes(tmp_path: Path) -> None:
    words = short("a \ud800 \x1b[31m \x00 \u202e é\nb", 200)
    assert words == r"a \ud800 \x1b[31m \x00 \u202e é b"
    write_text(tmp_path / "report.md", "half a pair: \ud800")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == r"half a pair: \ud800"


def test_a_redirect_names_its_target_without_secrets(server: Any) -> None:
    target = "https://me:PASSWORD@elsewhere/score?key=KEY1234"
    server.post = lambda sent: (308, {"Location": target}, b"")
    result = outcome(box("json", server))
    assert isinstance(result, str)
    assert "answered 308 and names 'https://<secret>@elsewhere/score?<secret>'" in result


@pytest.mark.parametrize("binary", [True, False])
def test_scores_with_axes_of_one(server: Any, seed: int, binary: bool) -> None:
    """Answer `[N, C, 1, 1]`, as image models do without a last reshape."""
    wanted = np.random.default_rng(seed).normal(size=(2, N)).astype(np.float32)

    def post(sent: Any) -> Any:
        tensor: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": [2, N, 1, 1]}
        if binary:
            head = json.dumps(
                {"outputs": [tensor | {"parameters": {"binary_data_size": wanted.nbytes}}]}
            ).encode()
            return 200, {v2.HEADER_LENGTH: str(len(head))}, head + wanted.tobytes()
        return (
            200,
            {},
            json.dumps({"outputs": [tensor | {"data": wanted.ravel().tolist()}]}).encode(),
        )

    server.serve_v2(lambda images: images, list(SHAPE), N)
    server.get["/v2/models/m"]["outputs"][0]["shape"] = [-1, N, 1, 1]
    server.post = post
    api = RemoteBlackBox(server.url, "m", transport="binary" if binary else "json", **QUICK)
    assert api.spec.n_classes == N
    torch.testing.assert_close(api(IMAGES), torch.from_numpy(wanted))


def test_bf16_scores(server: Any) -> None:
    wanted = torch.tensor([[1.5, -2.0, 3.140625], [0.0, -1e-3, 1e30]]).to(torch.bfloat16)
    raw_bytes = wanted.view(torch.int16).numpy().astype("<i2").tobytes()

    def post(sent: Any) -> Any:
        tensor = {
            "name": "y",
            "datatype": "BF16",
            "shape": [2, N],
            "parameters": {"binary_data_size": len(raw_bytes)},
        }
        head = json.dumps({"outputs": [tensor]}).encode()
        return 200, {v2.HEADER_LENGTH: str(len(head))}, head + raw_bytes

    server.serve_v2(lambda images: images, list(SHAPE), N)
    server.get["/v2/models/m"]["outputs"][0]["datatype"] = "BF16"
    server.post = post
    assert torch.equal(RemoteBlackBox(server.url, "m", SPEC, **QUICK)(IMAGES), wanted.float())
