"""Prepare answers that are rounded or partial for the losses, and make a local API answer so."""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.ops.scores import log_probabilities_of


def usable(answer: Tensor, spec: APISpec) -> Tensor:
    """Convert an API's scores `[N, n_classes]` to scores of `spec.returned_kind` for the losses.

    - Top-k: a class that is missing from the answer is 0. The probability that is missing to a sum
      of 1 is spread evenly over these classes.
    - Rounded probabilities: each is raised to at least half a unit of the last decimal, the most
      that a 0 may have been before rounding. Otherwise a loss `-log p` would jump at the rounding
      edge, from the logarithm of one unit to that of the lowest probability that the losses allow,
      by far more than any step changes it.
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
    """Put scores `[N, k]` at the classes `labels` int64 `[N, k]` of `[N, n_classes]`, else 0."""
    return torch.zeros(len(scores), n_classes, dtype=scores.dtype).scatter(1, labels, scores)


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
