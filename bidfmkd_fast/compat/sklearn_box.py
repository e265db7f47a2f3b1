"""Make a black box of a scikit-learn estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bidfmkd_fast.black_box import Budget, FunctionBlackBox
from bidfmkd_fast.compat.box_spec import as_floats, shape_of, spec_of
from bidfmkd_fast.errors import InputError

Array = np.ndarray[Any, Any]

_OP = "from_sklearn"
# The method of an estimator that gives each kind of scores.
_METHODS = {
    "probabilities": "predict_proba",
    "top_k": "predict_proba",
    "log_probabilities": "predict_log_proba",
    "logits": "decision_function",
    "labels": "predict",
}


def from_sklearn(
    estimator: Any, image_shape: Sequence[int], *, budget: Budget | None = None, **spec: Any
) -> FunctionBlackBox:
    """Return a box that asks a fitted classifier with the interface of scikit-learn.

    The estimator gets float32 rows `[N, C * H * W]`, flattened in the order C, H, W, or H, W, C
    with `layout="NHWC"`. Its scores are the probabilities of `predict_proba`, or the logits of
    `decision_function` if it has no `predict_proba`. With `scores_kind="labels"` it is asked by
    `predict`. The single column of a decision between two classes becomes the logits `(0, d)`.

    Args:
        estimator: has `classes_`, which become `class_names`, and one of these methods.
        image_shape: `(C, H, W)` of the images that the box gets.
        budget: cap on what the box may cost.
        **spec: fields of `APISpec`.

    Raises:
        InputError: `estimator` is not fitted or lacks the method, it takes another number of
            features, its `decision_function` compares pairs of classes, or a field is wrong.
    """
    classes = getattr(estimator, "classes_", None)
    if classes is None or np.ndim(classes) != 1:
        raise InputError(
            f"{_OP}: wanted a fitted classifier, whose classes_ are [n_classes]; got a "
            f"{type(estimator).__name__} "
            + ("without classes_; fit it first" if classes is None else "of several outputs")
        )
    kind = spec["scores_kind"] if "scores_kind" in spec else _kind_of(estimator)
    method = _METHODS.get(kind, "")
    if method and not hasattr(estimator, method):
        raise InputError(
            f"{_OP}: a {type(estimator).__name__} has no {method}, which gives {kind}; choose "
            "another scores_kind"
        )
    if (
        method == "decision_function"
        and len(classes) > 2
        and getattr(_innermost(estimator), "decision_function_shape", "ovr") != "ovr"
    ):
        raise InputError(
            f"{_OP}: decision_function must give a score for each class; with "
            "decision_function_shape='ovo' it gives one for each pair; set 'ovr'"
        )
    derived = {
        "n_classes": len(classes),
        "image_shape": shape_of(_OP, image_shape),
        "class_names": tuple(str(name) for name in classes),
        "scores_kind": kind,
    }
    whole = spec_of(_OP, estimator, derived, spec)
    n_features, n_pixels = getattr(estimator, "n_features_in_", None), math.prod(whole.wire_shape)
    if n_features is not None and n_features != n_pixels:
        raise InputError(
            f"{_OP}: the estimator takes {n_features} features; images {whole.wire_shape} have "
            f"{n_pixels}; set image_shape, or server_shape for another size"
        )
    ask = getattr(estimator, method)
    answer = _answer_of(method, list(classes))
    return FunctionBlackBox(
        lambda images: answer(ask(as_floats(images.reshape(len(images), -1), whole))),
        whole,
        budget=budget,
        as_numpy=True,
    )


def _innermost(estimator: Any) -> Any:
    """Return the classifier inside pipelines, searches and the like."""
    while True:
        if steps := getattr(estimator, "steps", None):
            estimator = steps[-1][1]
            continue
        inside = getattr(estimator, "best_estimator_", getattr(estimator, "estimator_", None))
        if inside is None:
            return estimator
        estimator = inside


def _kind_of(estimator: Any) -> str:
    """Return the kind of scores to ask the estimator for."""
    for kind in ("probabilities", "logits"):
        if hasattr(estimator, _METHODS[kind]):
            return kind
    raise InputError(
        f"{_OP}: wanted an estimator with predict_proba or decision_function; got a "
        f"{type(estimator).__name__} without them"
        + (
            "; with scores_kind='labels' it is asked by predict"
            if hasattr(estimator, "predict")
            else ""
        )
    )


def _answer_of(method: str, classes: list[Any]) -> Callable[[Any], Any]:
    """Return the function that turns what `method` gives into scores or class numbers."""
    if method == "predict":
        number = {name: index for index, name in enumerate(classes)}
        return lambda labels: np.array([number[label] for label in labels], np.int64)
    if method == "decision_function" and len(classes) == 2:
        return lambda scores: np.stack([np.zeros_like(scores), scores], axis=1)
    return lambda scores: scores
