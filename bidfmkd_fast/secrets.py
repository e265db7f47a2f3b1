"""Secrets that were handed to this process, and their removal from every text that leaves it.

What is secret is registered where it enters: tokens from the environment, header values, passwords and query strings of
URLs. `scrub` replaces them in each error, warning, log record and written file, however the text spells them.
"""

from __future__ import annotations

import base64
import logging
import re
import threading
import traceback
from collections.abc import Mapping
from functools import cache, partial
from typing import Any
from urllib.parse import unquote, unquote_plus

_LEAST = 4  # characters; anything shorter keeps no secret, and would be cut out of innocent words
_LEAST_BASE64 = 6
_LEAST_UNNAMED = 8  # "version=2024" is none
_TELLING = re.compile(r"(?i)auth|code|cookie|cred|key|pass|pwd|secret|sig|token")
_INNOCENT_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "accept-language",
        "cache-control",
        "connection",
        "content-type",
        "user-agent",
    }
)
_NAMED = {'"': "quot", "&": "amp", "'": "apos", "<": "lt", ">": "gt"}  # entities of HTML
_URL_SAFE = {"+": "-", "/": "_"}  # base64's two alphabets

_lock = threading.Lock()
_labels: dict[str, str] = {}  # secret -> what stands in its place
_patterns: tuple[tuple[re.Pattern[str], str], ...] = ()


def register(secret: str, label: str = "secret") -> None:
    """Let `scrub` replace `secret` from now on, unless it is shorter than four characters.

    Args:
        secret: what must not be shown.
        label: "secret" or "token"; what stands in its place, in angle brackets.
    """
    global _patterns
    if len(secret) < _LEAST or secret in _labels:
        return
    with _lock:
        _labels[secret] = label
        longest_first = sorted(
            _labels, key=len, reverse=True
        )  # a secret inside a longer one would leave its rest
        _patterns = tuple((_pattern(one), f"<{_labels[one]}>") for one in longest_first)


def register_url(url: object) -> None:
    """Register the user, the password and the values of the query string of a URL, however badly
    it is formed.
    """
    if not isinstance(url, str):
        return
    before, at, rest = url.rpartition("@")
    if at:
        user = re.sub(r"^[a-zA-Z0-9+.-]*:?/+", "", before)  # "me:secret" of "htp://me:secret@host"
        for part in (user, *user.split(":", 1)):
            register(unquote(part))
    for part in re.split(r"[?&;#]", rest)[1:]:
        name, equals, value = part.partition("=")
        _register_value(name if equals else "", unquote_plus(value if equals else part))


def register_headers(headers: object) -> None:
    """Register the values of headers, less those that are the same for everybody."""
    if not isinstance(headers, Mapping):
        return
    for name, value in headers.items():
        if str(name).lower() in _INNOCENT_HEADERS:
            continue
        text = str(value)
        _register_value(str(name), text)
        scheme, _, credentials = text.partition(" ")  # "Bearer ..." or "Basic ..."
        _register_value(str(name), credentials.strip())
        if scheme.lower() == "basic":
            try:
                register_url(f"{base64.b64decode(credentials).decode()}@")
            except ValueError:
                continue


def _register_value(name: str, value: str) -> None:
    """Register a value that may be secret: of a telling name, or so long that no ordinary word or
    number is lost.
    """
    if len(value) >= _LEAST_UNNAMED or _TELLING.search(name):
        register(value)


def scrub(text: str) -> str:
    """Return the text with every registered secret replaced.

    A secret is found in any spelling: as it is, with characters percent-encoded, escaped as in
    JSON, Python or HTML (also several times over), and in base64, alone or within a longer text
    such as `user:password`.
    """
    for pattern, replacement in _patterns:
        text = pattern.sub(partial(_replaced, replacement), text)
    return text


