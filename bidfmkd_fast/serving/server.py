"""The service on a port of this machine: until interrupted, or in a thread for the time of a block."""

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
    """uvicorn's, that also lets the application break a connection off: what no answer of its own
    could show.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        app = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, ABORT: self.transport.abort}, receive, send)

        self.app = with_abort


class _Server(uvicorn.Server):
    """uvicorn's, that breaks off what is in flight when it is interrupted instead of waiting for
    it.
    """

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.force_exit = True
        logging.getLogger("uvicorn.error").setLevel(
            logging.CRITICAL
        )  # it would log each request that is broken off


def serve_until_interrupted(service: Service, port: int, announce: Callable[[str], None]) -> None:
    """Serve on 127.0.0.1; `announce` is told the models and their address once it takes
    connections.

    Raises `InputError` when the port cannot be had, `KeyboardInterrupt` at Ctrl-C.
    """
    with _listening(port) as listener:
        names = ", ".join(service.models)
        announce(f"{len(service.models)} models at {_url(listener)}/v2: {names}; Ctrl-C ends it")
        _server(service).run(sockets=[listener])


@contextmanager
def running(service: Service, port: int = 0) -> Iterator[str]:
    """Serve in a thread inside the block, which gets the URL; port 0 takes a free one.

    Leaving the block breaks off what is in flight, as a server that dies does.
    Raises `InputError` when the port cannot be had.
    """
    with _listening(port) as listener:
        server = _server(service)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="serving", daemon=True
        )
        thread.start()
        try:
            # The listener takes connections from the start; they wait until the thread gets to
            # them.
            yield _url(listener)
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"serve: port {port} of 127.0.0.1 cannot be had: {error}; give another --port"
        ) from None


def _url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _server(service: Service) -> uvicorn.Server:
    config = uvicorn.Config(
        service.app, http=_Protocol, log_level="warning", access_log=False, lifespan="off"
    )
    return _Server(config)
