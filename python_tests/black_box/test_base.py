"""Check that every call to a black box is checked, paid and counted, and gives no graph."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError, InputTypeError

SPEC = APISpec(3, (1, 2, 2), name="corner")


class Scripted(BlackBox):
    """A box with scripted answers, which notes what it was sent."""

    def __init__(
        self, answer: object = None, per_request: int | None = None, budget: Budget | None = None
    ) -> None:
        super().__init__(SPEC, budget=budget)
        self.sent: list[Tensor] = []
        self._scripted = answer
        self._per_request = per_request

    def score(self, images: Tensor) -> Tensor:
        self.sent.append(images)
        return images.flatten(1)[:, :3] * 2 if self._scripted is None else self._scripted  # type: ignore[return-value]

    def requests_for(self, n_images: int) -> int:
        return 1 if self._per_request is None else -(-n_images // self._per_request)


def test_scores_and_counts() -> None:
    api = Scripted()
    images = torch.arange(8.0).reshape(2, 1, 2, 2)
    scores = api(images)
    assert scores.tolist() == [[0, 2, 4], [8, 10, 12]]
    assert (api.ledger.queries, api.ledger.requests) == (2, 1)
    assert api.name == "corner" and api.spec is SPEC
    assert "corner" in repr(api) and "2 queries in 1 requests" in repr(api)


def test_no_graph_even_where_images_and_answer_have_one() -> None:
    weight = torch.ones(3, requires_grad=True)

    class Leaky(Scripted):
        def score(self, images: Tensor) -> Tensor:
            assert not images.requires_grad
            with torch.enable_grad():
                return images.flatten(1)[:, :3] * weight

    images = torch.rand(2, 1, 2, 2, requires_grad=True)
    scores = Leaky()(images)
    assert (
        scores.grad_fn is None
        and not scores.requires_grad
        and scores.is_leaf
        and scores._base is None
    )
    scores.requires_grad_().sum().backward()
    assert images.grad is None and weight.grad is None


def test_the_answer_is_a_copy_that_later_graphs_can_use() -> None:
    held = torch.zeros(2, 3)
    api = Scripted(held)
    api(torch.rand(2, 1, 2, 2)).fill_(9)
    assert held.eq(0).all()
    with torch.inference_mode():
        api._scripted = torch.ones(2, 3)
    student = torch.rand(2, 3, requires_grad=True)
    (student * api(torch.rand(2, 1, 2, 2))).sum().backward()
    assert student.grad is not None and student.grad.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_answer_becomes_float32(dtype: torch.dtype) -> None:
    scores = Scripted(torch.ones(2, 3, dtype=dtype))(torch.rand(2, 1, 2, 2))
    assert scores.dtype == torch.float32 and scores.eq(1).all()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[1.0]], InputTypeError, "corner: images must be a float32 tensor; got list"),
        (
            torch.zeros(2, 1, 2, 2, dtype=torch.float64),
            InputTypeError,
            "float32; got torch.float64",
        ),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), InputTypeError, "float32; got torch.uint8"),
        (torch.zeros(1, 2, 2), InputError, r"\[N, 1, 2, 2\] with N >= 1; got \[1, 2, 2\]"),
        (torch.zeros(2, 3, 2, 2), InputError, r"got \[2, 3, 2, 2\]"),
        (torch.zeros(2, 1, 2, 3), InputError, r"got \[2, 1, 2, 3\]"),
        (torch.zeros(0, 1, 2, 2), InputError, r"N >= 1; got \[0, 1, 2, 2\]"),
        (torch.full((2, 1, 2, 2), float("nan")), InputError, "finite"),
        (
            torch.tensor([float("inf"), float("-inf"), 0, 0]).reshape(1, 1, 2, 2),
            InputError,
            "finite",
        ),
    ],
)
def test_bad_images_cost_nothing(images: Tensor, error: type[Exception], message: str) -> None:
    api = Scripted(budget=Budget(100))
    with pytest.raises(error, match=message):
        api(images)
    assert api.budget is not None
    assert (api.ledger.queries, api.ledger.requests, api.budget.queries, api.sent) == (0, 0, 0, [])


def test_huge_but_finite_images_are_sent() -> None:
    images = torch.full((2, 1, 2, 2), 1e38)  # their sum overflows float32
    assert Scripted(torch.zeros(2, 3))(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            [[1, 2, 3], [1, 2, 3]],
            r"corner: the API must answer finite scores \[2, 3\]; it answered a list",
        ),
        (torch.zeros(3, 2), r"shape \[3, 2\]"),
        (torch.zeros(2, 3, 1), r"shape \[2, 3, 1\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "torch.int64"),
        (torch.full((2, 3), float("nan")), "NaN or infinity"),
        (torch.tensor([[0.0, 1, 2], [0, float("inf"), 1]]), "NaN or infinity"),
        (torch.full((2, 3), 1e300, dtype=torch.float64), "scores that float32 cannot hold"),
    ],
)
def test_bad_answers_are_counted(answer: object, message: str) -> None:
    api = Scripted(answer, budget=Budget(5))
    with pytest.raises(BadAnswer, match=message):
        api(torch.rand(2, 1, 2, 2))
    assert api.budget is not None
    assert (api.ledger.queries, api.ledger.requests, api.budget.queries) == (2, 1, 2)


def test_a_failed_request_is_counted() -> None:
    class Broken(Scripted):
        def score(self, images: Tensor) -> Tensor:
            raise ConnectionError("gone")

    api = Broken()
    with pytest.raises(ConnectionError):
        api(torch.rand(2, 1, 2, 2))
    assert (api.ledger.queries, api.ledger.requests) == (2, 1)


def test_budget_stops_before_the_overrun_and_the_refusal_costs_nothing() -> None:
    api = Scripted(budget=Budget(max_queries=7))
    api(torch.rand(5, 1, 2, 2))
    with pytest.raises(BudgetExhausted, match="3 more queries wanted, 2 of 7 left"):
        api(torch.rand(3, 1, 2, 2))
    assert (api.ledger.queries, api.ledger.requests, len(api.sent)) == (5, 1, 1)
    api(torch.rand(2, 1, 2, 2))
    assert api.budget is not None and api.budget.remaining_queries == 0


def test_split_calls_pay_for_each_request() -> None:
    api = Scripted(per_request=2, budget=Budget(max_requests=3))
    api(torch.rand(3, 1, 2, 2))
    assert (api.ledger.queries, api.ledger.requests) == (3, 2)
    with pytest.raises(BudgetExhausted):
        api(torch.rand(3, 1, 2, 2))
    assert (api.ledger.queries, api.ledger.requests) == (3, 2)


def test_one_budget_caps_the_sum_of_apis_under_threads() -> None:
    budget = Budget(max_queries=301)
    apis = [Scripted(budget=budget) for _ in range(4)]
    refused = []

    def ask(api: Scripted) -> None:
        while True:
            try:
                api(torch.rand(2, 1, 2, 2))
            except BudgetExhausted as error:
                refused.append(error)
                return

    threads = [threading.Thread(target=ask, args=(api,)) for api in apis for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 8
    assert sum(api.ledger.queries for api in apis) == budget.queries == 300
    assert sum(len(api.sent) for api in apis) == budget.requests == 150


def test_budget_may_be_set_later_and_taken_away() -> None:
    api = Scripted()
    api.budget = Budget(1)
    with pytest.raises(BudgetExhausted):
        api(torch.rand(2, 1, 2, 2))
    api.budget = None
    api(torch.rand(2, 1, 2, 2))
    with pytest.raises(InputTypeError, match="corner: budget must be a Budget or None; got int"):
        api.budget = 5  # type: ignore[assignment]


def test_spec_and_ledger_are_not_replaced() -> None:
    api = Scripted()
    for name in ("spec", "ledger", "name"):
        with pytest.raises(AttributeError):
            setattr(api, name, None)
    with pytest.raises(InputTypeError, match="spec must be an APISpec; got dict"):

        class Other(Scripted):
            def __init__(self) -> None:
                BlackBox.__init__(self, {})  # type: ignore[arg-type]

        Other()


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(clone: object) -> None:
    with pytest.raises(InputTypeError, match="corner: a black box cannot be copied or pickled"):
        clone(Scripted())  # type: ignore[operator]
