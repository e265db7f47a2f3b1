"""Count what a run is expected to ask, and write it to the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.cost import Cost, set_cost
from bidfmkd_fast.survey.cost import survey_cost
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.recovered_set import PARTS
from bidfmkd_fast.training.spending import Cap, write_plan


def run_cost(api: BlackBox, config: TrainConfig) -> Cost:
    """Count what a run asks one API if nothing goes wrong: the survey and two sets of images.

    An API from which nothing is recovered is asked the survey alone.

    A service is not contacted.
    """
    return survey_cost(as_known(api), config.survey) + recovery_cost(api, config)


def check_learnable(operation: str, apis: Sequence[BlackBox], config: TrainConfig) -> None:
    """Raise InputError if a run would learn nothing from an API, since it gives labels only.

    A run without recovery steps is let through, as the control, which has no survey either: it
    asks such an API nothing.
    """
    if config.survey.n_images or not config.recovery.steps:
        return
    for api in apis:
        if api.spec.labels_only:
            raise InputError(
                f"{operation}: {api.name} gives labels only, from which only the survey can learn, "
                "and survey.n_images is 0; raise survey.n_images, or leave the API out"
            )


def recovery_cost(api: BlackBox, config: TrainConfig) -> Cost:
    """Count what the recovery of both sets of one API asks, if the run recovers any.

    A service is not contacted.
    """
    if not config.recovers_from(api.spec):
        return Cost()
    one_set = set_cost(as_known(api), config.recovery, config.n_per_class, config.paper_compat)
    return one_set * len(PARTS)


def as_known(api: BlackBox) -> BlackBox:
    """Return a black box to count with, which answers without contacting a service.

    A service may have to ask its server how many images a request may hold, and would wait for a
    server that is down. A local API is returned as it is.
    """
    return _KnownService(api) if isinstance(api, ServiceBlackBox) else api


class _KnownService(BlackBox):
    """A service as far as it is known: its spec, and the images per request known so far."""

    def __init__(self, service: ServiceBlackBox) -> None:
        super().__init__(service.spec)
        self._images_per_request = service.known_batch

    def score(self, images: Tensor) -> Tensor:
        """Fail, since this box serves to count only."""
        raise AssertionError("a box that serves to count was asked for scores")

    def requests_for(self, n_images: int) -> int:
        """Return how many requests a call with `n_images` images sends."""
        return -(-n_images // self._images_per_request)


def keep_plan(folder: Path, apis: Sequence[BlackBox], config: TrainConfig) -> None:
    """Write what a run of `apis` is expected to ask, and the cap on it, to the folder of the run.

    `bidfmkd status` shows it while the run is under way.
    """
    planned = sum((run_cost(api, config) for api in apis), Cost())
    n_sets = len(PARTS) * sum(config.recovers_from(api.spec) for api in apis)
    write_plan(folder, planned, Cap.of(api.budget for api in apis), n_sets)
