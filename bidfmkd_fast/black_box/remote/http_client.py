"""HTTP by urllib3: pooled connections, tokens from the environment, every attempt announced and limited."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from urllib3.exceptions import (
    DecodeError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    SSLError,
    TimeoutError,
)
from urllib3.util import Timeout

from bidfmkd_fast import secrets
from bidfmkd_fast.black_box.remote.connections import Line, connection_pools
from bidfmkd_fast.black_box.remote.proxies import is_loopback, proxy_of
from bidfmkd_fast.black_box.remote.reading import parse_json, said, short
from bidfmkd_fast.black_box.remote.retries import DAY, retry_policy
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError
from bidfmkd_fast.runtime.interrupt import DeadlinePassed, wait_for

AGAIN = frozenset(
    {408, 425, 429, 500, 502, 503, 504}
)  # statuses that may be gone at the next attempt
MOST_BYTES = 2**24  # of an answer, decompressed
_PASSING = (NewConnectionError, ProtocolError, ProxyError, SSLError, TimeoutError)
_SENDABLE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Answer(NamedTuple):
    """A whole answer: status, headers (by names in any case) and decompressed body."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class HTTPClient:
    """One service over HTTP. Safe under threads.

    Args:
        name: what errors call the API.
        url: `http://` or `https://`, without user and password. TLS certificates are verified.
        token_variable: environment variable that holds a bearer token; it is read for each request
            and never stored.
        headers: more headers, nothing secret.
        timeout: seconds until a whole answer must be there, from the moment that the connection is
            begun (to connect, at most 10).
        retries: how often a request is repeated after 408, 425, 429, 5xx, a dropped connection or a
            time-out.
        backoff: seconds before the second repetition, doubled for each one after it up to 30, with
            as much jitter.
        longest_wait: the longest `Retry-After` that is waited for, in seconds; a longer one ends
            the request.
        connections: the most at once.
        ca_file: certificates to trust instead of the system's.

    Raises:
        InputError: a URL that cannot be used, a token that is not in the environment or would go
            out unencrypted.
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
        secrets.register_url(url)
        secrets.register_headers(headers)
        parts = split_url(name, url, ("http", "https"), "http://host... or https://host...")
        check_token(name, url, parts.scheme == "https", token_variable)
        self.name, self.url, self._token_variable = name, url.rstrip("/"), token_variable
        self._timeout = checked_timeout(name, timeout)
        self._headers = checked_headers(name, headers)
        self._retry = retry_policy(name, retries, backoff, longest_wait)
        self._pools = connection_pools(
            proxy_of(name, parts),
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
        most_bytes: int = MOST_BYTES,
    ) -> Answer:
        """Return the answer to a POST, whatever its status; one of `final` is not asked again.

        Raises:
            APIUnavailable: no answer came, or only ones that ask to come again later.
            BadAnswer: it is larger than `most_bytes`, or cannot be decompressed.
        """
        return self._send("POST", path, body, headers, attempt, final, most_bytes)

    def get_json(self, path: str) -> Any:
        """Return the JSON answer to a GET; None where there is nothing (404, 405, 501).

        Raises:
            APIUnavailable: no answer came. BadAnswer: it is no JSON.
        """
        answer = self._send("GET", path, None, {}, lambda: None)
        if answer.status in (404, 405, 501):
            return None
        self.check_status(answer)
        return parse_json(self.name, answer.data)

    def check_status(self, answer: Answer) -> None:
        """Raise APIUnavailable, with what the service says, unless the status is 200."""
        if answer.status != 200:
            told = f"{self.name}: the service answered {answer.status}"
            if 300 <= answer.status < 400 and (target := answer.headers.get("Location")):
                told += f" and names {secrets.shown_url(short(target))!r} instead; redirects are not followed"
            raise APIUnavailable(f"{told}: {said(answer.data)}")

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        attempt: Callable[[], None],
        final: Collection[int] = (),
        most_bytes: int = MOST_BYTES,
    ) -> Answer:
        retry, tried = self._retry, 1 + int(self._retry.total or 0)
        while True:
            attempt()
            sent = {**self._headers, **headers, **bearer(self.name, self._token_variable)}
            retry_after = None
            try:
                answer = self._exchange(method, path, body, sent, most_bytes)
                if answer.status not in AGAIN or answer.status in final:
                    return answer
                retry_after = answer.headers.get("Retry-After")
                failure: HTTPError = ProtocolError(str(answer.status))
                message = f"the service answered {answer.status} to the last of {tried} attempts: {said(answer.data)}"
            except _PASSING as error:
                failure, message = error, f"no answer in {tried} attempts: {short(str(error))}"
            except HTTPError as error:
                raise APIUnavailable(f"{self.name}: no answer: {short(str(error))}") from None
            try:
                retry = retry.after(failure)
            except MaxRetryError:
                raise APIUnavailable(f"{self.name}: {message}") from None
            try:
                retry.wait(retry_after)
            except APIUnavailable as error:
                raise APIUnavailable(f"{self.name}: {error}") from None

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        most_bytes: int,
    ) -> Answer:
        """One attempt, limited in time and size."""
        line = Line()

        def exchange() -> Answer:
            line.use()
            response = self._pools.request(
                method,
                self.url + path,
                body=body,
                headers=headers,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            with response:
                data = bytearray()
                for part in response.stream(2**16):
                    data += part
                    if len(data) > most_bytes:
                        raise BadAnswer(
                            f"{self.name}: the service answered more than {most_bytes / 2**20:.0f} MiB"
                        )
                response.release_conn()
            return Answer(response.status, response.headers, bytes(data))

        try:
            return wait_for(exchange, self._timeout, line.cut)
        except DeadlinePassed:
            raise TimeoutError(f"no whole answer within {self._timeout:g} s") from None
        except DecodeError as error:
            raise BadAnswer(
                f"{self.name}: the service's answer cannot be decompressed: {short(str(error))}"
            ) from None


def split_url(name: str, url: object, schemes: Collection[str], wanted: str) -> SplitResult:
    """Return the parts of a URL of one of these schemes, which holds a host and no secret.

    Raises:
        InputError: it is none; what it may hold of a secret is not shown.
    """
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        usable = (
            parts is not None and parts.scheme in schemes and parts.hostname and parts.port != 0
        )
    except ValueError:  # brackets without an end, a port that is no number
        parts, usable = None, False
    if parts is None or not usable:
        came = repr(secrets.shown_url(url)) if isinstance(url, str) else f"a {type(url).__name__}"
        raise InputError(f"{name}: url must be {wanted}; got {came}")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"{name}: url must hold no user or password; put a token into the environment"
        )
    return parts


def checked_headers(name: str, headers: object) -> dict[str, str]:
    """Return the headers as strings; raise InputError, which shows no value, where HTTP cannot
    carry one.
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise InputError(
            f"{name}: headers must map names to values; got a {type(headers).__name__}"
        )
    for header, value in headers.items():
        if not isinstance(header, str) or not _HEADER_NAME.fullmatch(header):
            raise InputError(
                f"{name}: headers must have names of letters, digits and -; one has not"
            )
        if not isinstance(value, str) or not _SENDABLE.fullmatch(value):
            raise InputError(
                f"{name}: the value of the header {header} must be a string in one line of Latin-1 (in YAML: in "
                "quotes, if it looks like a number)"
            )
    return dict(headers)


