"""Check what APISpec refuses, and its maps between unit range and the input range."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bidfmkd_fast.black_box import SCORES_KINDS, APISpec
from bidfmkd_fast.errors import InputError, InputTypeError


def test_defaults_and_names() -> None:
    spec = APISpec(3, (1, 28, 28))
    assert (spec.input_range, spec.scores_kind, spec.class_names) == ((0.0, 1.0), "logits", ())
    assert spec.names == ("class 0", "class 1", "class 2")
    assert APISpec(2, (1, 8, 8), class_names=("cat", "dog")).names == ("cat", "dog")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.n_classes = 4  # type: ignore[misc]


def test_lists_as_read_from_a_file_become_tuples() -> None:
    spec = APISpec(2, [3, 8, 9], [-1, 1], class_names=["a", "b"])  # type: ignore[arg-type]
    assert spec == APISpec(2, (3, 8, 9), (-1.0, 1.0), class_names=("a", "b"))
    assert hash(spec) == hash(APISpec(2, (3, 8, 9), (-1.0, 1.0), class_names=("a", "b")))


@pytest.mark.parametrize("kind", SCORES_KINDS)
def test_every_scores_kind_is_taken(kind: str) -> None:
    spec = APISpec(2, (1, 1, 1), scores_kind=kind, top_k=2 if kind == "top_k" else None)
    assert spec.scores_kind == kind
    assert spec.returned_kind == ("probabilities" if kind in ("top_k", "labels") else kind)


def test_the_wire_as_stated() -> None:
    spec = APISpec(5, [1, 28, 28], server_shape=[3, 32, 32], mean=[0.5] * 3, std=[0.2] * 3)  # type: ignore[arg-type]
    assert spec.wire_shape == (3, 32, 32) and not spec.is_8_bit
    assert hash(spec) == hash(
        APISpec(5, (1, 28, 28), server_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    )
    assert APISpec(5, (1, 28, 28)).wire_shape == (1, 28, 28)
    assert (
        APISpec(5, (1, 28, 28), dtype="uint8").is_8_bit
        and APISpec(5, (1, 28, 28), encoding="png").is_8_bit
    )


@pytest.mark.parametrize("kind", ["label", "hard_labels", "top_1"])
def test_other_words_for_labels_are_refused_with_the_right_one(kind: str) -> None:
    with pytest.raises(InputError, match=f"got scores_kind '{kind}'; .* has scores_kind 'labels'"):
        APISpec(5, (1, 28, 28), scores_kind=kind)


def test_a_box_of_labels_returns_probabilities() -> None:
    spec = APISpec(5, (1, 28, 28), scores_kind="labels")
    assert spec.labels_only and spec.returned_kind == "probabilities"
    assert not APISpec(5, (1, 28, 28), scores_kind="top_k", top_k=2).labels_only
    with pytest.raises(InputError, match="labels have no decimals; got decimals=2"):
        APISpec(5, (1, 28, 28), scores_kind="labels", decimals=2)
    with pytest.raises(InputError, match="got top_k=2 with scores_kind='labels'"):
        APISpec(5, (1, 28, 28), scores_kind="labels", top_k=2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.1, 2.6)])
def test_maps_are_affine_inverse_and_never_clamp(low: float, high: float) -> None:
    spec = APISpec(2, (1, 1, 1), (low, high))
    unit = torch.tensor([-0.25, 0.0, 0.5, 1.0, 1.25]).reshape(5, 1, 1, 1).requires_grad_()
    inside = spec.from_unit(unit)
    wanted = torch.tensor(
        [low + (high - low) * value for value in (-0.25, 0.0, 0.5, 1.0, 1.25)]
    ).reshape(5, 1, 1, 1)
    torch.testing.assert_close(inside, wanted)
    torch.testing.assert_close(spec.to_unit(inside), unit)
    (gradient,) = torch.autograd.grad(inside.sum(), unit)
    torch.testing.assert_close(gradient, torch.full_like(unit, high - low))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_classes": 1}, InputError, "at least 2"),
        ({"n_classes": 2.0}, InputTypeError, "n_classes must be of type int"),
        ({"n_classes": True}, InputTypeError, "n_classes must be of type int"),
        ({"image_shape": (28, 28)}, InputError, r"\(C, H, W\)"),
        ({"image_shape": (1, 0, 28)}, InputError, "positive"),
        ({"image_shape": (1, 28.0, 28)}, InputTypeError, "image_shape must be of type"),
        ({"image_shape": 28}, InputTypeError, "image_shape must be of type tuple"),
        ({"input_range": (1.0, 0.0)}, InputError, "low < high"),
        ({"input_range": (0.0, 0.0)}, InputError, "low < high"),
        ({"input_range": (0.0, float("nan"))}, InputError, "finite"),
        ({"input_range": (0.0, float("inf"))}, InputError, "finite"),
        ({"input_range": (0.0,)}, InputError, "two finite numbers"),
        ({"input_range": ("0", "1")}, InputTypeError, "input_range must be of type"),
        (
            {"scores_kind": "top_k"},
            InputError,
            "top_k, the number of classes in an answer, goes with",
        ),
        ({"top_k": 2}, InputError, "goes with scores_kind='top_k'"),
        ({"scores_kind": "top_k", "top_k": 1}, InputError, "top_k must be at least 2"),
        ({"scores_kind": "top_k", "top_k": 3}, InputError, "at most n_classes=2"),
        ({"decimals": -1}, InputError, "decimals must be at least 0"),
        ({"decimals": 21}, InputError, "decimals must be at most 20; got 21"),
        ({"n_classes": 10**9}, InputError, "n_classes must be at most 1,000,000; got 1000000000"),
        ({"decimals": 2.0}, InputTypeError, "decimals must be of type int"),
        (
            {"scores_kind": "probabilities", "decimals": 0},
            InputError,
            "with decimals=0 are labels",
        ),
        ({"max_batch": 0}, InputError, "max_batch must be at least 1"),
        ({"price_per_1000": -1.0}, InputError, "price_per_1000 must be finite and at least 0"),
        ({"price_per_1000": "1"}, InputTypeError, "price_per_1000 must be of type float"),
        ({"server_shape": (28, 28)}, InputError, r"server_shape must be three positive ints"),
        ({"server_shape": (2, 28, 28)}, InputError, "images of 1 channels cannot be sent as 2"),
        ({"layout": "HWC"}, InputError, "layout must be one of NCHW, NHWC"),
        ({"dtype": "float16"}, InputError, "dtype must be one of float32, uint8"),
        ({"encoding": "webp"}, InputError, "encoding must be one of raw, png, jpeg"),
        ({"encoding": "png", "layout": "NHWC"}, InputError, "layout is for raw arrays"),
        (
            {"encoding": "png", "image_shape": (2, 28, 28)},
            InputError,
            "holds 1 or 3 channels; got 2",
        ),
        (
            {"mean": (0.5,), "std": (1.0,), "dtype": "uint8"},
            InputError,
            "8-bit ones are normalised by the service",
        ),
        (
            {"mean": (0.5,)},
            InputError,
            r"go together.*; got mean=\(0.5,\) alone; give std too, or 1.0 per channel",
        ),
        (
            {"std": (0.2,)},
            InputError,
            r"go together.*; got std=\(0.2,\) alone; give mean too, or 0.0 per channel",
        ),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, InputError, "mean must be 1 finite numbers"),
        ({"mean": (0.5,), "std": (0.0,)}, InputError, "std must be 1 finite numbers above 0"),
        (
            {"scores_kind": "softmax"},
            InputError,
            "must be one of logits, probabilities, log_probabilities, top_k, labels; got 'softmax'",
        ),
        ({"scores_kind": None}, InputTypeError, "scores_kind must be of type str"),
        ({"class_names": ("a",)}, InputError, "n_classes=2 names; got 1"),
        ({"class_names": ("a", "a")}, InputError, "different"),
        ({"class_names": ("a", 1)}, InputTypeError, "class_names must be of type"),
        ({"class_names": "ab"}, InputTypeError, "class_names must be of type tuple"),
        ({"name": 3}, InputTypeError, "name must be of type str"),
        ({"data_set": None}, InputTypeError, "data_set must be of type str"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    fields: dict[str, Any] = {"n_classes": 2, "image_shape": (1, 28, 28)} | changes
    with pytest.raises(error, match=message) as raised:
        APISpec(**fields)
    assert "\n" not in str(raised.value)
