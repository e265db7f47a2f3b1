"""Stop waits for a silent service, for a pause and for a rate limit.

Each ends soon, and leaves no thread or connection behind.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, JSONBlackBox, RemoteBlackBox
from bidfmkd_fast.black_box.remote.rate_limit import RateLimit
from bidfmkd_fast.runtime import interrupt

SPEC = APISpec(3, (1, 4, 4), name="cats")
IMAGES = torch.zeros(2, 1, 4, 4)
SOON = 2.0  # seconds


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    interrupt.reset()


@pytest.fixture
def silent() -> Iterator[tuple[str, socket.socket]]:
    """Yield the address and the socket of a port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}", listener


def ends_soon(work: Callable[[], Any], started: threading.Event | None = None) -> BaseException:
    """Return the error that ends `work` after `interrupt_all`, which must be soon."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if started is None:
        time.sleep(0.3)
    else:
        assert started.wait(60)
    assert not errors
    at = time.monotonic()
    interrupt.interrupt_all()
    thread.join(60)
    assert time.monotonic() - at < SOON and errors
    return errors[0]


def boxes(address: str) -> list[Callable[[], BlackBox]]:
    options: dict[str, Any] = {"timeout": 300, "retries": 0}
    return [
        lambda: JSONBlackBox(f"http://{address}", SPEC, "tf_serving", **options),
        lambda: JSONBlackBox(
            f"https://{address}", SPEC, "tf_serving", **options
        ),  # silent in TLS's handshake
        lambda: RemoteBlackBox(
            f"http://{address}", "m", SPEC, **options
        ),  # silent when its metadata are asked for
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_silent_service(silent: tuple[str, socket.socket], number: int) -> None:
    address, listener = silent
    connected = threading.Event()
    accepted: list[socket.socket] = []

    def accept() -> None:
        accepted.append(listener.accept()[0])
        connected.set()

    threading.Thread(target=accept, daemon=True).start()
    api = boxes(address)[number]()
    assert isinstance(ends_soon(lambda: api(IMAGES), connected), interrupt.Interrupted)
    with accepted[0] as connection:  # it is closed: a service may stop working for it
        connection.settimeout(60)
        while connection.recv(2**16):
            pass
    with pytest.raises(interrupt.Interrupted):  # nothing new is begun
        api(IMAGES)
    if number < 2:
        assert (api.ledger.requests, api.ledger.answered_requests) == (1, 0)


def test_a_silent_grpc_service(silent: tuple[str, socket.socket]) -> None:
    pytest.importorskip("tritonclient.grpc")
    from bidfmkd_fast.black_box import GrpcBlackBox

    api = GrpcBlackBox(f"grpc://{silent[0]}", "m", SPEC, timeout=300, retries=0)
    assert isinstance(ends_soon(lambda: api(IMAGES)), interrupt.Interrupted)


def test_pauses_between_attempts(server: Any) -> None:
    asked = threading.Event()

    def post(sent: Any) -> Any:
        asked.set()
        return 503, {"Retry-After": "50"}, b""

    server.post = post
    api = JSONBlackBox(server.url, SPEC, "tf_serving")
    assert isinstance(ends_soon(lambda: api(IMAGES), asked), interrupt.Interrupted)
    assert len(server.posts) == 1


def test_the_pace_and_what_it_held_back(server: Any) -> None:
    server.post = lambda sent: (200, {}, b'{"predictions": [[1, 2, 3], [1, 2, 3]]}')
    budget = Budget()
    api = JSONBlackBox(server.url, SPEC, "tf_serving", images_per_second=0.01, budget=budget)
    api(IMAGES)
    assert isinstance(ends_soon(lambda: api(IMAGES)), interrupt.Interrupted)
    assert budget.queries == api.ledger.queries == 2  # what was never sent is not spent


def test_a_rate_limit_without_a_service() -> None:
    limit = RateLimit(requests_per_second=0.01)
    limit.wait(1)
    assert isinstance(ends_soon(lambda: [limit.wait(1), limit.wait(1)]), interrupt.Interrupted)


def test_ctrl_c_in_the_thread_that_asks(silent: tuple[str, socket.socket]) -> None:
    """Press Ctrl-C without a call of `interrupt_all`, as in a notebook."""
    api = JSONBlackBox(f"http://{silent[0]}", SPEC, "tf_serving", timeout=300)
    timer = threading.Timer(
        0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
    )
    at = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        api(IMAGES)
    assert time.monotonic() - at < 0.3 + SOON
    assert not interrupt.current().is_set()


def test_ctrl_c_gives_back_what_was_not_sent(silent: tuple[str, socket.socket]) -> None:
    budget = Budget()
    spec = APISpec(3, (1, 4, 4), name="cats", max_batch=2)
    url = f"http://{silent[0]}"
    api = JSONBlackBox(url, spec, "tf_serving", timeout=300, in_flight=1, budget=budget)
    timer = threading.Timer(
        0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
    )
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        api(torch.zeros(6, 1, 4, 4))
    assert (budget.queries, budget.requests) == (api.ledger.queries, api.ledger.requests) == (2, 1)