def checked_timeout(name: str, timeout: float) -> float:
    """Return `timeout`; raise InputError unless it is a number of seconds above 0 and of a day at
    most.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= DAY:
        raise InputError(
            f"{name}: timeout must be a number of seconds above 0, at most {DAY:,}; got {timeout!r}"
        )
    return timeout


def check_token(
    name: str, url: str, secure: bool, variable: str | None, letters: str = "Latin-1"
) -> None:
    """Raise InputError for a token that is not in the environment, or would leave this machine
    unencrypted.
    """
    bearer(name, variable, letters)
    if variable is not None and not secure and not is_loopback(urlsplit(url).hostname):
        raise InputError(
            f"{name}: a token is sent encrypted only (or to loopback); got {secrets.shown_url(url)!r}"
        )


def bearer(name: str, variable: str | None, letters: str = "Latin-1") -> dict[str, str]:
    """Return the header with the token in an environment variable; none without a variable.

    Raises:
        InputError: the token is not there, or cannot be sent in these letters; it is not shown.
    """
    if variable is None:
        return {}
    if not isinstance(variable, str):
        raise InputError(
            f"{name}: token_variable must name an environment variable; got a {type(variable).__name__}"
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        # Whoever wrote the token itself there must not read it in an error.
        shown = (
            variable
            if _VARIABLE.fullmatch(variable)
            else "that token_variable names (not shown, may be a token)"
        )
        raise InputError(
            f"{name}: the environment variable {shown} must hold the token; it is not set"
        )
    secrets.register(token, "token")
    if not _SENDABLE.fullmatch(token) or (letters == "ASCII" and not token.isascii()):
        raise InputError(
            f"{name}: the token in the environment variable {variable} holds a character that no header can carry, "
            f"such as a line break or a letter outside {letters}; set it again"
        )
    return {"Authorization": f"Bearer {token}"}
