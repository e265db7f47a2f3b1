"""Check that the environment's proxies are used for other hosts, and never for this machine."""

from __future__ import annotations

import base64
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from bidfmkd_fast.black_box import APISpec, JSONBlackBox
from bidfmkd_fast.black_box.remote.proxies import is_loopback, proxy_of
from bidfmkd_fast.errors import APIUnavailable, InputError

SPEC = APISpec(3, (1, 4, 4), name="cats")
IMAGES = torch.zeros(1, 1, 4, 4)
QUICK: dict[str, Any] = {"backoff": 0.0, "retries": 0, "timeout": 30}
VARIABLES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]


@dataclass
class Proxy:
    """A proxy that connects every request to `target`, and notes the requests."""

    url: str = ""
    target: tuple[str, int] = ("127.0.0.1", 0)
    asked: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *map(str.upper, VARIABLES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._note()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with socket.create_connection(made.target) as target:
                path = urlsplit(self.path).path
                head = f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
                target.sendall(head.encode() + body)
                while part := target.recv(2**16):
                    self.wfile.write(part)

        def do_CONNECT(self) -> None:
            self._note()
            with socket.create_connection(made.target) as target:
                self.wfile.write(b"HTTP/1.0 200 go on\r\n\r\n")
                other = {target: self.connection, self.connection: target}
                while True:
                    for source in select.select(list(other), [], [], 30)[0]:
                        part = source.recv(2**16)
                        if not part:
                            return
                        other[source].sendall(part)

        def _note(self) -> None:
            made.asked.append(f"{self.command} {self.path}")
            made.authorizations.append(self.headers["Proxy-Authorization"])

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    made.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield made
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def answer(server: Any, proxy: Proxy) -> None:
    server.post = lambda sent: (200, {}, b'{"predictions": [[1, 2, 3]]}')
    proxy.target = ("127.0.0.1", urlsplit(server.url).port or 0)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_http_by_a_proxy(
    server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    answer(server, proxy)
    monkeypatch.setenv(variable, proxy.url)
    api = JSONBlackBox("http://scores.test/classify", SPEC, "tf_serving", **QUICK)
    assert api(IMAGES).tolist() == [[1, 2, 3]]
    assert proxy.asked == ["POST http://scores.test/classify"] and proxy.authorizations == [None]


def test_https_by_a_tunnel(server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check only that a tunnel was requested, since the target here does not support TLS."""
    answer(server, proxy)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(APIUnavailable, match="cats: no answer in 1 attempts"):
        JSONBlackBox("https://scores.test/classify", SPEC, "tf_serving", **QUICK)(IMAGES)
    assert proxy.asked == ["CONNECT scores.test:443"]


def test_a_password_of_a_proxy_is_sent_and_never_shown(
    server: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.post = lambda sent: (403, {}, b"PASS/WORD " + base64.b64encode(b"me:PASS/WORD"))
    proxy.target = ("127.0.0.1", urlsplit(server.url).port or 0)
    monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("http://", "me:PASS%2FWORD@"))
    with pytest.raises(APIUnavailable, match="answered 403: '<secret> <secret>'"):
        JSONBlackBox("http://scores.test/classify", SPEC, "tf_serving", **QUICK)(IMAGES)
    assert proxy.authorizations == ["Basic " + base64.b64encode(b"me:PASS/WORD").decode()]


def test_this_machine_is_asked_directly(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    server.post = lambda sent: (200, {}, b'{"predictions": [[1, 2, 3]]}')
    port = urlsplit(server.url).port
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.0.0.1", "0"):
        assert JSONBlackBox(f"http://{host}:{port}", SPEC, "tf_serving", **QUICK)(
            IMAGES
        ).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("", "scores.test", False),
        ("scores.test", "scores.test", True),
        (".test,other", "scores.test", True),
        ("test", "scores.test", True),
        ("core.test", "score.test", False),
        ("*", "scores.test", True),
        ("10.0.0.0/8, 192.168.1.1", "10.1.2.3", True),
        ("10.0.0.0/8, 192.168.1.1", "192.168.1.1", True),
        ("10.0.0.0/8, nonsense/99", "11.1.2.3", False),
        ("", "127.9.9.9", True),
        ("", "[::1]", True),
        ("", "me.localhost", True),
        ("", "127.1", True),
        ("", "2130706433", True),
        ("", "LocalHost.", True),
        ("", "[::ffff:127.0.0.1]", True),
        ("", "10.1", False),
        ("10.0.0.0/8", "10.1", True),
        ("10.0.0.0/8", "[::ffff:10.0.0.1]", True),
    ],
)
def test_no_proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: str, host: str, direct: bool) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    found = proxy_of("cats", urlsplit(f"https://{host}/score"))
    assert found is None if direct else found == ("http://proxy.test:3128", {})


@pytest.mark.parametrize(
    "proxy_url", ["socks5://me:PASSWORD@host:1", "http://me:PASSWORD@[::1", "http://host:port"]
)
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy_url: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy_url)
    with pytest.raises(
        InputError, match="cats: the proxy for https in the environment must be http://"
    ) as raised:
        JSONBlackBox("https://scores.test", SPEC, "tf_serving")
    assert "PASSWORD" not in str(raised.value)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.2", "127.1", "127.0.1", "0x7f.1", "0177.0.0.1", "2130706433"),
        *("::1", "0:0:0:0:0:0:0:1", "::1%lo", "::ffff:127.0.0.1", "::ffff:7f00:1"),
        *("localhost", "LOCALHOST", "localhost.", "me.localhost", "me.localhost."),
        *("0.0.0.0", "0", "::"),
    ],
)
def test_loopback_in_every_spelling(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        *("128.0.0.1", "128.1", "127", "1", "21307064330", "fe80::1", "::ffff:10.0.0.1", "::2"),
        *("localhost.test", "notlocalhost", "127.0.0.1.test", "127.0.0.1 scores.test"),
        *("scores.test", "", None),
    ],
)
def test_other_hosts_are_no_loopback(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for lookup in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, lookup, lambda *_: pytest.fail("a name was looked up"))
    assert not is_loopback(host)
