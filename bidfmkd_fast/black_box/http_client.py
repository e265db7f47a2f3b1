"""HTTP by urllib3: pooled connections, its own retries with every attempt announced, tokens from the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry, Timeout

from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may be gone at the next attempt
_DAY = 86_400  # seconds; sockets and sleeps cannot take every number that YAML can write
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class CountedRetry(Retry):
    """urllib3's `Retry` that announces each repeated attempt, and gives up where a service asks for a long wait."""

    attempt: Callable[[], None] = staticmethod(lambda: None)
    longest_wait = 60.0

    def new(self, **kw: Any) -> CountedRetry:
        following = super().new(**kw)
        following.attempt, following.longest_wait = self.attempt, self.longest_wait
        return following

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        asked = self.get_retry_after(response) if response is not None else None
        if asked is not None and asked > self.longest_wait:
            raise APIUnavailable(f"it asks to wait {asked:.0f} s (Retry-After), longer than {self.longest_wait:g} s")
        super().sleep(response)
        self.attempt()


class HTTPClient:
    """One service over HTTP. Safe under threads.

    Args:
        name: what errors call the API.
        url: `http://` or `https://`, without user and password. TLS certificates are verified.
        token_variable: environment variable that holds a bearer token; it is read for each request and never stored.
        headers: more headers, nothing secret.
        timeout: seconds to wait for an answer (to connect, at most 10).
        retries: how often a request is repeated after 408, 425, 429, 5xx, a dropped connection or a time-out.
        backoff: seconds before the second repetition, doubled for each one after it up to 30, with as much jitter.
        longest_wait: the longest `Retry-After` that is waited for, in seconds; a longer one ends the request.
        connections: the most at once.
        ca_file: certificates to trust instead of the system's.

    Raises:
        InputError: a URL that cannot be used, a token that is not in the environment or would go out unencrypted.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        token_variable: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
        longest_wait: float = 60.0,
        connections: int = 4,
        ca_file: str | None = None,
    ) -> None:
        parts = split_url(name, url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{name}: url must be http://host... or https://host...; got {url!r}")
        if parts.username or parts.password:
            raise InputError(f"{name}: url must hold no user or password; put a token into the environment")
        check_token(name, url, parts.scheme == "https", token_variable)
        check_timeout(name, timeout)
        self.name, self.url, self._token_variable = name, url.rstrip("/"), token_variable
        self._headers = dict(headers or {})
        self._retry = retry_policy(name, retries, backoff, longest_wait)
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            block=True,
            cert_reqs="CERT_REQUIRED",
            ca_certs=ca_file,
            timeout=Timeout(connect=min(10.0, timeout), read=timeout),
        )

    def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        attempt: Callable[[], None],
        *,
        final: Collection[int] = (),
    ) -> BaseHTTPResponse:
        """The answer to a POST, whatever its status; one of `final` is not asked again.

        Raises:
            APIUnavailable: no answer came, or only ones that ask to come again later.
        """
        return self._send("POST", path, body, headers, attempt, final)

    def get_json(self, path: str) -> Any:
        """The JSON answer to a GET; None where there is nothing (404, 405, 501).

        Raises:
            APIUnavailable: no answer came. BadAnswer: it is no JSON.
        """
        response = self._send("GET", path, None, {}, lambda: None)
        if response.status in (404, 405, 501):
            return None
        self.check_status(response)
        return self.read_json(response.data)

    def check_status(self, response: BaseHTTPResponse) -> None:
        """Raises APIUnavailable, with what the service says, unless the status is 200."""
        if response.status != 200:
            raise APIUnavailable(f"{self.name}: the service answered {response.status}: {self.said(response.data)}")

    def read_json(self, data: bytes) -> Any:
        """`data` as JSON; BadAnswer if it is none."""
        try:
            return json.loads(data)
        except ValueError:
            raise BadAnswer(f"{self.name}: the service must answer JSON; it answered {self.said(data)}") from None

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        attempt: Callable[[], None],
        final: Collection[int] = (),
    ) -> BaseHTTPResponse:
        again = AGAIN - set(final)
        retry = self._retry.new(status_forcelist=again)
        retry.attempt = attempt
        tried = 1 + int(self._retry.total or 0)
        attempt()
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=body,
                headers={**self._headers, **headers, **self._authorization()},
                retries=retry,
                redirect=False,
            )
        except MaxRetryError as error:
            raise APIUnavailable(f"{self.name}: no answer in {tried} attempts: {_reason(error)}") from None
        except HTTPError as error:
            raise APIUnavailable(f"{self.name}: no answer: {_reason(error)}") from None
        except APIUnavailable as error:
            raise APIUnavailable(f"{self.name}: {error}") from None
        if response.status in again:
            message = f"{self.name}: the service answered {response.status} to the last of {tried} attempts"
            raise APIUnavailable(f"{message}: {self.said(response.data)}")
        return response

    def said(self, data: bytes, most: int = 200) -> str:
        """What the service said, in one short line, without our token."""
        text = " ".join(data[: 4 * most].decode("utf-8", "replace").split())
        token = os.environ.get(self._token_variable or "", "").strip()
        text = text.replace(token, "<token>") if token else text
        return repr(text[:most]) if text else "nothing more"

    def _authorization(self) -> dict[str, str]:
        return bearer(self.name, self._token_variable)


def split_url(name: str, url: str) -> SplitResult:
    """The parts of a URL. Raises InputError, without showing any of it, where it cannot be taken apart."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its message may hold a password that stands where the port should be
        wanted = "scheme://host:port, with an IPv6 address in brackets and a port of at most 65535"
        raise InputError(f"{name}: url cannot be read; wanted {wanted}") from None
    return parts


