"""Test how one API is asked: each picture once, services with several requests under way."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox
from bidfmkd_fast.black_box.remote.service import Attempt, BatchTooLarge, ServiceBlackBox
from bidfmkd_fast.errors import APIUnavailable, BudgetExhausted
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.ask import ask
from bidfmkd_fast.survey.config import SurveyConfig
from bidfmkd_fast.survey.cost import survey_cost
from bidfmkd_fast.survey.pictures import SharedPictures

SHAPE = (1, 16, 16)
SPEC = APISpec(3, SHAPE, (-1.0, 1.0), name="mine", max_batch=10)


def scores_of(images: Tensor) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 3, generator=draws).double()
    return (images.flatten(1).double() @ weight).float()  # the same in batches of any size


class Service(ServiceBlackBox):
    """A service in this process that fails from the request `fails_at` on."""

    def __init__(self, fails_at: int = 10**6, in_flight: int = 3, patience: float = 0.2) -> None:
        super().__init__(SPEC, in_flight=in_flight)
        self.fails_at, self.n_requests, self.most = fails_at, 0, 0
        self._lock, self._under_way = threading.Lock(), 0
        self._together, self._patience = threading.Barrier(in_flight), patience

    def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
        attempt()
        with self._lock:
            self.n_requests += 1
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            fails = self.n_requests >= self.fails_at
        with suppress(threading.BrokenBarrierError):
            self._together.wait(self._patience)  # until as many requests as may be are under way
        with self._lock:
            self._under_way -= 1
        if fails:
            raise APIUnavailable("mine: away")
        return scores_of(images)


def test_every_picture_is_asked_once(seed: int) -> None:
    calls: list[Tensor] = []
    api = FunctionBlackBox(lambda images: (calls.append(images), scores_of(images))[1], SPEC)
    pictures = SharedPictures(seed)
    answers = Answers(None, SPEC, pictures.seed, 25)
    ask(api, pictures, answers, range(25))
    assert [len(call) for call in calls] == [10, 10, 5]
    asked = pictures.for_api(0, 25, SPEC)
    assert torch.equal(torch.cat(calls), asked) and torch.equal(answers.scores, scores_of(asked))
    cost = survey_cost(api, SurveyConfig(n_images=25, chosen=0.0))
    assert (cost.queries, cost.requests) == (api.ledger.queries, api.ledger.requests) == (25, 3)
    ask(api, pictures, answers, range(25))
    assert len(calls) == 3


def test_a_service_answers_several_requests_at_once(seed: int, tmp_path: Path) -> None:
    service, pictures = Service(patience=30.0), SharedPictures(seed)
    with Answers(tmp_path / "answers", SPEC, pictures.seed, 60) as answers:
        ask(service, pictures, answers, range(60))
    assert (
        service.most == 3
        and service.n_requests
        == 6
        == survey_cost(service, SurveyConfig(n_images=60, chosen=0.5)).requests
    )
    again = Answers(tmp_path / "answers", SPEC, pictures.seed, 60)
    assert torch.equal(again.scores, scores_of(pictures.for_api(0, 60, SPEC)))


def test_what_a_service_answered_before_it_failed_is_kept(seed: int) -> None:
    service, pictures = Service(fails_at=3, in_flight=1), SharedPictures(seed)
    answers = Answers(None, SPEC, pictures.seed, 60)
    with pytest.raises(APIUnavailable, match="away"):
        ask(service, pictures, answers, range(60))
    assert answers.queries == 20 and service.ledger.queries == 30
    service.fails_at = 10**6
    ask(service, pictures, answers, range(60))
    assert answers.answered.all() and service.ledger.queries == 70
    assert torch.equal(answers.scores, scores_of(pictures.for_api(0, 60, SPEC)))


def test_a_budget_that_ends_keeps_what_it_paid(seed: int) -> None:
    api = FunctionBlackBox(scores_of, SPEC, budget=Budget(max_queries=25))
    answers = Answers(None, SPEC, 0, 60)
    with pytest.raises(BudgetExhausted):
        ask(api, SharedPictures(seed), answers, range(60))
    assert answers.queries == 20 == api.ledger.queries


@pytest.mark.parametrize("said_before", [True, False])
def test_calls_are_requests_when_a_service_lowers_its_limit(seed: int, said_before: bool) -> None:
    """Otherwise a kill would lose all requests of a call."""

    class Limited(Service):
        def _batch(self) -> int:
            self._max_batch = 4 if said_before else self._max_batch
            return super()._batch()

        def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
            if len(images) > 4:
                attempt()
                raise BatchTooLarge("mine: 4 at most")
            return super()._request(images, attempt)

    kept: list[int] = []

    class Kept(Answers):
        def add(self, first: int, scores: Tensor) -> None:
            kept.append(len(scores))
            super().add(first, scores)

    answers = Kept(None, SPEC, SharedPictures(seed).seed, 40)
    ask(Limited(in_flight=1), SharedPictures(seed), answers, range(40))
    assert answers.answered.all()
    assert all(n <= 4 for n in kept[0 if said_before else 1 :])
