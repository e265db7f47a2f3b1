"""Check rounded and top-k answers against results worked out by hand, and through the losses."""

from __future__ import annotations

import math

import pytest
import torch

from bidfmkd_fast import ops
from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.black_box.answers import as_answered, one_hot, place, spread_missing_mass, usable
from bidfmkd_fast.errors import BadAnswer

SHAPE = (1, 2, 2)


def test_missing_mass_is_spread_evenly() -> None:
    answer = torch.tensor([[0.6, 0.0, 0.3, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.7, 0.4, 0.0]])
    wanted = [
        [0.6, 0.05, 0.3, 0.05],
        [0.5, 0.5, 0.0, 0.0],
        [0.0, 0.7, 0.4, 0.0],
    ]  # the last sums to more than 1
    torch.testing.assert_close(spread_missing_mass(answer), torch.tensor(wanted))


def test_placed_by_label() -> None:
    scores, labels = torch.tensor([[0.7, 0.2], [0.6, 0.3]]), torch.tensor([[3, 0], [1, 2]])
    assert torch.equal(place(scores, labels, 4), torch.tensor([[0.2, 0, 0, 0.7], [0, 0.6, 0.3, 0]]))


def test_top_k_probabilities_add_up_and_keep_what_was_told(seed: int) -> None:
    full = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)).softmax(1)
    spec = APISpec(6, SHAPE, scores_kind="top_k", top_k=3)
    given = usable(as_answered(full, spec), spec)
    torch.testing.assert_close(given.sum(1), torch.ones(20))
    best = full.topk(3).indices
    assert torch.equal(given.gather(1, best), full.gather(1, best))
    rest = torch.ones(20, 6, dtype=torch.bool).scatter(1, best, False)
    torch.testing.assert_close(
        given[rest].view(20, 3), (1 - full.topk(3).values.sum(1, keepdim=True)).expand(-1, 3) / 3
    )


@pytest.mark.parametrize("decimals", [2, 4])
def test_a_rounded_zero_is_at_most_half_a_unit(decimals: int) -> None:
    spec = APISpec(3, SHAPE, scores_kind="probabilities", decimals=decimals)
    scores = usable(as_answered(torch.tensor([[0.99999, 1e-5, 0.0]]), spec), spec)
    assert scores.tolist()[0] == pytest.approx([1.0, 0.5 * 10**-decimals, 0.5 * 10**-decimals])
    logits = usable(
        as_answered(torch.tensor([[0.123456, -1.0, 0.0]]), APISpec(3, SHAPE, decimals=decimals)),
        spec,
    )
    assert logits[0, 0].item() == pytest.approx(round(0.123456, decimals))


def test_the_loss_of_a_top_k_answer_is_minus_log_of_the_spread_probability() -> None:
    """Compare with 0.1 / 3 for each of three classes that an answer of 0.7 and 0.2 leaves out."""
    answer = torch.tensor([0.7, 0.2, 0.0, 0.0, 0.0])
    spec = APISpec(5, SHAPE, scores_kind="top_k", top_k=2)
    api = FunctionBlackBox(lambda images: answer.expand(len(images), 5), spec)
    scores = api(torch.rand(2, *SHAPE))
    state, labels = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 4])
    points = scores.expand(3, 2, 5)
    gradient, loss = ops.zo_kd_gradient(
        points, labels, state, [2, *SHAPE], 0.1, scores_kind=spec.returned_kind
    )
    assert loss.tolist() == pytest.approx([-math.log(0.7), -math.log(0.1 / 3)], rel=1e-5)
    assert gradient.abs().max() < 1e-4


def test_logits_declared_as_probabilities_are_a_bad_answer() -> None:
    api = FunctionBlackBox(
        lambda images: images.flatten(1)[:, :2] - 3, APISpec(2, SHAPE, scores_kind="probabilities")
    )
    with pytest.raises(
        BadAnswer, match="scores_kind is 'probabilities', so they must be from 0 to 1.*logits"
    ):
        api(torch.rand(2, *SHAPE))


def test_the_highest_are_chosen_before_rounding() -> None:
    spec = APISpec(4, SHAPE, scores_kind="top_k", decimals=1, top_k=2)
    answer = as_answered(torch.tensor([[0.21, 0.22, 0.24, 0.33], [0.24, 0.22, 0.21, 0.33]]), spec)
    torch.testing.assert_close(answer, torch.tensor([[0.0, 0.0, 0.2, 0.3], [0.2, 0.0, 0.0, 0.3]]))


LABELS = APISpec(4, SHAPE, scores_kind="labels", name="tags")
ONE_HOT = torch.eye(4)[[2, 0, 3]]


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor([2, 0, 3]),
        torch.tensor([2, 0, 3], dtype=torch.uint8),
        torch.tensor([2, 0, 3], dtype=torch.int8),
        torch.tensor([2, 0, 3]).to(torch.uint16),
        torch.tensor([[2], [0], [3]], dtype=torch.int32),
        ONE_HOT,
        ONE_HOT.long(),
        ONE_HOT.to(torch.uint32),
        ONE_HOT * torch.tensor([[0.4], [0.9], [1.0]]),  # the score of the top class
        torch.tensor([[0.0, -1, 3, 2], [9, 1, 8, 0], [-4, -3, -2, -1]], dtype=torch.float64),
    ],
)
def test_labels_become_one_hot(answer: torch.Tensor) -> None:
    before = answer.clone()
    scores = one_hot(answer, LABELS, 3)
    assert scores.dtype == torch.float32 and torch.equal(scores, ONE_HOT)
    assert torch.equal(
        FunctionBlackBox(lambda images: answer, LABELS)(torch.rand(3, 1, 2, 2)), scores
    )
    assert torch.equal(answer, before)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.tensor([0, 4, 1]), "labels must be from 0 to 3; got 0 to 4"),
        (torch.tensor([0, -1, 1]), "labels must be from 0 to 3; got -1 to 1"),
        (torch.tensor([-1] * 3).to(torch.uint64), "labels must be from 0 to 3"),
        (
            torch.tensor([0, 1]),
            r"as integers \[3\] or numbers \[3, 4\]; it answered torch.int64 \[2\]",
        ),
        (torch.tensor([0.0, 1, 2]), r"it answered torch.float32 \[3\]"),
        (torch.tensor([True, False, True]), "it answered torch.bool"),
        (torch.zeros(3, 4), "a row of zeros and ones must have a single one"),
        (torch.ones(3, 4, dtype=torch.int64), "a row of zeros and ones must have a single one"),
        (torch.full((3, 4), float("nan")), "NaN or infinity"),
        ({"cat": 1.0}, "it answered a dict"),
    ],
)
def test_what_is_no_label_is_refused(answer: object, said: str) -> None:
    box = FunctionBlackBox(lambda images: answer, LABELS)  # type: ignore[arg-type, return-value]
    with pytest.raises(BadAnswer, match=f"^tags: .*{said}"):
        box(torch.rand(3, 1, 2, 2))
    assert box.ledger.queries == 3 and box.ledger.answered_queries == 0
