"""Run a server on loopback whose answers a test scripts, and note what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

DROP = "drop"  # close the connection without an answer


@dataclass
class Sent:
    """A POST request as the server received it."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class ScriptedServer:
    """A server with scripted answers.

    `get` maps paths to JSON answers; `post` answers a `Sent` with (status, headers, body), or with
    `DROP`.
    """

    url: str = ""
    get: dict[str, Any] = field(default_factory=dict)
    post: Callable[[Sent], Any] = lambda sent: (200, {}, b"{}")
    posts: list[Sent] = field(default_factory=list)
    gets: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def serve_v2(
        self,
        score: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
        shape: list[int],
        n_classes: int,
        *,
        model: str = "m",
        datatype: str = "FP32",
        extensions: list[str] | None = None,
        config: dict[str, Any] | None = None,
        fault: Callable[[int, Sent], Any] = lambda number, sent: None,
    ) -> None:
        """Serve one model by the v2 protocol; `fault` gets each request and may answer instead."""
        inputs = [{"name": "x", "datatype": datatype, "shape": [-1, *shape]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, n_classes]}]
        self.get["/v2"] = {
            "name": "scripted",
            "extensions": ["binary_tensor_data"] if extensions is None else extensions,
        }
        self.get[f"/v2/models/{model}"] = {"name": model, "inputs": inputs, "outputs": outputs}
        if config is not None:
            self.get[f"/v2/models/{model}/config"] = config

        def post(sent: Sent) -> Any:
            with self.lock:
                number = len(self.posts) - 1
            special = fault(number, sent)
            if special is not None:
                return special
            return answer_v2(sent, score)

        self.post = post


def read_v2(sent: Sent) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Read header and images of a v2 request, independently of the client's code."""
    length = sent.headers.get("Inference-Header-Content-Length")
    header = json.loads(sent.body if length is None else sent.body[: int(length)])
    tensor = header["inputs"][0]
    dtype = {"FP32": np.float32, "UINT8": np.uint8}[tensor["datatype"]]
    if length is None:
        return header, np.array(tensor["data"], dtype).reshape(tensor["shape"])
    raw = sent.body[int(length) :]
    assert tensor["parameters"]["binary_data_size"] == len(raw)
    return header, np.frombuffer(raw, dtype).reshape(tensor["shape"])


def answer_v2(
    sent: Sent, score: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], **changes: Any
) -> Any:
    header, images = read_v2(sent)
    scores = score(images).astype(np.float32)
    output: dict[str, Any] = {
        "name": "y",
        "datatype": "FP32",
        "shape": list(scores.shape),
    } | changes
    answer = {"model_name": "m", "id": header["id"], "outputs": [output]}
    if not header["outputs"][0]["parameters"]["binary_data"]:
        output["data"] = scores.ravel().tolist()
        return 200, {}, json.dumps(answer).encode()
    output["parameters"] = {"binary_data_size": scores.nbytes}
    text = json.dumps(answer).encode()
    return 200, {"Inference-Header-Content-Length": str(len(text))}, text + scores.tobytes()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            scripted.gets.append(self.path)
            if self.path in scripted.get:
                self._answer(200, {}, json.dumps(scripted.get[self.path]).encode())
            else:
                self._answer(404, {}, b'{"error": "not here"}')

        def do_POST(self) -> None:
            sent = Sent(
                self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))
            )
            with scripted.lock:
                scripted.posts.append(sent)
            answer = scripted.post(sent)
            if answer == DROP:
                self.close_connection = True
                self.connection.close()
            else:
                self._answer(*answer)

        def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    scripted.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield scripted
    httpd.shutdown()
    httpd.server_close()
    thread.join()
