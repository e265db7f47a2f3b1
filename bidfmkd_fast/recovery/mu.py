"""Choose the step length (mu) of the gradient estimates; warn if it is too small for the API.

`black_box.step_length` measures which steps an API resolves; here a recovery picks one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, BlackBox
from bidfmkd_fast.black_box.signature import is_one_hot
from bidfmkd_fast.black_box.step_length import N_IMAGES, measure_steps, too_short, unmoved
from bidfmkd_fast.errors import InputTypeError, PrecisionWarning

if TYPE_CHECKING:
    from bidfmkd_fast.recovery.journal import Journal

AUTO = "auto"
_UNMOVED = 0.5  # share of unmoved images above which the user is warned


def choose_mu(
    api: BlackBox,
    mu: float | str,
    images: Callable[[], Tensor],
    seed: int,
    journal: Journal | None = None,
) -> float:
    """Return `mu` itself, or for "auto" the length measured at a few of `images()` `[B, C, H, W]`.

    A measured length is written to the journal, and read from there instead of measured again.

    Warns:
        PrecisionWarning: `mu` is too small for the API's 8-bit input, or no length is large enough.
    """
    if mu != AUTO:
        if (reason := too_short(api.spec, float(mu))) is not None:
            message = f"recover: {reason}; increase mu or use mu='auto'"
            warnings.warn(message, PrecisionWarning, stacklevel=4)
        return float(mu)
    first = images()  # made in any case: a user's generator may change with every call
    if journal is not None and journal.mu is not None:
        return journal.mu
    # Images are sorted by class, so rows that lie far apart belong to different classes.
    rows = torch.linspace(0, len(first) - 1, min(N_IMAGES, len(first))).long()
    choice = measure_steps(api, first[rows.to(first.device)], seed=seed)
    if choice.smallest is None:
        message = (
            f"recover: no step length (mu) changes the scores of {api.name!r} reliably; "
            f"continuing with the longest one tried, mu={choice.suggested:.3g}"
        )
        warnings.warn(message, PrecisionWarning, stacklevel=4)
    if journal is not None:
        journal.add_mu(choice.suggested)
    return choice.suggested


def warn_if_unmoved(scores: Tensor, labels: Tensor, spec: APISpec, mu: float) -> None:
    """Warn if steps of length `mu` change the scores `[1+q, B, n_classes]` of few images only."""
    if is_one_hot(scores.flatten(0, 1), spec):
        return  # no step length would help, and the black box has warned of one-hot rows
    share = unmoved(scores, labels, spec)
    if share > _UNMOVED:
        message = (
            f"recover: step length (mu) {mu:g} is too small for {spec.name!r}: the scores of "
            f"{100 * share:.0f} % of the images do not change; increase mu or use mu='auto'"
        )
        warnings.warn(message, PrecisionWarning, stacklevel=5)


def as_number(text: str) -> float:
    """Convert a `mu` that came as text to a number; YAML 1.1 reads 1e-3 as text.

    Raises:
        InputTypeError: the text is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise InputTypeError(
            f"RecoveryConfig: mu must be a number or 'auto'; got {text!r}"
        ) from None
