"""Read what a service answers: anything unreadable becomes a `BadAnswer` that names the API."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError
from bidfmkd_fast.secrets import scrub

# Errors that reading foreign data raises: a missing key or item, a wrong type or value, a number
# that is too large, lists that are nested too deep.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
_MOST_LOOKED_AT = 2**16  # characters of an answer that are searched for words to show


@contextmanager
def reading(name: str, what: str, data: bytes | None = None) -> Iterator[None]:
    """Turn errors of the block over foreign data into a `BadAnswer` with the service's words.

    Args:
        name: name of the API.
        what: the sentence that the error opens with, after the name.
        data: the answer itself, if it may hold words that explain the error.
    """
    try:
        yield
    except (APIUnavailable, BadAnswer, InputError):
        raise
    except _UNREADABLE as error:
        reason = short(f"{type(error).__name__}: {error}")
        words = "" if data is None else f"; it answered {words_of(data)}"
        raise BadAnswer(f"{name}: {what}: {reason}{words}") from None


def parse_json(name: str, data: bytes) -> Any:
    """Parse `data` as JSON; raise BadAnswer if it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BadAnswer(
            f"{name}: the service must answer JSON; it answered {words_of(data)}"
        ) from None


def float32_array(values: Any) -> np.ndarray[Any, Any]:
    """Convert numbers to float32.

    A number that is too large becomes infinity, which the check of the answer refuses.
    """
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32)


def words_of(data: bytes, most: int = 200) -> str:
    """Return the words of a service in one short line."""
    text = data[: 4 * _MOST_LOOKED_AT].decode("utf-8", "replace")
    return repr(short(text, most)) if text.strip() else "nothing more"


def shown(value: Any, most: int = 200) -> str:
    """Return a value from an answer as one short line, or its type if it is nested too deep."""
    try:
        return short(repr(value), most)
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__}"


def short(text: str, most: int = 200) -> str:
    """Return the text in one line of at most `most` characters, without secrets or their parts.

    Characters that no terminal shows or no file of UTF-8 holds (escape sequences, halves of UTF-16
    pairs) are written as `\\x1b`.
    """
    words = text[:_MOST_LOOKED_AT].split()
    if len(text) > _MOST_LOOKED_AT and len(words) > 1:
        del words[-1]  # it may be the first half of a secret
    shown = scrub(" ".join(words))[:most]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)
