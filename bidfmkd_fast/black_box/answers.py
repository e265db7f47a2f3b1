"""Prepare rounded or partial answers for the losses; round and cut the answers of local APIs."""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.black_box.spec import APISpec
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
