"""Describe an API before it is asked: classes, images it takes, scores it returns, price."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops import scores
from bidfmkd_fast.settings import check_least, check_most, check_types

SCORES_KINDS = (*scores.SCORES_KINDS, "top_k", "labels")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "uint8")
ENCODINGS = ("raw", "png", "jpeg")

# Most numbers of an image: 256 MB in float32, and a step of a recovery holds hundreds of images.
_MOST_NUMBERS = 1 << 26
# Forty times as many as the largest public data sets have. Every answer holds a score for each.
_MOST_CLASSES = 1_000_000
# Rounding multiplies scores by 10^decimals, which float32 cannot hold from 39 decimals on: all
# scores became NaN. No score of float32 has so many decimals that matter.
MOST_DECIMALS = 20
_MEANING_LABELS = ("label", "hard_labels", "hard_label", "top_1")
# What probes, logs and reports say of an API that gives labels only.
NOTHING_RECOVERED = "recovery recovers nothing from it: a label alone gives no gradient"


@dataclass(frozen=True)
class APISpec:
    """The public description of an API.

    A black box gets images `[N, *image_shape]` in `input_range`. The fields from `server_shape` to
    `std` say how a service, an ONNX file or a `FunctionBlackBox` wants them on the wire, in this
    order: resampled, with its number of channels, normalised, in its dtype, layout and encoding.
    Torch modules in this process get images as they are.

    >>> spec = APISpec(2, (3, 32, 32), scores_kind="probabilities", decimals=4, layout="NHWC")
    >>> spec.returned_kind, spec.wire_shape
    ('probabilities', ...)

    Args:
        n_classes: number of scores per image, from 2 to 1,000,000.
        image_shape: `(C, H, W)` of the images that the black box gets.
        input_range: `(low, high)` that the API's pixel values span; unit range `(0, 1)` by
            default.
        scores_kind: `"logits"`, `"probabilities"`, `"log_probabilities"`, `"top_k"` (the
            probabilities of the `top_k` likeliest classes; the black box spreads the missing
            probability evenly over the others, see `returned_kind`) or `"labels"` (only the class
            of each image; the black box returns 1 for it and 0 for the others).
        class_names: names of the classes in the order of the scores, all different; empty if
            unknown.
        data_set: name of the data set that the classes are from; empty if unknown.
        name: name of the API in errors and reports.
        server_shape: `(C, H, W)` that the service wants, if that is not `image_shape`. The client
            then resamples (bilinear, antialiased) and repeats a grey channel or takes the luma of
            three. None for `image_shape`.
        layout: `"NCHW"` or `"NHWC"`, of raw arrays.
        dtype: `"float32"`, or `"uint8"`: `input_range` is mapped onto 0..255 and rounded.
        encoding: `"raw"` arrays, or each image as a `"png"` or `"jpeg"` file. Files hold 8 bits per
            channel.
        mean, std: per channel of the service, in units of `input_range`: the client sends
            `(x - mean) / std`. Both or neither; empty if the service normalises by itself.
        decimals: decimals to which the API rounds its scores, at most 20; None if it does not, and
            with labels.
        top_k: number of classes in an answer with `scores_kind="top_k"`, from 2 to `n_classes`;
            None with all other kinds.
        max_batch: most images per request; None if unknown.
        price_per_1000: price of 1000 queries, in a currency of the caller's choice.

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
        for field in ("image_shape", "server_shape", "input_range", "class_names", "mean", "std"):
            value = getattr(self, field)
            if isinstance(value, list):  # lists come from YAML; a frozen spec holds tuples
                object.__setattr__(self, field, tuple(value))
        check_types(self)
        for field, text in (("name", self.name), ("data_set", self.data_set)):
            if not text.isprintable():  # reports, tables and warnings are made of lines
                raise InputError(f"APISpec: {field} must be one line of text; got {text!a}")
        least = {"n_classes": 2, "decimals": 0, "max_batch": 1}
        check_least(self, **{k: low for k, low in least.items() if getattr(self, k) is not None})
        check_most(self, n_classes=_MOST_CLASSES)
        if self.decimals is not None:
            check_most(self, decimals=MOST_DECIMALS)
        self._check_shapes()
        self._check_input_range()
        self._check_scores_kind()
        self._check_class_names()
        self._check_wire()
        self._check_normalisation()
        if not 0 <= self.price_per_1000 < math.inf:
            raise InputError(
                "APISpec: price_per_1000 must be finite and at least 0; "
                f"got {self.price_per_1000!r}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Return `class_names`, or `("class 0", "class 1", ...)` if none were given."""
        return self.class_names or tuple(f"class {index}" for index in range(self.n_classes))

    @property
    def returned_kind(self) -> str:
        """Return the kind of scores that a black box returns: `scores_kind`, or for top-k answers
        and labels probabilities, since the black box fills in the classes that are left out.
        """
        return "probabilities" if self.scores_kind in ("top_k", "labels") else self.scores_kind

    @property
    def labels_only(self) -> bool:
        """Return True if the API gives only the class of each image.

        A label does not change when an image moves a little, so no gradient can be estimated from
        it. The survey learns from labels; recovery cannot.
        """
        return self.scores_kind == "labels"

    @property
    def wire_shape(self) -> tuple[int, int, int]:
        """Return `(C, H, W)` of the images on the wire."""
        return self.image_shape if self.server_shape is None else self.server_shape

    @property
    def is_8_bit(self) -> bool:
        """Return True if images have 8 bits per channel on the wire."""
        return self.dtype == "uint8" or self.encoding != "raw"

    def from_unit(self, images: Tensor) -> Tensor:
        """Map images `[..., C, H, W]` from unit range affinely into `input_range`.

        Differentiable; values are never clamped.
        """
        low, high = self.input_range
        return images if (low, high) == (0.0, 1.0) else images * (high - low) + low

    def to_unit(self, images: Tensor) -> Tensor:
        """Map images `[..., C, H, W]` from `input_range` affinely into unit range.

        Differentiable; values are never clamped.
        """
        low, high = self.input_range
        return images if (low, high) == (0.0, 1.0) else (images - low) / (high - low)

    def _check_shapes(self) -> None:
        for field in ("image_shape", "server_shape"):
            shape = getattr(self, field)
            if shape is None:
                continue
            if len(shape) != 3 or min(shape) < 1:
                raise InputError(
                    f"APISpec: {field} must be three positive ints (C, H, W); got {shape!r}"
                )
            if math.prod(shape) > _MOST_NUMBERS:
                raise InputError(
                    f"APISpec: {field} must have at most {_MOST_NUMBERS:,} numbers an image; "
                    f"got {shape!r}, {math.prod(shape):,}"
                )

    def _check_input_range(self) -> None:
        if len(self.input_range) != 2 or not all(math.isfinite(end) for end in self.input_range):
            raise InputError(
                "APISpec: input_range must be two finite numbers (low, high); "
                f"got {self.input_range!r}"
            )
        low, high = (float(end) for end in self.input_range)
        if not low < high:
            raise InputError(f"APISpec: input_range must have low < high; got ({low:g}, {high:g})")
        object.__setattr__(self, "input_range", (low, high))

    def _check_scores_kind(self) -> None:
        if self.scores_kind in _MEANING_LABELS:
            raise InputError(
                f"APISpec: got scores_kind {self.scores_kind!r}; an API that gives only the class "
                "of each image has scores_kind 'labels'"
            )
        _check_choice("scores_kind", self.scores_kind, SCORES_KINDS)
        if (self.scores_kind == "top_k") != (self.top_k is not None):
            raise InputError(
                "APISpec: top_k, the number of classes in an answer, goes with scores_kind='top_k' "
                f"and with no other; got top_k={self.top_k!r} with scores_kind={self.scores_kind!r}"
            )
        if self.top_k is not None and self.top_k < 2:
            raise InputError(
                "APISpec: top_k must be at least 2 (a single class and its score hardly guide the "
                f"others); got {self.top_k}"
            )
        if self.top_k is not None and self.top_k > self.n_classes:
            raise InputError(
                f"APISpec: top_k must be at most n_classes={self.n_classes}; got {self.top_k}"
            )
        if self.labels_only and self.decimals is not None:
            raise InputError(
                f"APISpec: labels have no decimals; got decimals={self.decimals} with "
                "scores_kind='labels'; leave decimals out"
            )
        if self.decimals == 0 and self.returned_kind == "probabilities":
            raise InputError(
                "APISpec: probabilities with decimals=0 are labels, and a label alone gives no "
                "gradient; ask the service for more decimals, or set scores_kind='labels', from "
                "which the survey alone can learn"
            )

    def _check_class_names(self) -> None:
        if self.class_names and len(self.class_names) != self.n_classes:
            raise InputError(
                f"APISpec: class_names must have n_classes={self.n_classes} names; "
                f"got {len(self.class_names)}"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError(
                f"APISpec: class_names must all be different; got {self.class_names!r}"
            )

    def _check_wire(self) -> None:
        for field, known in (("layout", LAYOUTS), ("dtype", DTYPES), ("encoding", ENCODINGS)):
            _check_choice(field, getattr(self, field), known)
        here, there = self.image_shape[0], self.wire_shape[0]
        if here != there and {here, there} != {1, 3}:
            raise InputError(
                f"APISpec: images of {here} channels cannot be sent as {there}; only 1 as 3 and "
                "3 as 1"
            )
        if self.encoding == "raw":
            return
        if there not in (1, 3):
            raise InputError(
                f"APISpec: encoding {self.encoding!r} holds 1 or 3 channels; got {there}"
            )
        if self.layout != "NCHW":
            raise InputError(f"APISpec: layout is for raw arrays; encoding is {self.encoding!r}")

    def _check_normalisation(self) -> None:
        if not self.mean and not self.std:
            return
        if self.is_8_bit:
            raise InputError(
                "APISpec: mean and std need raw float32 images; 8-bit ones are normalised by the "
                "service"
            )
        if not (self.mean and self.std):
            given, value, advice = (
                ("mean", self.mean, "std too, or 1.0 per channel if the service divides by nothing")
                if self.mean
                else ("std", self.std, "mean too, or 0.0 per channel if the service subtracts none")
            )
            raise InputError(
                "APISpec: mean and std go together, since the client sends (x - mean) / std; got "
                f"{given}={value!r} alone; give {advice}"
            )
        n_channels = self.wire_shape[0]
        for field, least, above in (("mean", -math.inf, ""), ("std", 0.0, " above 0")):
            values: tuple[float, ...] = getattr(self, field)
            if len(values) != n_channels or not all(least < value < math.inf for value in values):
                raise InputError(
                    f"APISpec: {field} must be {n_channels} finite numbers{above}, one per "
                    f"channel; got {values!r}"
                )


def _check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"APISpec: {field} must be one of {', '.join(known)}; got {value!r}")
