"""Check numbers that callers give as arguments."""

from __future__ import annotations

from numbers import Integral, Real

from bidfmkd_fast.errors import InputError, InputTypeError


def check_number(op: str, name: str, value: object) -> float:
    """Return `value` as a float; refuse what is no number. A bool counts as none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{op}: {name} must be a number; got {value!r}")
    return float(value)


def check_integer(op: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int; refuse what is no integer with `low <= value <= high`.

    Integers of numpy are accepted, a bool is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputTypeError(f"{op}: {name} must be an integer; got {value!r}")
    number = int(value)
    if number < low:
        raise InputError(f"{op}: {name} must be at least {low}; got {number}")
    if high is not None and number > high:
        raise InputError(f"{op}: {name} must be at most {high}; got {number}")
    return number
