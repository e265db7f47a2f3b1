"""Pickled dicts of plain values and numpy arrays, read without numpy's or anybody's code being called by the pickle."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from bidfmkd_fast.errors import InputError


def load_arrays(content: bytes, where: str) -> dict[str, Any]:
    """The dict in a pickle written by Python 2 or 3, its arrays of bytes as uint8 of their shape.

    The stand-ins below take the place of the three names that a numpy array needs; any other name
    is refused before anything is called. Raises `InputError` for that, for arrays of another type,
    and for a damaged pickle.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except InputError as error:
        raise InputError(f"convert_dataset: {where} {error}") from None
    except Exception as error:  # a damaged pickle can make the unpickler raise nearly anything
        raise InputError(
            f"convert_dataset: {where} is no whole pickle: {error}; it may be damaged or cut off"
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"convert_dataset: {where}: wanted a pickled dict; got {type(value).__name__}"
        )
    return {
        str(key): item.to_numpy(where) if isinstance(item, _Array) else item
        for key, item in value.items()
    }


class _Type:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands in for `numpy.ndarray` and for the function that makes an empty one."""

    state: tuple[Any, ...] = ()

    def __init__(self, *_: object) -> None:
        """The arguments are those of an empty array."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_numpy(self, where: str) -> np.ndarray:
        _, shape, kind, by_column, raw = (
            self.state if len(self.state) == 5 else (0, (), None, False, b"")
        )
        raw = (
            raw.encode("latin1") if isinstance(raw, str) else raw
        )  # Python 2's bytes are text to Python 3
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        plain = (
            isinstance(kind, _Type)
            and kind.code in ("u1", "|u1")
            and isinstance(raw, bytes)
            and not by_column
        )
        if not plain or not sizes or math.prod(shape) != len(raw):
            raise InputError(
                f"convert_dataset: {where} holds an array that is not whole rows of bytes"
            )
        return np.frombuffer(raw, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    _ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self._ALLOWED:
            raise InputError(
                f"wants to run {module}.{name}, which no array of images needs; it was not run"
            )
        return self._ALLOWED[module, name]
