"""Warn of images whose pixel values do not look like those of the spec's input range."""

from __future__ import annotations

import warnings

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import ServiceWarning

# How far images may leave the input range, in widths of the range, before a warning. Steps of a
# recovery leave it a little; images in 0..255 or normalised ones leave it by far more.
_OUTSIDE = 0.5
# Images count as 0 to 1 if they lie within [0, 1] and nearly reach both ends. Those that fill only
# a part of it may as well be the middle of a wider range, as first images of a generator are.
_REACHES = 0.1
# A range counts as wider than 0 to 1 if one of its ends is this far beyond.
_BEYOND = 0.25


class ImageRange:
    """Compares pixel values with `spec.input_range` and gives each of its two warnings once."""

    def __init__(self, spec: APISpec) -> None:
        self._spec = spec
        self._warned_of_outside = self._warned_of_unit = False

    def warn(self, low: float, high: float, stacklevel: int) -> None:
        """Warn if pixel values from `low` to `high` are far outside, or 0 to 1 in a wider range."""
        lowest, highest = self._spec.input_range
        wanted = f"its input_range, {lowest:g} to {highest:g}"
        most = _OUTSIDE * (highest - lowest)
        if not (low >= lowest - most and high <= highest + most):
            if not self._warned_of_outside:
                self._warned_of_outside = True
                message = (
                    f"{self._spec.name}: images of {low:.4g} to {high:.4g} are far outside of "
                    f"{wanted}; are they 0 to 255, or normalised? Bring them to input_range, or "
                    "set it in the spec"
                )
                warnings.warn(message, ServiceWarning, stacklevel=stacklevel + 1)
        elif (
            not self._warned_of_unit
            and 0 <= low <= _REACHES
            and 1 - _REACHES <= high <= 1
            and (lowest <= -_BEYOND or highest >= 1 + _BEYOND)
        ):
            self._warned_of_unit = True
            message = (
                f"{self._spec.name}: images of {low:.4g} to {high:.4g} fill only a part of "
                f"{wanted}; are they 0 to 1? spec.from_unit(images) maps them"
            )
            warnings.warn(message, ServiceWarning, stacklevel=stacklevel + 1)
