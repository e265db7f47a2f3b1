"""Prepare rounded or partial answers for the losses; round and cut the answers of local APIs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer
from bidfmkd_fast.ops.scores import log_probabilities_of


def usable(answer: Tensor, spec: APISpec) -> Tensor:
    """Convert an API's scores `[N, n_classes]` to scores of `spec.returned_kind` for the losses.

    - Top-k: the classes that the answer leaves out are 0 in it. They share evenly what the other
      probabilities lack to a sum of 1.
    - Rounded probabilities: a 0 may have been up to half a unit of the last decimal before
      rounding, so each probability is raised to at least that much. Otherwise a loss `-log p` would
      jump where p is rounded down to 0: from minus the logarithm of one unit to minus that of the
      lowest probability that the losses allow. No step changes the loss by nearly as much.
    """
    if spec.scores_kind == "top_k":
        answer = spread_missing_mass(answer)
    if spec.decimals is not None and spec.returned_kind == "probabilities":
        answer = answer.clamp(min=0.5 * 10.0**-spec.decimals)
    return answer


def spread_missing_mass(given: Tensor) -> Tensor:
    """Spread what probabilities `[N, n]` lack to a sum of 1 evenly over the classes that are 0."""
    is_missing = given == 0
    missing = (1 - given.sum(1, keepdim=True)).clamp(min=0)
    return torch.where(is_missing, missing / is_missing.sum(1, keepdim=True).clamp(min=1), given)


def place(scores: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Return scores `[N, n_classes]`: `scores` `[N, k]` at the classes `labels` `[N, k]`, else 0.

    `labels` are int64.
    """
    return torch.zeros(len(scores), n_classes, dtype=scores.dtype).scatter(1, labels, scores)


def one_hot(answer: Tensor, spec: APISpec, n_images: int) -> Tensor:
    """Convert the answer of a labels-only API to scores, 1 for the class of an image and 0 for all
    other classes: float32 `[n_images, n_classes]`.

    Args:
        answer: class numbers `[n_images]` of any integer type, further axes of length 1 allowed, or
            numbers `[n_images, n_classes]` whose highest is at the class. Among equal highest
            scores the first counts, but a row of zeros and ones must have a single one.
        spec: what is known of the API.
        n_images: number of images that were asked about.

    Raises:
        BadAnswer: the answer is neither, a number is no class, or a row names no single class.
    """
    wanted = f"{spec.name}: the API must answer one label for each of {n_images} images"
    if not isinstance(answer, Tensor):
        raise BadAnswer(f"{wanted}; it answered a {type(answer).__name__}")
    fractional = answer.is_floating_point()
    if answer.is_complex() or answer.dtype == torch.bool:
        raise BadAnswer(f"{wanted}; it answered {answer.dtype}")
    if tuple(answer.shape) == (n_images, spec.n_classes):
        # Integers of 16 to 64 bits without a sign have few operations; float64 holds their order.
        numbers = answer.detach() if fractional else answer.detach().double()
        if not numbers.isfinite().all():
            raise BadAnswer(f"{wanted}; it answered NaN or infinity")
        is_mask = ((numbers == 0) | (numbers == 1)).all(1)
        if (is_mask & ((numbers == 1).sum(1) != 1)).any():
            raise BadAnswer(f"{wanted}; a row of zeros and ones must have a single one")
        labels = numbers.argmax(1)
    elif answer.shape[:1] == (n_images,) and answer.numel() == n_images and not fractional:
        labels = answer.detach().to(torch.int64).flatten()
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= spec.n_classes:
            raise BadAnswer(
                f"{spec.name}: labels must be from 0 to {spec.n_classes - 1}; got {low} to {high}"
            )
    else:
        raise BadAnswer(
            f"{wanted}, as integers [{n_images}] or numbers [{n_images}, {spec.n_classes}]; it "
            f"answered {answer.dtype} {list(answer.shape)}{advice_on_rows(answer.shape, n_images)}"
        )
    return torch.nn.functional.one_hot(labels, spec.n_classes).to(torch.float32)


def advice_on_rows(shape: Sequence[int], n_images: int) -> str:
    """Return what to do about an answer of `shape` that has too few rows; empty if it has not."""
    if not 0 < len(shape) <= 2 or not 0 < shape[0] < n_images:
        return ""
    return (
        f"; it must answer a row for each image; if it takes at most {shape[0]} images at once, "
        f"set max_batch={shape[0]} in the spec"
    )


def as_answered(scores: Tensor, spec: APISpec) -> Tensor:
    """Return what an API of this spec answers instead of exact scores `[N, n_classes]`.

    Scores are rounded to `decimals`; all but the `top_k` highest are 0.
    """
    rounded = scores if spec.decimals is None else scores.round(decimals=spec.decimals)
    if spec.top_k is None:
        return rounded
    # Choose the highest before rounding, which makes ties.
    best = scores.topk(spec.top_k, dim=1).indices
    return torch.zeros_like(rounded).scatter(1, best, rounded.gather(1, best))


def log_probabilities(scores: Tensor, spec: APISpec) -> Tensor:
    """Convert an API's scores `[..., n_classes]` to log-probabilities, floored as in the losses."""
    return log_probabilities_of(scores, spec.returned_kind)
