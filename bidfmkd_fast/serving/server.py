"""Run the service on a port of this machine, until interrupted or for the time of a block."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.extras import not_installed

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from bidfmkd_fast.serving.application import ABORT, Service
except ImportError as error:
    raise not_installed("serve", error.name, "serve") from None

__all__ = ["Service", "running", "serve_until_interrupted"]


class _Protocol(H11Protocol):
    """The HTTP protocol of uvicorn, but the application can cut a connection without an answer."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        app = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, ABORT: self.transport.abort}, receive, send)

        self.app = with_abort


class _Server(uvicorn.Server):
    """The server of uvicorn, but an interrupt cuts open requests instead of waiting for them."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.force_exit = True
        # Without this uvicorn would log each request that is cut.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def serve_until_interrupted(service: Service, port: int, announce: Callable[[str], None]) -> None:
    """Serve on 127.0.0.1 until Ctrl-C.

    `announce` gets a line with the models and their address as soon as connections are accepted.

    Raises:
        InputError: the port is not available.
        KeyboardInterrupt: at Ctrl-C.
    """
    with _listening(port) as listener:
        names = ", ".join(service.models)
        models = "1 model" if len(service.models) == 1 else f"{len(service.models)} models"
        announce(f"{models} at {_url(listener)}/v2: {names}; Ctrl-C ends it")
        _server(service).run(sockets=[listener])


@contextmanager
def running(service: Service, port: int = 0) -> Iterator[str]:
    """Serve in a thread while the block runs, and give the block the URL; port 0 means a free port.

    Leaving the block cuts open requests, as the end of a server process would.

    Raises:
        InputError: the port is not available.
    """
    with _listening(port) as listener:
        server = _server(service)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="serving", daemon=True
        )
        thread.start()
        try:
            # The listener accepts connections from the start; they wait until the thread runs.
            yield _url(listener)
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"serve: port {port} of 127.0.0.1 is not available: {error}; use another --port"
        ) from None


def _url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _server(service: Service) -> uvicorn.Server:
    config = uvicorn.Config(
        service.app, http=_Protocol, log_level="warning", access_log=False, lifespan="off"
    )
    return _Server(config)
