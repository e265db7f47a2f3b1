"""What is known of an API before it is asked: its classes, the images it takes and the kind of scores it returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError

SCORES_KINDS = ("logits", "probabilities", "log_probabilities")


@dataclass(frozen=True)
class APISpec:
    """The public description of an API.

    Args:
        n_classes: number of scores per image, at least 2.
        image_shape: `(C, H, W)` of the images it takes.
        input_range: `(low, high)` that the API's pixel values span; unit range `(0, 1)` unless told.
        scores_kind: `"logits"`, `"probabilities"` or `"log_probabilities"`.
        class_names: the classes' names in the order of the scores, all different; empty when unknown.
        data_set: name of the data set the classes are from; empty when unknown.
        name: what errors and reports call the API.

    Raises:
        InputError: a field has a wrong value (InputTypeError: a wrong type).
    """

    n_classes: int
    image_shape: tuple[int, int, int]
    input_range: tuple[float, float] = (0.0, 1.0)
    scores_kind: str = "logits"
    class_names: tuple[str, ...] = ()
    data_set: str = ""
    name: str = "api"

    def __post_init__(self) -> None:
        for field in ("image_shape", "input_range", "class_names"):  # lists come from YAML; a frozen spec holds tuples
            value = getattr(self, field)
            if not isinstance(value, (tuple, list)):
                raise InputTypeError(f"APISpec: {field} must be a tuple; got {type(value).__name__} {value!r}")
            object.__setattr__(self, field, tuple(value))
        for field in ("scores_kind", "data_set", "name"):
            if not isinstance(getattr(self, field), str):
                raise InputTypeError(f"APISpec: {field} must be a string; got {getattr(self, field)!r}")
        if not _is_integer(self.n_classes):
            raise InputTypeError(f"APISpec: n_classes must be an int; got {self.n_classes!r}")
        if self.n_classes < 2:
            raise InputError(f"APISpec: n_classes must be at least 2; got {self.n_classes}")
        if len(self.image_shape) != 3 or not all(_is_integer(size) and size > 0 for size in self.image_shape):
            raise InputError(f"APISpec: image_shape must be three positive ints (C, H, W); got {self.image_shape!r}")
        self._check_input_range()
        self._check_scores_kind()
        self._check_class_names()

    @property
    def names(self) -> tuple[str, ...]:
        """`class_names`, or `("class 0", "class 1", ...)` where none were given."""
        return self.class_names or tuple(f"class {index}" for index in range(self.n_classes))

    def from_unit(self, images: Tensor) -> Tensor:
        """Images `[..., C, H, W]` in unit range, mapped affinely into `input_range`; differentiable, never clamped."""
        low, high = self.input_range
        return images if (low, high) == (0.0, 1.0) else images * (high - low) + low

    def to_unit(self, images: Tensor) -> Tensor:
        """Images `[..., C, H, W]` in `input_range`, mapped affinely into unit range; differentiable, never clamped."""
        low, high = self.input_range
        return images if (low, high) == (0.0, 1.0) else (images - low) / (high - low)

    def _check_input_range(self) -> None:
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in self.input_range)
        if len(self.input_range) != 2 or not numbers or not all(math.isfinite(end) for end in self.input_range):
            raise InputError(f"APISpec: input_range must be two finite numbers (low, high); got {self.input_range!r}")
        low, high = (float(end) for end in self.input_range)
        if not low < high:
            raise InputError(f"APISpec: input_range must have low < high; got ({low:g}, {high:g})")
        object.__setattr__(self, "input_range", (low, high))

    def _check_scores_kind(self) -> None:
        kinds = ", ".join(SCORES_KINDS)
        if self.scores_kind == "top_k":
            raise InputError(f"APISpec: scores_kind 'top_k' is not supported yet; use one of {kinds}")
        if self.scores_kind not in SCORES_KINDS:
            raise InputError(f"APISpec: scores_kind must be one of {kinds}; got {self.scores_kind!r}")

    def _check_class_names(self) -> None:
        if not all(isinstance(name, str) for name in self.class_names):
            raise InputTypeError(f"APISpec: class_names must be strings; got {self.class_names!r}")
        if self.class_names and len(self.class_names) != self.n_classes:
            raise InputError(f"APISpec: {self.n_classes} class_names wanted (n_classes); got {len(self.class_names)}")
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError(f"APISpec: class_names must all be different; got {self.class_names!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
