"""Check that a few answers show the kind of scores, and what they do not show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox
from bidfmkd_fast.black_box.scores_kind import KIND_QUERIES, look_at_scores
from bidfmkd_fast.errors import BudgetExhausted

SHAPE, N = (1, 8, 8), 5


def box(convert: Callable[[Tensor], Tensor], seed: int) -> FunctionBlackBox:
    weights = torch.randn(64, N, generator=torch.Generator().manual_seed(seed))
    return FunctionBlackBox(lambda x: convert(x.flatten(1) @ weights), APISpec(N, SHAPE))


@pytest.mark.parametrize(
    ("convert", "kind", "decimals"),
    [
        (lambda x: x, "logits", None),
        (lambda x: x.softmax(1), "probabilities", None),
        (lambda x: x.softmax(1).double().round(decimals=4).float(), "probabilities", 4),
        (lambda x: x.log_softmax(1), "log_probabilities", None),
        (lambda x: torch.eye(N)[x.argmax(1)], "labels", None),
        # Scores of 0 and 1 up to float32's last digit are no scores of one decimal.
        (lambda x: torch.eye(N)[x.argmax(1)] * (1 - 6e-8) + 1e-12, "probabilities", None),
    ],
)
def test_kind_and_decimals(
    convert: Callable[[Tensor], Tensor], kind: str, decimals: int | None, seed: int
) -> None:
    api = box(convert, seed)
    spec, _ = look_at_scores(api)
    assert (spec.scores_kind, spec.decimals) == (kind, decimals)
    assert (spec.n_classes, spec.image_shape) == (N, SHAPE)
    assert api.ledger.queries == KIND_QUERIES


def test_a_kind_that_a_server_has_stated_is_kept(seed: int) -> None:
    spec = APISpec(N, SHAPE, scores_kind="probabilities")
    weights = torch.randn(64, N, generator=torch.Generator().manual_seed(seed))
    # By their looks these are labels.
    api = FunctionBlackBox(lambda x: torch.eye(N)[(x.flatten(1) @ weights).argmax(1)], spec)
    assert look_at_scores(api)[0].scores_kind == "probabilities"


def test_what_looks_wrong_is_returned_and_not_warned_of(
    seed: int, recwarn: pytest.WarningsRecorder
) -> None:
    _, notes = look_at_scores(box(lambda x: 1e-4 * x, seed))
    assert len(notes) == 1 and "hardly change between images" in notes[0]
    assert not recwarn.list


def test_a_budget_holds(seed: int) -> None:
    api = box(lambda x: x, seed)
    api.budget = Budget(max_queries=KIND_QUERIES - 1)
    with pytest.raises(BudgetExhausted):
        look_at_scores(api)
    assert api.ledger.queries == 0
