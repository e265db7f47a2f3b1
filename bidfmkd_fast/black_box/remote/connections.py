"""Pool urllib3 connections that another thread can cut, however silent the other end is."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import Any

import urllib3
from urllib3 import connection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from bidfmkd_fast.secrets import ScrubFilter

_local = threading.local()
# These modules log URLs with the query string, which may hold a secret.
for _module in ("connection", "connectionpool"):
    logging.getLogger(f"urllib3.{_module}").addFilter(ScrubFilter())


class Line:
    """The connection that one request uses, so that another thread can cut it."""

    def __init__(self) -> None:
        self._handle: socket.socket | None = None
        self._is_cut = False

    def use(self) -> None:
        """Follow the request that the current thread is about to send."""
        _local.line = self

    def hold(self, handle: socket.socket | None) -> None:
        """Note the socket in use; cut it at once if the request was given up before it opened."""
        self._handle = handle
        if self._is_cut:
            self.cut()

    def cut(self) -> None:
        """Shut the connection down, so that whatever waits on it fails or ends at once."""
        self._is_cut = True
        if self._handle is not None:
            with contextlib.suppress(OSError):  # the other end has closed it already
                self._handle.shutdown(socket.SHUT_RDWR)


class _Cuttable:
    """Mixin for urllib3's connections that reports the socket in use to the thread's `Line`.

    The handle is a duplicate of the socket, because TLS replaces the connection's socket object
    during its handshake.
    """

    _handle: socket.socket | None = None

    def _new_conn(self) -> socket.socket:
        opened: socket.socket = super()._new_conn()  # type: ignore[misc]
        self._handle = opened.dup()
        self._report()
        return opened

    def request(self, *arguments: Any, **options: Any) -> None:
        self._report()
        super().request(*arguments, **options)  # type: ignore[misc]

    def close(self) -> None:
        super().close()  # type: ignore[misc]
        if self._handle is not None:
            self._handle.close()

    def _report(self) -> None:
        line: Line | None = getattr(_local, "line", None)
        if line is not None:
            line.hold(self._handle)


class HTTPConnection(_Cuttable, connection.HTTPConnection):
    """The HTTP connection of urllib3, made cuttable. Errors show the name, so it is urllib3's."""


class HTTPSConnection(_Cuttable, connection.HTTPSConnection):
    """The HTTPS connection of urllib3, made cuttable. Errors show the name, so it is urllib3's."""


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = HTTPConnection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = HTTPSConnection


def connection_pools(
    proxy: tuple[str, dict[str, str]] | None, **options: Any
) -> urllib3.PoolManager:
    """Return urllib3's pools of connections that a `Line` can cut.

    Args:
        proxy: URL of the proxy to go through and the headers for it; None for direct connections.
        options: as for `PoolManager`.
    """
    if proxy is None:
        pools = urllib3.PoolManager(**options)
    else:
        pools = urllib3.ProxyManager(proxy[0], proxy_headers=proxy[1], **options)
    pools.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return pools