def check_timeout(name: str, timeout: object) -> None:
    """Raises InputError unless `timeout` is a number of seconds above 0 and of a day at most."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= _DAY:  # type: ignore[operator]
        raise InputError(f"{name}: timeout must be a number of seconds above 0, at most {_DAY:,}; got {timeout!r}")


def check_token(name: str, url: str, secure: bool, variable: str | None) -> None:
    """Raises InputError for a token that is not in the environment, or would leave this machine unencrypted."""
    bearer(name, variable)
    if variable is not None and not secure and urlsplit(url).hostname not in _LOOPBACK:
        raise InputError(f"{name}: a token is sent encrypted only (or to loopback); got {url!r}")


def bearer(name: str, variable: str | None) -> dict[str, str]:
    """The header with the token in an environment variable; none without a variable."""
    if variable is None:
        return {}
    token = os.environ.get(variable, "").strip()
    if not token:
        raise InputError(f"{name}: the environment variable {variable} must hold the token; it is not set")
    return {"Authorization": f"Bearer {token}"}


def retry_policy(name: str, retries: int, backoff: float, longest_wait: float) -> CountedRetry:
    """How often and after what pauses a request is repeated; see `HTTPClient`. Raises InputError for bad numbers."""
    for what, value in (("backoff", backoff), ("longest_wait", longest_wait)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _DAY:
            raise InputError(f"{name}: {what} must be a number of seconds from 0 to {_DAY:,}; got {value!r}")
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise InputError(f"{name}: retries must be an integer of at least 0; got {retries!r}")
    policy = CountedRetry(
        total=retries,
        allowed_methods=None,  # POST too: asking twice for scores changes nothing but the bill, which is counted
        status_forcelist=AGAIN,
        backoff_factor=backoff,
        backoff_max=30,
        backoff_jitter=backoff,
        raise_on_status=False,
        redirect=False,
    )
    policy.longest_wait = longest_wait
    return policy


def _reason(error: HTTPError) -> str:
    cause = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
    return " ".join(str(cause).split())[:200]
