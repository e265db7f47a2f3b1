"""Check what the first answers of an API reveal about its spec, without further queries.

Impossible answers are refused; suspicious ones are warned of once.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.black_box.first_answers import WATCHED_STEPS, impossible
from bidfmkd_fast.black_box.probe import probe
from bidfmkd_fast.errors import BadAnswer, PrecisionWarning, ServiceWarning
from bidfmkd_fast.recovery import RecoveryConfig, recover

SHAPE, N_CLASSES = (1, 16, 16), 5
Function = Callable[[Tensor], Tensor]


def logits_of(images: Tensor) -> Tensor:
    weight = torch.randn(256, N_CLASSES, generator=torch.Generator().manual_seed(1))
    return images.flatten(1) @ weight / 4


def softmax(images: Tensor) -> Tensor:
    return logits_of(images).softmax(1)


def one_hot(images: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(logits_of(images).argmax(1), N_CLASSES).float()


def box(function: Function, **fields: Any) -> FunctionBlackBox:
    return FunctionBlackBox(function, APISpec(N_CLASSES, SHAPE, name="asked", **fields))


def images_of(n: int, seed: int) -> Tensor:
    coarse = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(16, 16))


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return [
        str(warning.message)
        for warning in caught
        if issubclass(warning.category, (ServiceWarning, PrecisionWarning))
    ]


IMPOSSIBLE: list[tuple[Function, dict[str, Any], str]] = [
    (
        lambda images: logits_of(images) * 0 + 49,
        {"scores_kind": "log_probabilities"},
        "none may be above 0; it answered 49 to 49",
    ),
    (
        lambda images: softmax(images).log() - 1,
        {"scores_kind": "log_probabilities"},
        "exponentials sum to 1.*0.3679",
    ),
    (
        lambda images: softmax(images) * 0 + 0.54,
        {"scores_kind": "probabilities"},
        "must sum to 1; they sum to 2.7",
    ),
    (
        lambda images: softmax(images) * 0.09,
        {"scores_kind": "probabilities"},
        "must sum to 1; they sum to 0.09",
    ),
    (
        lambda images: softmax(images) * 0,
        {"scores_kind": "probabilities"},
        "must sum to 1; they sum to 0;",
    ),
    (
        lambda images: softmax(images) * 0.3,
        {"scores_kind": "top_k", "top_k": 3},
        "must sum to 0.6 to 1",
    ),
    (
        lambda images: softmax(images) * 0.09,
        {"scores_kind": "probabilities", "decimals": 2},
        "they sum to 0.09",
    ),
    (lambda images: softmax(images) + 1, {"scores_kind": "probabilities"}, "must be from 0 to 1"),
]


@pytest.mark.parametrize(("function", "fields", "message"), IMPOSSIBLE)
def test_impossible_scores_are_refused_at_the_first_answer_and_by_the_probe(
    function: Function, fields: dict[str, Any], message: str, seed: int
) -> None:
    api = box(function, **fields)
    with pytest.raises(BadAnswer, match=f"^asked: .*{message}") as raised:
        api(images_of(3, seed))
    assert "\n" not in str(raised.value)
    assert (api.ledger.queries, api.ledger.answered_queries) == (3, 0)
    report = probe(api)
    assert report.problem is not None and "scores_kind is" in report.problem


@pytest.mark.parametrize(
    "fields",
    [
        {"scores_kind": "logits"},
        {"scores_kind": "probabilities"},
        {"scores_kind": "probabilities", "decimals": 2},
        {"scores_kind": "log_probabilities"},
        {"scores_kind": "top_k", "top_k": 2, "decimals": 3},
    ],
)
@pytest.mark.parametrize("input_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_a_right_api_is_neither_refused_nor_warned_of(
    fields: dict[str, Any],
    input_range: tuple[float, float],
    seed: int,
    caught: list[warnings.WarningMessage],
) -> None:
    low, high = input_range
    kinds: dict[str, Function] = {
        "logits": lambda logits: logits,
        "log_probabilities": lambda logits: logits.log_softmax(1),
    }
    give = kinds.get(fields["scores_kind"], lambda logits: logits.softmax(1))
    api = box(
        lambda images: give(logits_of((images - low) / (high - low))),
        input_range=input_range,
        **fields,
    )
    for n in (1, 3, 30):
        api(api.spec.from_unit(images_of(n, seed)))
    report = probe(api)
    assert report.problem is None
    assert [note for note in report.notes if "the same class" not in note] == []
    assert texts(caught) == []
    assert api.first_answers.done


def test_many_classes_and_rounded_zeros_are_possible() -> None:
    """Accept a sum of 0.02: two decimals round 1000 nearly equal probabilities to 0."""
    scores = torch.full((4, 1000), 0.001)
    scores[:, 0] = 0.02
    spec = APISpec(1000, SHAPE, scores_kind="probabilities", decimals=2)
    assert impossible(scores.round(decimals=2), spec) is None
    assert (
        impossible(scores.round(decimals=2), APISpec(1000, SHAPE, scores_kind="probabilities"))
        is None
    )
    # Rounding cannot make a sum larger by more than half a unit for each score that is not 0.
    scores = torch.zeros(4, 1000)
    scores[:, :3] = 0.9
    assert "sum to 2.7" in str(impossible(scores, spec))


def test_half_precision_is_no_reason(seed: int) -> None:
    scores = (torch.randn(50, 1000, generator=torch.Generator().manual_seed(seed)) * 3).softmax(1)
    spec = APISpec(1000, SHAPE, scores_kind="probabilities")
    for dtype in (torch.float16, torch.bfloat16):
        assert impossible(scores.to(dtype), spec) is None


SUSPICIOUS: list[tuple[Function, dict[str, Any], type[Warning], str]] = [
    (softmax, {}, ServiceWarning, "spec says logits, but its scores are not negative and sum to 1"),
    (one_hot, {}, PrecisionWarning, "answers are one-hot, a label without scores"),
    (
        one_hot,
        {"scores_kind": "probabilities"},
        PrecisionWarning,
        "one-hot.*however long the steps",
    ),
    (
        lambda images: (logits_of(images) * 9000).softmax(1),
        {"scores_kind": "probabilities", "decimals": 1},
        PrecisionWarning,
        "one-hot",
    ),
    (
        lambda images: logits_of(images).sort(1, descending=True).values,
        {},
        ServiceWarning,
        "every image are sorted",
    ),
    (lambda images: logits_of(images).sort(1).values, {}, ServiceWarning, "every image are sorted"),
    (
        lambda images: logits_of(images / 255),
        {},
        ServiceWarning,
        "hardly change .* than 0 to 1, such as 0 to 255",
    ),
    (lambda images: torch.ones(len(images), N_CLASSES), {}, ServiceWarning, "hardly change"),
]


@pytest.mark.parametrize(("function", "fields", "category", "message"), SUSPICIOUS)
def test_suspicious_scores_are_warned_of_once_at_no_query(
    function: Function,
    fields: dict[str, Any],
    category: type[Warning],
    message: str,
    seed: int,
    caught: list[warnings.WarningMessage],
) -> None:
    api = box(function, **fields)
    given = api(images_of(20, seed))
    (warned,) = [warning for warning in caught if issubclass(warning.category, category)]
    assert "asked: " in str(warned.message) and len(texts(caught)) == 1
    assert warned.filename == __file__
    assert re.search(message, str(warned.message))
    assert api.ledger.queries == 20
    assert torch.equal(given, api(images_of(20, seed)))  # and once only
    assert len(texts(caught)) == 1


def test_images_that_do_not_differ_tell_nothing_until_some_do(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    api = box(lambda images: logits_of(images / 255))
    api(torch.full((20, *SHAPE), 0.5))
    assert texts(caught) == []
    api(images_of(20, seed))
    assert len(texts(caught)) == 1 and "hardly change" in texts(caught)[0]


def test_the_probe_tells_what_is_suspicious_in_its_report_alone(
    caught: list[warnings.WarningMessage],
) -> None:
    report = probe(box(lambda images: logits_of(images / 255)))
    assert report.problem is None and "hardly change" in report.notes[0]
    assert "labels without scores" in str(probe(box(one_hot, scores_kind="probabilities")).problem)
    report = probe(box(lambda images: logits_of(images).sort(1).values))
    assert report.problem is None
    assert "sorted" in report.notes[0] and "the same class, 'class 4'" in report.notes[1]
    api = box(lambda images: logits_of(images / 255))
    probe(api)
    assert not api.first_answers.done  # a run warns of it all the same
    assert texts(caught) == []


CONFIG = RecoveryConfig(steps=WATCHED_STEPS, num_directions=2, latent_dim=8, generator_width=4)


def test_a_run_tells_an_api_that_wants_0_to_255(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    api = box(lambda images: logits_of(images / 255))
    recover(api, 3, config=CONFIG, seed=seed)
    assert api.ledger.queries == WATCHED_STEPS * 3 * 15
    assert sum("hardly change between images that differ" in text for text in texts(caught)) == 1
    caught.clear()
    recover(api, 3, config=CONFIG, seed=seed + 1)
    assert texts(caught) == []


def test_one_hot_answers_get_no_advice_of_a_longer_step(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    recover(box(one_hot, scores_kind="probabilities"), 3, config=CONFIG, seed=seed)
    assert sum("one-hot" in text for text in texts(caught)) == 1
    assert not any("longer" in text for text in texts(caught))


def test_one_class_for_all_images_is_told_after_some_steps(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    bias = torch.tensor([100.0, 0, 0, 0, 0])
    api = box(lambda images: logits_of(images) + bias)
    recover(api, 3, config=CONFIG, seed=seed)
    recover(api, 3, config=CONFIG, seed=seed)
    assert sum("gave all images the same class" in text for text in texts(caught)) == 1
    caught.clear()
    learning = replace(CONFIG, num_directions=8, learning_rate=0.05)
    recover(box(lambda images: logits_of(images) * 4), 3, config=learning, seed=seed)
    assert texts(caught) == []


def test_images_far_outside_the_range_are_warned_of_once(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    api = box(logits_of)
    images = images_of(8, seed)
    api(images * 1.9 - 0.45)  # a step may lead out of the range
    assert texts(caught) == []
    for outside in (images * 255, images * 255, (images - 0.5) / 0.2):
        api(outside)
    (text,) = texts(caught)
    assert "far outside of its input_range, 0 to 1; are they 0 to 255, or normalised?" in text
    assert [warning.filename for warning in caught] == [__file__]
    normalised = TorchBlackBox(torch.nn.Flatten(), APISpec(256, SHAPE, (-1.0, 1.0), name="wide"))
    normalised(images * 3.9 - 1.95)
    assert len(texts(caught)) == 1
    normalised(torch.full((1, *SHAPE), -math.e))
    assert len(texts(caught)) == 2
