"""Share between the wrappers of other libraries: checks of their objects, and the spec of a box."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.black_box.remote.v2 import check_fields
from bidfmkd_fast.errors import InputError, InputTypeError


def look_for(op: str, what: str, given: Any, *attributes: str) -> None:
    """Raise InputError unless `given` has all of the attributes that such an object has."""
    missing = [name for name in attributes if not hasattr(given, name)]
    if missing:
        raise InputError(
            f"{op}: wanted {what}, which has {', '.join(attributes)}; got a "
            f"{type(given).__name__} without {', '.join(missing)}"
        )


def shape_of(op: str, image_shape: object) -> tuple[int, ...]:
    """Return `image_shape` as a tuple of ints; APISpec checks how many they are.

    Raises:
        InputTypeError: it is no sequence of integers.
    """
    try:
        return tuple(operator.index(size) for size in image_shape)  # type: ignore[attr-defined]
    except TypeError:
        raise InputTypeError(
            f"{op}: image_shape must be three ints (C, H, W); got {image_shape!r}"
        ) from None


def spec_of(op: str, given: Any, derived: Mapping[str, Any], fields: Mapping[str, Any]) -> APISpec:
    """Return the spec of `given`: the caller's `fields`, and `derived` for what they leave out."""
    check_fields(op, fields)
    values = {"name": type(given).__name__, **derived, **fields}
    for field in ("n_classes", "image_shape"):
        if field not in values:
            raise InputError(f"{op}: the model does not state {field}; give {field}")
    return APISpec(**values)


def as_floats(images: np.ndarray[Any, Any], spec: APISpec) -> np.ndarray[Any, Any]:
    """Return images as float32 in `input_range`, also those that are bytes on the wire."""
    if images.dtype != np.uint8:
        return images.astype(np.float32, copy=False)
    low, high = spec.input_range
    return images.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
