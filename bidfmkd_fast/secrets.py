"""Remove secrets from every text that leaves the process.

A secret is registered where it enters: tokens from the environment, values of headers, passwords
and query strings of URLs. `scrub` replaces it in each error, warning, log record and written file,
in any spelling.
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

# Characters that a secret has at least. Anything shorter protects nothing, and replacing it would
# damage ordinary words.
_LEAST = 4
_LEAST_BASE64 = 6  # the same for the base64 characters that a secret alone determines
_LEAST_UNNAMED = 8  # the same for a value whose name does not suggest a secret: "version=2024"
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
_URL_SAFE = {"+": "-", "/": "_"}  # where the two alphabets of base64 differ

_lock = threading.Lock()
_labels: dict[str, str] = {}  # secret -> what stands in its place
_patterns: tuple[tuple[re.Pattern[str], str], ...] = ()


def register(secret: str, label: str = "secret") -> None:
    """Make `scrub` replace `secret` from now on, unless it is shorter than four characters.

    Args:
        secret: the text that must not be shown.
        label: "secret" or "token"; it replaces the secret, in angle brackets.
    """
    global _patterns
    if len(secret) < _LEAST or secret in _labels:
        return
    with _lock:
        _labels[secret] = label
        # The longest first: if a secret is part of a longer one, replacing it first would leave the
        # rest of the longer one in the text.
        longest_first = sorted(_labels, key=len, reverse=True)
        _patterns = tuple((_pattern(known), f"<{_labels[known]}>") for known in longest_first)


def register_url(url: object) -> None:
    """Register user, password and query values of a URL, even if the URL is malformed."""
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
    """Register the values of headers, except of those that never hold a secret."""
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
    """Register a value that may be secret: because of its name, or because it is long.

    Short values without such a name are left out, since they may be ordinary words or numbers.
    """
    if len(value) >= _LEAST_UNNAMED or _TELLING.search(name):
        register(value)


def scrub(text: str) -> str:
    """Return the text with every registered secret replaced.

    A secret is found as it is, percent-encoded, escaped as in JSON, Python or HTML (also several
    times over), and in base64, alone or within a longer text such as `user:password`.
    """
    for pattern, replacement in _patterns:
        text = pattern.sub(partial(_replaced, replacement), text)
    return text


def shown_url(url: str) -> str:
    """Return a URL for a message: without user, password, query string and fragment."""
    hidden = re.sub(
        r"^([a-zA-Z0-9+.-]*:?/+)?.*@",
        lambda found: (found[1] or "") + "<secret>@",
        url,
        flags=re.DOTALL,
    )
    # If a URL lacks its host, its password stands where the port would be.
    hidden = re.sub(
        r"^([a-zA-Z0-9+.-]*:/+[^/?#:[\]]*):(?!\d*(?:[/?#]|$))[^/?#]*", r"\1:<secret>", hidden
    )
    address, mark, _ = hidden.partition("?")
    return scrub(f"{address}?<secret>" if mark else hidden.partition("#")[0])


def scrubbed(value: Any) -> Any:
    """Return plain values, nested in lists and dicts, with secrets in their strings replaced."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrubbed(key): scrubbed(inner) for key, inner in value.items()}
    return [scrubbed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class ScrubFilter(logging.Filter):
    """A filter that replaces secrets in log records, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = scrub("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return True


logging.getLogger("bidfmkd_fast").addFilter(ScrubFilter())


@cache
def _pattern(secret: str) -> re.Pattern[str]:
    """Return a pattern that matches the secret in all spellings, as its group 1."""
    spellings = ["".join(map(_spellings, secret))]
    # In base64 the characters at both ends mix bits of the secret with bits of its neighbours.
    edge = "[A-Za-z0-9+/_-]{0,3}"
    for core in {
        core for encoding in ("utf-8", "latin-1") for core in _base64_cores(secret, encoding)
    }:
        spellings.append(edge + "".join(map(_spellings, core)) + edge + "(?:=|%3[dD]){0,2}")
    # Match replacements outside of group 1: they stay, even if a secret is the word "secret".
    return re.compile(f"<secret>|<token>|({'|'.join(spellings)})")


def _replaced(replacement: str, found: re.Match[str]) -> str:
    """Return the replacement for a secret, and any other match unchanged."""
    return replacement if found[1] else found[0]


def _base64_cores(secret: str, encoding: str) -> list[str]:
    """Return the base64 characters that the secret alone determines.

    There are three versions, since base64 encodes groups of three bytes and the secret may begin at
    any byte of a group.
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
    """Return a pattern of all spellings of a character.

    Repetitions are bounded, so that scrubbing takes linear time for any text.
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
        if code > 127:  # written in one encoding and decoded in another
            ways += [
                re.escape(content.decode("latin-1")),
                re.escape(content.decode("utf-8", "replace")),
            ]
    ways.append(
        rf"\\{{0,8}}{re.escape(character)}"
    )  # last, since the u of \u0041 is not the letter u
    return f"(?:{'|'.join(dict.fromkeys(ways))})"


def _hex(digits: str) -> str:
    """Return a pattern of hexadecimal digits in either case."""
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in digits)
