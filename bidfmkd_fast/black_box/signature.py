"""Recognise what scores look like, whatever the spec says: their kind, their rounding, their order.

These functions look at one answer only. `first_answers` compares what they find with the spec, and
`probe` reports it.
"""

from __future__ import annotations

from torch import Tensor

from bidfmkd_fast.black_box.spec import APISpec

# How far the sum of probabilities may be from 1, on top of what rounding takes.
SUM_TOLERANCE = 0.05
_MOST_DECIMALS = 6  # float32 holds no more of a probability


def kind_of(scores: Tensor) -> str:
    """Return the kind that scores `[N, n_classes]` look like.

    The kinds are "labels" (a single 1 per image, all other scores 0), "probabilities",
    "log_probabilities" and, for all other scores, "logits".
    """
    zero_or_one = ((scores == 0) | (scores == 1)).all() and bool((scores.sum(1) == 1).all())
    if zero_or_one:
        return "labels"
    if (scores >= 0).all() and (scores.sum(1) - 1).abs().max() < SUM_TOLERANCE:
        return "probabilities"
    if (scores <= 1e-6).all() and scores.double().logsumexp(1).abs().max() < SUM_TOLERANCE:
        return "log_probabilities"
    return "logits"


def decimals_of(scores: Tensor) -> int | None:
    """Return the fewest decimals that hold all of the scores; None if they need float32."""
    values = scores.detach().double()
    for decimals in range(1, _MOST_DECIMALS + 1):
        rounded = values.round(decimals=decimals)
        # A score that was rounded differs from the decimal number by the rounding of float32 at
        # most. A 0 may have been raised to half a unit of the last decimal (see `answers.usable`).
        at_floor = (values - 0.5 * 10.0**-decimals).abs() < 1e-9
        if (((values - rounded).abs() <= 1e-7 * values.abs().clamp(min=1e-3)) | at_floor).all():
            return decimals
    return None


def are_probabilities(scores: Tensor) -> bool:
    """Return True if no score is negative and all rows sum to 1, up to the rounding they show."""
    values = scores.detach().double()
    decimals = decimals_of(scores)
    rounding = 0.0 if decimals is None else 0.5 * 10.0**-decimals * values.shape[1]
    return bool(
        (values >= 0).all()
        and (values.sum(1) - 1).abs().max() < min(SUM_TOLERANCE, 2e-3 + rounding)
    )


def are_sorted(scores: Tensor) -> bool:
    """Return True if every row of `[N, n_classes]` falls, or every row rises, over the classes."""
    steps = scores.diff(dim=1)
    moving = bool((scores.amax(1) > scores.amin(1)).all())
    return moving and bool((steps <= 0).all() or (steps >= 0).all())


def is_one_hot(scores: Tensor, spec: APISpec) -> bool:
    """Return True if each row of `[N, n_classes]` gives one class all the probability.

    A 0 counts as 0 also where `answers.usable` has raised it to half a unit of the last decimal.
    """
    if spec.returned_kind == "log_probabilities":
        scores = scores.exp()
    floor = 0.0 if spec.decimals is None else 0.5 * 10.0**-spec.decimals
    top = scores == 1
    return bool(
        (top.sum(1) == 1).all() and (top | (scores == 0) | ((scores - floor).abs() < 1e-9)).all()
    )
