"""Answers that are rounded or tell a few classes only, made fit for the losses; and how a local API gives such ones."""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.black_box.spec import APISpec

_PROBABILITY_FLOOR = 1e-7  # as in the losses


def usable(answer: Tensor, spec: APISpec) -> Tensor:
    """An API's scores `[N, n_classes]` as scores of `spec.returned_kind` that the losses can take.

    - top-k: a class that was not told is 0 in `answer`; what is missing to a sum of 1 is spread
      evenly over these.
    - rounded probabilities: at least half a unit of the last place, which is the most that a 0 may
      have been. Without that a loss `-log p` would jump by log(1e-7) at the rounding edge, far more
      than any step tells.
    """
    if spec.scores_kind == "top_k":
        answer = spread_missing_mass(answer)
    if spec.decimals is not None and spec.returned_kind == "probabilities":
        answer = answer.clamp(min=0.5 * 10.0**-spec.decimals)
    return answer


def spread_missing_mass(told: Tensor) -> Tensor:
    """Probabilities `[N, n]`, 0 where nothing was told -> the same with `1 - sum` spread evenly
    over the zeros.
    """
    untold = told == 0
    missing = (1 - told.sum(1, keepdim=True)).clamp(min=0)
    return torch.where(untold, missing / untold.sum(1, keepdim=True).clamp(min=1), told)


def place(scores: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Scores `[N, k]` of the classes `labels` int64 `[N, k]` -> `[N, n_classes]`, 0 where nothing
    was told.
    """
    return torch.zeros(len(scores), n_classes, dtype=scores.dtype).scatter(1, labels, scores)


def as_told(scores: Tensor, spec: APISpec) -> Tensor:
    """What an API of this spec tells of scores `[N, n_classes]`: rounded, and 0 for all but the
    `top_k` highest.
    """
    told = scores if spec.decimals is None else scores.round(decimals=spec.decimals)
    if spec.top_k is not None:
        best = scores.topk(spec.top_k, dim=1).indices  # before rounding, which makes ties
        told = torch.zeros_like(told).scatter(1, best, told.gather(1, best))
    return told


def log_probabilities(scores: Tensor, spec: APISpec) -> Tensor:
    """An API's scores `[..., n_classes]` as log-probabilities, floored as in the losses."""
    if spec.returned_kind == "probabilities":
        return scores.clamp(min=_PROBABILITY_FLOOR).log()
    return scores.log_softmax(-1) if spec.returned_kind == "logits" else scores
