"""Read what a local function returns: tensors, arrays, nested lists, or labels with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.remote.reading import shown
from bidfmkd_fast.black_box.remote.v2 import class_numbers, place_labels
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer

Array = np.ndarray[Any, Any]


def as_tensor(answer: Any, spec: APISpec, n_images: int) -> Any:
    """Return what a function answered about `n_images` images as a tensor.

    The tensor holds scores `[N, n_classes]`, or class numbers `[N]` of an API of labels. Its shape
    and values are left to the checks of the box, and so is an answer that is no numbers at all.

    Raises:
        BadAnswer: lists are ragged or hold no numbers, an array has a dtype that is no real
            number, or labels with scores are incomplete, unknown or too few.
    """
    if isinstance(answer, Tensor):
        # The function may write its next answer into the same memory.
        return answer.detach().clone()
    if isinstance(answer, (list, tuple)):
        if per_image := _labelled(answer, spec, n_images):
            return _from_labels(per_image, spec)
        return _from_array(_array_of(answer, spec, n_images), spec, type(answer).__name__)
    if hasattr(answer, "__array__"):  # NumPy, and what JAX, TensorFlow and pandas return
        return _from_array(np.asarray(answer), spec, type(answer).__name__)
    return answer


def _array_of(answer: Sequence[Any], spec: APISpec, n_images: int) -> Array:
    """Return nested lists as an array of one or two axes."""
    try:
        array = np.array(answer)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise BadAnswer(
            f"{_wanted(spec, n_images)}; it answered a {type(answer).__name__} that is no array of "
            f"numbers (rows of different lengths?): {shown(answer)}"
        ) from None
    if array.ndim > 2:
        raise BadAnswer(
            f"{_wanted(spec, n_images)}; it answered a {type(answer).__name__} of shape "
            f"{list(array.shape)}"
        )
    return array


def _from_array(array: Array, spec: APISpec, given: str) -> Tensor:
    """Return an array of numbers, or of class names, as a tensor in memory of its own."""
    kind = array.dtype.kind
    if spec.labels_only and kind == "O" and all(isinstance(name, str) for name in array.ravel()):
        array, kind = array.astype(str), "U"
    if spec.labels_only and kind == "U":
        _check_names(spec, array.ravel()[0] if array.size else "")
        return class_numbers(spec.name, spec, array)
    if kind not in "fiu":
        raise BadAnswer(
            f"{spec.name}: the function must answer real numbers; it answered a {given} of dtype "
            f"{array.dtype}"
        )
    if kind in "iu" and spec.labels_only:
        return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))
    dtype = np.float32 if kind == "f" and array.dtype.itemsize <= 4 else np.float64
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _labelled(
    answer: Sequence[Any], spec: APISpec, n_images: int
) -> list[Sequence[Mapping[str, Any]]] | None:
    """Return one list of mappings per image; None if the answer holds no mappings.

    The answer about a single image may come without the outer list. An API of labels may give one
    mapping per image.
    """
    if answer and all(isinstance(item, Mapping) for item in answer):
        if n_images == 1:
            return [answer]
        if spec.labels_only:
            return [[item] for item in answer]
        raise BadAnswer(
            f"{spec.name}: the function must answer one list of labels with scores for each of "
            f"{n_images} images; it answered a single list of {len(answer)}"
        )
    first = next((item[0] for item in answer if isinstance(item, (list, tuple)) and item), None)
    if not isinstance(first, Mapping):
        return None
    for item in answer:
        if not isinstance(item, (list, tuple)) or not all(isinstance(x, Mapping) for x in item):
            raise BadAnswer(
                f"{spec.name}: the function must answer a list of labels with scores for each "
                f"image; one of its answers is {shown(item)}"
            )
    return list(answer)


def _from_labels(per_image: list[Sequence[Mapping[str, Any]]], spec: APISpec) -> Tensor:
    """Place scores by their labels; of an API of labels, return the likeliest class numbers."""
    sizes = {len(given) for given in per_image}
    if len(sizes) > 1 or 0 in sizes:
        raise BadAnswer(
            f"{spec.name}: the function must answer as many labels for each image; it answered "
            f"{min(sizes)} to {max(sizes)}"
        )
    try:
        names = [[item["label"] for item in given] for given in per_image]
        # The only label of an image needs no score where the label is all that is asked for.
        default = {"score": 1.0} if spec.labels_only and sizes == {1} else {}
        scores = np.array(
            [[float({**default, **item}["score"]) for item in given] for given in per_image]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(
            f"{spec.name}: the function must answer mappings with 'label' and 'score', a number; "
            f"it answered {shown(per_image[0][0])} ({type(error).__name__}: {error})"
        ) from None
    labels = np.array(names)
    if labels.dtype.kind not in "iuU":
        raise BadAnswer(
            f"{spec.name}: labels must be class names or numbers; got {shown(names[0][0])}"
        )
    if labels.dtype.kind == "U":
        _check_names(spec, names[0][0])
    n_given, n_wanted = labels.shape[1], spec.top_k or spec.n_classes
    if spec.labels_only:
        best = scores.argmax(1)[:, None]
        return class_numbers(spec.name, spec, np.take_along_axis(labels, best, 1))[:, 0]
    if n_given < n_wanted:
        raise BadAnswer(
            f"{spec.name}: the function must answer {n_wanted} labels for each image; it answered "
            f"{n_given}; ask it for all, or set scores_kind='top_k', top_k={n_given} in the spec"
        )
    if spec.top_k is not None:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :n_wanted]
        labels, scores = (np.take_along_axis(x, best, 1) for x in (labels, scores))
    return place_labels(spec.name, spec, torch.from_numpy(scores), labels)


def _check_names(spec: APISpec, example: object) -> None:
    """Raise BadAnswer if the spec has no class names to place a name by."""
    if not spec.class_names:
        raise BadAnswer(
            f"{spec.name}: the function answers class names, such as {shown(example, 60)}, but its "
            "spec has no class_names; give them in the order that the scores are to have"
        )


def _wanted(spec: APISpec, n_images: int) -> str:
    return f"{spec.name}: the API must answer finite scores [{n_images}, {spec.n_classes}]"
