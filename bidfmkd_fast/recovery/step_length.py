"""The length of a step, mu: measured where it is "auto", and a warning where the API does not resolve it."""

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
_UNMOVED = 0.5  # share of images from which the user is warned


def choose_mu(
    api: BlackBox,
    mu: float | str,
    images: Callable[[], Tensor],
    seed: int,
    journal: Journal | None = None,
) -> float:
    """`mu`, or what is measured at a few of `images()` `[B, C, H, W]` where it is "auto"; warns of
    one too short.

    What was measured is read from the journal, or goes there.
    """
    if mu != AUTO:
        if (reason := too_short(api.spec, float(mu))) is not None:
            warnings.warn(
                f"recover: {reason}; take a longer one or mu='auto'", PrecisionWarning, stacklevel=4
            )
        return float(mu)
    first = images()  # made in any case: a generator may change with every call
    if journal is not None and journal.mu is not None:
        return journal.mu
    rows = torch.linspace(
        0, len(first) - 1, min(N_IMAGES, len(first))
    ).long()  # of different classes
    choice = measure_steps(api, first[rows.to(first.device)], seed=seed)
    if choice.smallest is None:
        message = f"recover: no step is long enough for what {api.name} resolves; mu={choice.suggested:.3g} is taken"
        warnings.warn(message, PrecisionWarning, stacklevel=4)
    if journal is not None:
        journal.add_mu(choice.suggested)
    return choice.suggested


def warn_if_unmoved(scores: Tensor, labels: Tensor, spec: APISpec, mu: float) -> None:
    """Warn where the answers `[1+q, B, n_classes]` for most images are the same wherever steps of
    length `mu` lead.
    """
    if is_one_hot(scores.flatten(0, 1), spec):
        return  # no step is long enough; the black box has said so
    share = unmoved(scores, labels, spec)
    if share > _UNMOVED:
        told = f"what {spec.name} answers hardly moves for {100 * share:.0f} % of the images"
        message = f"recover: with steps of mu={mu:g} {told}; take a longer one or mu='auto'"
        warnings.warn(message, PrecisionWarning, stacklevel=5)


def as_number(text: str) -> float:
    """A `mu` that came as text: YAML 1.1 reads 1e-3 so. Raises InputTypeError unless it is a
    number.
    """
    try:
        return float(text)
    except ValueError:
        raise InputTypeError(
            f"RecoveryConfig: mu must be a number or 'auto'; got {text!r}"
        ) from None
