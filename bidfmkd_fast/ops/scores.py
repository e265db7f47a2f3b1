"""Convert scores of any kind, and compute the recovery objective, in plain torch.

This is the specification of csrc/loss/objective.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of the enumerations ScoresKind and Divergence in csrc/loss/objective.h.
SCORES_KINDS = ("logits", "probabilities", "log_probabilities")
DIVERGENCES = ("l1", "l1_prob", "kl")
LOWEST_PROBABILITY = 1e-7  # an API may round a probability down to 0; -log of it must stay finite


def log_probabilities_of(scores: Tensor, scores_kind: str) -> Tensor:
    """Return log-probabilities along the last dimension.

    Probabilities below `LOWEST_PROBABILITY` count as `LOWEST_PROBABILITY`.
    """
    if scores_kind == "logits":
        return scores.log_softmax(-1)
    if scores_kind == "probabilities":
        return scores.clamp_min(LOWEST_PROBABILITY).log()
    return scores


def probabilities_of(scores: Tensor, scores_kind: str) -> Tensor:
    """Return probabilities along the last dimension."""
    if scores_kind == "logits":
        return scores.softmax(-1)
    return scores if scores_kind == "probabilities" else scores.exp()


def as_scores(logits: Tensor, scores_kind: str) -> Tensor:
    """Return logits `[..., n_classes]` as scores of the kind that an API gives."""
    if scores_kind == "probabilities":
        return logits.softmax(-1)
    return logits.log_softmax(-1) if scores_kind == "log_probabilities" else logits


def objective(
    scores: Tensor,
    labels: Tensor,
    student_scores: Tensor | None,
    boundary_weight: float,
    scores_kind: str,
    divergence: str,
) -> Tensor:
    """Return the recovery objective of every point: scores `[R, B, n_classes]` -> float64 `[R, B]`.

    For a point x with the wanted class y, the API A and the student f, the objective is

        CE(A(x), y) - boundary_weight * [argmax A(x) == argmax f(x)] * D(A(x), f(x))

    (paper, section 3.3). The student is asked once per image: `student_scores` is `[B, n_classes]`,
    of the same kind as `scores`.
    """
    scores = scores.double()
    log_p = log_probabilities_of(scores, scores_kind)
    loss = -log_p.gather(-1, labels.expand(scores.shape[:-1])[..., None])[..., 0]
    if student_scores is None or boundary_weight == 0.0:
        return loss
    student = student_scores.double()
    if divergence == "l1":
        distance = (scores - student).abs().sum(-1)
    elif divergence == "l1_prob":
        distance = (
            (probabilities_of(scores, scores_kind) - probabilities_of(student, scores_kind))
            .abs()
            .sum(-1)
        )
    else:
        p = probabilities_of(scores, scores_kind)
        terms = p * (log_p - log_probabilities_of(student, scores_kind))
        distance = torch.where(p == 0, 0.0, terms).sum(-1)  # 0 log 0 is 0
    agree = scores.argmax(-1) == student.argmax(-1)
    # Select with `where` instead of multiplying by 0 or 1: 0 times an infinite distance is NaN.
    return loss - boundary_weight * torch.where(agree, distance, 0.0)
