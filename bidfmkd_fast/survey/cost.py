"""Count what the survey asks of an API, for budgets, plans, progress bars and ledgers."""

from __future__ import annotations

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.recovery.cost import Cost
from bidfmkd_fast.survey.config import SurveyConfig

LOCAL_PIECE = 256  # pictures per call to an API in this process


def piece_size(api: BlackBox) -> int:
    """Return the pictures per call, a single request: all that a kill makes the survey ask again.

    A service is not contacted for it.
    """
    if isinstance(api, ServiceBlackBox):
        return api.known_batch
    return min(LOCAL_PIECE, api.spec.max_batch or LOCAL_PIECE)


def survey_cost(api: BlackBox, config: SurveyConfig) -> Cost:
    """Count the survey of one API if nothing goes wrong."""
    piece, n_images, requests = piece_size(api), config.n_images, 0
    for part in (config.n_first, n_images - config.n_first):
        sizes = [min(piece, part - first) for first in range(0, part, piece)]
        requests += sum(api.requests_for(size) for size in sizes)
    return Cost(n_images, requests, api.price_of(n_images))