def shown_url(url: str) -> str:
    """Return a URL for an error: without user, password, query string and fragment."""
    hidden = re.sub(
        r"^([a-zA-Z0-9+.-]*:?/+)?.*@",
        lambda found: (found[1] or "") + "<secret>@",
        url,
        flags=re.DOTALL,
    )
    # What stands in the place of the port may be the password of a URL that lacks its host.
    hidden = re.sub(
        r"^([a-zA-Z0-9+.-]*:/+[^/?#:[\]]*):(?!\d*(?:[/?#]|$))[^/?#]*", r"\1:<secret>", hidden
    )
    address, mark, _ = hidden.partition("?")
    return scrub(f"{address}?<secret>" if mark else hidden.partition("#")[0])


def scrubbed(value: Any) -> Any:
    """Return plain values, nested in lists and dicts, with their strings scrubbed; numbers stay as
    they are.
    """
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrubbed(key): scrubbed(inner) for key, inner in value.items()}
    return [scrubbed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class ScrubFilter(logging.Filter):
    """Removes secrets from log records, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = scrub("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return True


logging.getLogger("bidfmkd_fast").addFilter(ScrubFilter())


@cache
def _pattern(secret: str) -> re.Pattern[str]:
    spellings = ["".join(map(_spellings, secret))]
    # the characters at both ends hold bits of the secret and of its neighbours
    edge = "[A-Za-z0-9+/_-]{0,3}"
    for core in {
        core for encoding in ("utf-8", "latin-1") for core in _base64_cores(secret, encoding)
    }:
        spellings.append(edge + "".join(map(_spellings, core)) + edge + "(?:=|%3[dD]){0,2}")
    # What stands for a secret stays as it is, even where a secret is the word "secret".
    return re.compile(f"<secret>|<token>|({'|'.join(spellings)})")


def _replaced(replacement: str, found: re.Match[str]) -> str:
    return replacement if found[1] else found[0]


def _base64_cores(secret: str, encoding: str) -> list[str]:
    """Return the base64 characters that depend on the secret alone, for the three places where it
    may begin.
    """
    try:
        content = secret.encode(encoding)
    except UnicodeEncodeError:
        return []
    cores = []
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + content).decode()
        core = encoded[-(-8 * before // 6) : (before + len(content)) * 8 // 6]
        if len(core) >= _LEAST_BASE64:
            cores.append(core)
    return cores


@cache
def _spellings(character: str) -> str:
    """Return a pattern of all spellings of one character; repetitions are bounded, so that no text
    takes long.
    """
    code = ord(character)
    units = (
        [f"{code:04x}"]
        if code < 2**16
        else [f"{0xD7C0 + (code >> 10):04x}", f"{0xDC00 + (code & 0x3FF):04x}"]
    )
    ways = ["".join(rf"\\{{1,8}}u{_hex(unit)}" for unit in units)]
    ways += [rf"&\#0{{0,4}}{code};", rf"&\#[xX]0{{0,4}}{_hex(f'{code:x}')};"]
    if character in _NAMED:
        ways.append(f"&{_NAMED[character]};")
    if character == " ":
        ways.append(r"\+")
    if character in _URL_SAFE:
        ways.append(_URL_SAFE[character])
    for encoding in ("utf-8", "latin-1"):
        try:
            content = character.encode(encoding)
        except UnicodeEncodeError:
            continue
        ways.append("".join(rf"%(?:25){{0,4}}{_hex(f'{byte:02x}')}" for byte in content))
        ways.append("".join(rf"\\{{1,8}}x{_hex(f'{byte:02x}')}" for byte in content))
        if code > 127:  # decoded by another encoding than it was written in
            ways += [
                re.escape(content.decode("latin-1")),
                re.escape(content.decode("utf-8", "replace")),
            ]
    ways.append(rf"\\{{0,8}}{re.escape(character)}")  # last: the u of \u0041 is not the letter u
    return f"(?:{'|'.join(dict.fromkeys(ways))})"


def _hex(digits: str) -> str:
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in digits)
