"""Read pickled dicts of plain values and numpy arrays without running any code of the pickle."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from bidfmkd_fast.errors import InputError


def load_arrays(content: bytes, where: str) -> dict[str, Any]:
    """Return the dict in a pickle written by Python 2 or 3, with arrays of bytes as uint8 arrays.

    A pickle may name any function to be called. Here the three names that a numpy array needs stand
    for the classes below; any other name is refused before anything is called.

    Raises:
        InputError: the pickle names another function, holds an array of another type, or is
            damaged.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except InputError as error:
        raise InputError(f"convert_dataset: {where} {error}") from None
    except Exception as error:  # a damaged pickle can make the unpickler raise nearly anything
        raise InputError(
            f"convert_dataset: {where} is not a complete pickle: {error}; "
            "it may be damaged or cut off"
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
        """Ignore byte order and the like, which bytes do not have."""


class _Array:
    """Stands in for `numpy.ndarray` and for the function that makes an empty one."""

    state: tuple[Any, ...] = ()

    def __init__(self, *_: object) -> None:
        """Ignore the arguments of an empty array; the data come in `__setstate__`."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_numpy(self, where: str) -> np.ndarray:
        """Return the array, uint8. Raises InputError if it is of another type or incomplete."""
        _, shape, kind, by_column, raw = (
            self.state if len(self.state) == 5 else (0, (), None, False, b"")
        )
        if isinstance(raw, str):  # Python 3 reads the bytes of Python 2 as text
            raw = raw.encode("latin1")
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
