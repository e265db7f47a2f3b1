"""What is known of an API before it is asked: its classes, the images it takes, the scores it returns, its price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError

SCORES_KINDS = ("logits", "probabilities", "log_probabilities", "top_k")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "uint8")
ENCODINGS = ("raw", "png", "jpeg")

_MOST_NUMBERS = 1 << 26  # of one image: 256 MB; a step holds hundreds of images
_LABELS_ONLY = ("labels", "label", "hard_labels", "hard_label", "top_1")


@dataclass(frozen=True)
class APISpec:
    """The public description of an API.

    A black box is given images `[N, *image_shape]` in `input_range`; the fields from `server_shape`
    to `std` say how a service wants them on the wire, in this order: resampled and with its number
    of channels, normalised, in its dtype, layout and encoding.

    Args:
        n_classes: number of scores per image, at least 2.
        image_shape: `(C, H, W)` of the images it is given.
        input_range: `(low, high)` that the API's pixel values span; unit range `(0, 1)` unless
            told.
        scores_kind: `"logits"`, `"probabilities"`, `"log_probabilities"` or `"top_k"` (the
            probabilities of the `top_k` likeliest classes; the black box spreads the missing mass
            evenly over the others, see `returned_kind`).
        class_names: the classes' names in the order of the scores, all different; empty when
            unknown.
        data_set: name of the data set the classes are from; empty when unknown.
        name: what errors and reports call the API.
        server_shape: `(C, H, W)` the service wants where that is not `image_shape`: the client
            resamples (bilinear, antialiased), repeats a grey channel or takes the luma of three.
            None for `image_shape`.
        layout: `"NCHW"` or `"NHWC"`, of raw arrays.
        dtype: `"float32"`, or `"uint8"`: `input_range` is mapped onto 0..255 and rounded.
        encoding: `"raw"` arrays, or each image as a `"png"` or `"jpeg"` file; files hold 8 bits per
            channel.
        mean, std: per channel of the service, in units of `input_range`: the client sends `(x -
            mean) / std`. Empty when the service normalises by itself.
        decimals: places after the point to which the API rounds its scores; None when it does not.
        top_k: with `scores_kind="top_k"` how many classes it tells, from 2 to n_classes; None with
            all others.
        max_batch: most images per request; None when unknown.
        price_per_1000: what 1000 queries cost, in a currency of the caller's choice.

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
    server_shape: tuple[int, int, int] | None = None
    layout: str = "NCHW"
    dtype: str = "float32"
    encoding: str = "raw"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decimals: int | None = None
    top_k: int | None = None
    max_batch: int | None = None
    price_per_1000: float = 0.0

    def __post_init__(self) -> None:
        for field in ("image_shape", "input_range", "class_names", "mean", "std", "server_shape"):
            value = getattr(self, field)  # lists come from YAML; a frozen spec holds tuples
            if field == "server_shape" and value is None:
                continue
            if not isinstance(value, (tuple, list)):
                raise InputTypeError(
                    f"APISpec: {field} must be a tuple; got {type(value).__name__} {value!r}"
                )
            object.__setattr__(self, field, tuple(value))
        for field in ("scores_kind", "data_set", "name", "layout", "dtype", "encoding"):
            if not isinstance(getattr(self, field), str):
                raise InputTypeError(
                    f"APISpec: {field} must be a string; got {getattr(self, field)!r}"
                )
        _check_integer("n_classes", self.n_classes, 2)
        for field in ("image_shape", "server_shape"):
            shape = getattr(self, field)
            if shape is not None and (
                len(shape) != 3 or not all(_is_integer(size) and size > 0 for size in shape)
            ):
                raise InputError(
                    f"APISpec: {field} must be three positive ints (C, H, W); got {shape!r}"
                )
            if shape is not None and math.prod(shape) > _MOST_NUMBERS:
                raise InputError(
                    f"APISpec: {field} must have at most {_MOST_NUMBERS:,} numbers an image; "
                    f"got {shape!r}, {math.prod(shape):,}"
                )
        self._check_input_range()
        self._check_scores_kind()
        self._check_class_names()
        self._check_wire()
        if self.max_batch is not None:
            _check_integer("max_batch", self.max_batch, 1)
        if not _is_number(self.price_per_1000):
            raise InputTypeError(
                f"APISpec: price_per_1000 must be a number; got {self.price_per_1000!r}"
            )
        if not 0 <= self.price_per_1000 < math.inf:
            raise InputError(
                f"APISpec: price_per_1000 must be finite and at least 0; got {self.price_per_1000!r}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """`class_names`, or `("class 0", "class 1", ...)` where none were given."""
        return self.class_names or tuple(f"class {index}" for index in range(self.n_classes))

    @property
    def returned_kind(self) -> str:
        """The kind of the scores that a black box returns: `scores_kind`, but probabilities for
        top-k answers.
        """
        return "probabilities" if self.scores_kind == "top_k" else self.scores_kind

    @property
    def wire_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images on the wire."""
        return self.image_shape if self.server_shape is None else self.server_shape

    @property
    def is_8_bit(self) -> bool:
        """Whether the wire holds 8 bits per channel."""
        return self.dtype == "uint8" or self.encoding != "raw"

    def from_unit(self, images: Tensor) -> Tensor:
        """Images `[..., C, H, W]` in unit range, mapped affinely into `input_range`;
        differentiable, never clamped.
        """
        low, high = self.input_range
        return images if (low, high) == (0.0, 1.0) else images * (high - low) + low

    def to_unit(self, images: Tensor) -> Tensor:
        """Images `[..., C, H, W]` in `input_range`, mapped affinely into unit range;
        differentiable, never clamped.
        """
        low, high = self.input_range
        return images if (low, high) == (0.0, 1.0) else (images - low) / (high - low)

    def _check_input_range(self) -> None:
        numbers = all(_is_number(end) for end in self.input_range)
        if (
            len(self.input_range) != 2
            or not numbers
            or not all(math.isfinite(end) for end in self.input_range)
        ):
            raise InputError(
                f"APISpec: input_range must be two finite numbers (low, high); got {self.input_range!r}"
            )
        low, high = (float(end) for end in self.input_range)
        if not low < high:
            raise InputError(f"APISpec: input_range must have low < high; got ({low:g}, {high:g})")
        object.__setattr__(self, "input_range", (low, high))

    def _check_scores_kind(self) -> None:
        if self.scores_kind in _LABELS_ONLY:
            raise InputError(
                f"APISpec: scores_kind {self.scores_kind!r} cannot be used: a label alone does not change when an "
                "image moves a little, so its answers give no gradient; ask the service for scores"
            )
        _check_choice("scores_kind", self.scores_kind, SCORES_KINDS)
        if (self.scores_kind == "top_k") != (self.top_k is not None):
            raise InputError(
                "APISpec: top_k, the number of classes told, goes with scores_kind='top_k' and with no other; "
                f"got top_k={self.top_k!r} with scores_kind={self.scores_kind!r}"
            )
        if self.top_k is not None:
            _check_integer(
                "top_k", self.top_k, 2, " (a single class and its score hardly guide the others)"
            )
            if self.top_k > self.n_classes:
                raise InputError(
                    f"APISpec: top_k must be at most n_classes={self.n_classes}; got {self.top_k}"
                )
        if self.decimals is not None:
            _check_integer("decimals", self.decimals, 0)
            if self.decimals == 0 and self.returned_kind == "probabilities":
                raise InputError(
                    "APISpec: probabilities without decimals are labels; a label alone gives no gradient"
                )

    def _check_class_names(self) -> None:
        if not all(isinstance(name, str) for name in self.class_names):
            raise InputTypeError(f"APISpec: class_names must be strings; got {self.class_names!r}")
        if self.class_names and len(self.class_names) != self.n_classes:
            raise InputError(
                f"APISpec: {self.n_classes} class_names wanted (n_classes); got {len(self.class_names)}"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError(
                f"APISpec: class_names must all be different; got {self.class_names!r}"
            )

    def _check_wire(self) -> None:
        for field, known in (("layout", LAYOUTS), ("dtype", DTYPES), ("encoding", ENCODINGS)):
            _check_choice(field, getattr(self, field), known)
        ours, its = self.image_shape[0], self.wire_shape[0]
        if ours != its and {ours, its} != {1, 3}:
            raise InputError(
                f"APISpec: images of {ours} channels cannot be sent as {its}; only 1 as 3 and 3 as 1"
            )
        if self.encoding != "raw":
            if its not in (1, 3):
                raise InputError(
                    f"APISpec: encoding {self.encoding!r} holds 1 or 3 channels; got {its}"
                )
            if self.layout != "NCHW":
                raise InputError(
                    f"APISpec: layout is for raw arrays; encoding is {self.encoding!r}"
                )
        if not self.mean and not self.std:
            return
        if self.is_8_bit:
            raise InputError(
                "APISpec: mean and std need raw float32 images; 8-bit ones are normalised by the service"
            )
        for field in ("mean", "std"):
            values: Sequence[Any] = getattr(self, field)
            fits = all(_is_number(value) and math.isfinite(value) for value in values)
            if (
                len(values) != its
                or not fits
                or (field == "std" and not all(value > 0 for value in values))
            ):
                above = " above 0" if field == "std" else ""
                raise InputError(
                    f"APISpec: {field} must be {its} finite numbers{above}, one per channel; got {values!r}"
                )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_integer(field: str, value: Any, least: int, why: str = "") -> None:
    if not _is_integer(value):
        raise InputTypeError(f"APISpec: {field} must be an int; got {value!r}")
    if value < least:
        raise InputError(f"APISpec: {field} must be at least {least}{why}; got {value}")


def _check_choice(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"APISpec: {field} must be one of {', '.join(known)}; got {value!r}")
