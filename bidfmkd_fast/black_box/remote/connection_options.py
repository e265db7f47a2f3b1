"""Check what a user says about a connection: URL, headers, time-out and token.

No error shows a value that may be a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from bidfmkd_fast import secrets
from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.black_box.remote.proxies import is_loopback
from bidfmkd_fast.black_box.remote.retries import DAY
from bidfmkd_fast.errors import InputError

_MOST_IN_FLIGHT = 1024
_SENDABLE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class ConnectionOptions:
    """How requests are sent over HTTP, and how often they are repeated.

    Args:
        token_variable: environment variable that holds a bearer token. It is read anew for each
            request and never stored.
        headers: more headers, nothing secret.
        timeout: seconds from the start of the connection to the end of the answer. Connecting may
            take at most 10 of them.
        retries: how often a request is repeated after 408, 425, 429, 5xx, a dropped connection or a
            time-out; from 0 to 100.
        backoff: seconds before the second repetition. They double with each further repetition, up
            to 30, and a random time of up to `backoff` seconds is added.
        longest_wait: the longest `Retry-After` that is waited for, in seconds; if a service asks
            for a longer wait, the request ends.
        ca_file: certificates to trust instead of the system's.
    """

    token_variable: str | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 0.5
    longest_wait: float = 60.0
    ca_file: str | None = None


def split_url(name: str, url: object, schemes: Collection[str], wanted: str) -> SplitResult:
    """Split a URL into its parts, after checks of its scheme, host and port.

    Args:
        name: name of the API in errors.
        url: the URL to split.
        schemes: the schemes allowed.
        wanted: form of an allowed URL, as the error shows it.

    Raises:
        InputError: `url` does not look as wanted, or holds a user or a password.
    """
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        usable = (
            parts is not None and parts.scheme in schemes and parts.hostname and parts.port != 0
        )
    except ValueError:  # brackets without an end, or a port that is no number
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
    """Return the headers as strings.

    Raises:
        InputError: HTTP cannot carry a name or a value.
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
                f"{name}: headers must have names of letters, digits and -; "
                "one name has another character"
            )
        if not isinstance(value, str) or not _SENDABLE.fullmatch(value):
            raise InputError(
                f"{name}: the value of the header {header} must be a string in one line of Latin-1 "
                "(in YAML: in quotes, if it looks like a number)"
            )
    return dict(headers)


def checked_in_flight(name: str, in_flight: int) -> int:
    """Return `in_flight`, a number of requests from 1 to 1024; else raise InputError.

    Each request takes a thread and a connection, and a pool of connections holds a place for each
    from the start.
    """
    return check_integer(name, "in_flight", in_flight, 1, _MOST_IN_FLIGHT)


def checked_timeout(name: str, timeout: float) -> float:
    """Return `timeout`, a number of seconds above 0 and at most a day; else raise InputError."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= DAY:
        raise InputError(
            f"{name}: timeout must be a number of seconds above 0, at most {DAY:,}; got {timeout!r}"
        )
    return timeout


def check_token(
    name: str, url: str, secure: bool, variable: str | None, letters: str = "Latin-1"
) -> None:
    """Raise InputError if the token is missing, or would leave this machine unencrypted."""
    bearer(name, variable, letters)
    if variable is not None and not secure and not is_loopback(urlsplit(url).hostname):
        raise InputError(
            f"{name}: a token is sent encrypted only (or to loopback); "
            f"got {secrets.shown_url(url)!r}"
        )


def bearer(name: str, variable: str | None, letters: str = "Latin-1") -> dict[str, str]:
    """Return the header with the token in an environment variable; no header without a variable.

    Raises:
        InputError: the variable is not set, or its token cannot be sent in these letters ("ASCII"
            or "Latin-1").
    """
    if variable is None:
        return {}
    if not isinstance(variable, str):
        raise InputError(
            f"{name}: token_variable must name an environment variable; "
            f"got a {type(variable).__name__}"
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        # A user may have written the token itself in place of the variable's name.
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
            f"{name}: the token in the environment variable {variable} holds a character that no "
            f"header can carry, such as a line break or a letter outside {letters}; set it again"
        )
    return {"Authorization": f"Bearer {token}"}
