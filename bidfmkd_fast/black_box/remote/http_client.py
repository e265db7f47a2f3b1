"""Send HTTP requests with urllib3: connections are pooled, every attempt is announced and limited.

Tokens come from the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

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
from bidfmkd_fast.black_box.remote.connection_options import (
    ConnectionOptions,
    bearer,
    check_token,
    checked_headers,
    checked_in_flight,
    checked_timeout,
    split_url,
)
from bidfmkd_fast.black_box.remote.connections import Line, connection_pools
from bidfmkd_fast.black_box.remote.proxies import proxy_of
from bidfmkd_fast.black_box.remote.reading import parse_json, short, words_of
from bidfmkd_fast.black_box.remote.retries import retry_policy
from bidfmkd_fast.errors import APIUnavailable, BadAnswer
from bidfmkd_fast.runtime.interrupt import DeadlinePassed, wait_for

# Statuses after which the next attempt may succeed.
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
MOST_BYTES = 2**24  # of an answer, decompressed
_PASSING = (NewConnectionError, ProtocolError, ProxyError, SSLError, TimeoutError)


class Answer(NamedTuple):
    """A whole answer: status, headers (names match in any case) and decompressed body."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class HTTPClient:
    """A client of one service over HTTP. Safe under threads.

    Args:
        name: name of the API in errors.
        url: `http://` or `https://`, without user and password. TLS certificates are verified.
        connections: most connections at once, the `in_flight` of a black box.
        options: token, headers, time-out, repetitions and certificates; the defaults if None.

    Raises:
        InputError: the URL cannot be used, or the token is not in the environment or would be sent
            unencrypted.
    """

    def __init__(
        self,
        name: str,
        url: str,
        connections: int = 4,
        options: ConnectionOptions | None = None,
    ) -> None:
        options = ConnectionOptions() if options is None else options
        secrets.register_url(url)
        secrets.register_headers(options.headers)
        parts = split_url(name, url, ("http", "https"), "http://host... or https://host...")
        check_token(name, url, parts.scheme == "https", options.token_variable)
        self.name, self.url, self._token_variable = name, url.rstrip("/"), options.token_variable
        self._timeout = checked_timeout(name, options.timeout)
        self._headers = checked_headers(name, options.headers)
        self._retry = retry_policy(name, options.retries, options.backoff, options.longest_wait)
        self._pools = connection_pools(
            proxy_of(name, parts),
            maxsize=checked_in_flight(name, connections),
            block=True,
            cert_reqs="CERT_REQUIRED",
            ca_certs=options.ca_file,
            timeout=Timeout(connect=min(10.0, self._timeout), read=self._timeout),
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
        """Return the answer to a POST, whatever its status.

        Args:
            path: appended to the client's URL.
            body: what to send.
            headers: headers of this request, beside those of the client.
            attempt: called right before every attempt.
            final: statuses after which the request is not repeated.
            most_bytes: most bytes of an answer.

        Raises:
            APIUnavailable: no answer came, or even the last answer had a status after which a
                request is repeated.
            BadAnswer: the answer is larger than `most_bytes`, or cannot be decompressed.
        """
        return self._send("POST", path, body, headers, attempt, final, most_bytes)

    def release(self) -> None:
        """Close idle connections; the next request opens another one."""
        self._pools.clear()

    def get_json(self, path: str) -> Any:
        """Return the JSON answer to a GET; None if the server has no such page (404, 405, 501).

        Raises:
            APIUnavailable: no answer came.
            BadAnswer: the answer is no JSON.
        """
        answer = self._send("GET", path, None, {}, lambda: None)
        if answer.status in (404, 405, 501):
            return None
        self.check_status(answer)
        return parse_json(self.name, answer.data)

    def check_status(self, answer: Answer) -> None:
        """Raise APIUnavailable, with the service's words, unless the status is 200."""
        if answer.status != 200:
            message = f"{self.name}: the service answered {answer.status}"
            if 300 <= answer.status < 400 and (target := answer.headers.get("Location")):
                shown = secrets.shown_url(short(target))
                message += f" and names {shown!r} instead; redirects are not followed"
            advice = ""
            if answer.status in (401, 403):
                advice = (
                    "; name the environment variable that holds the token (token_variable)"
                    if self._token_variable is None
                    else f"; check the token in the environment variable {self._token_variable}"
                )
            raise APIUnavailable(f"{message}: {words_of(answer.data)}{advice}")

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
        """Send a request until it is answered or `retries` are used up, with pauses between."""
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
                message = (
                    f"the service answered {answer.status} to the last of {tried} attempts: "
                    f"{words_of(answer.data)}"
                )
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
        """Make one attempt, limited in time and size."""
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
                            f"{self.name}: the service answered more than "
                            f"{most_bytes / 2**20:.0f} MiB"
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
