"""Check the probe and the steps that it suggests on APIs whose properties are all known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox, RemoteBlackBox
from bidfmkd_fast.black_box.probe import PROBE_QUERIES, probe
from bidfmkd_fast.black_box.signature import decimals_of, kind_of
from bidfmkd_fast.black_box.step_length import (
    QUERIES,
    STEPS,
    choose,
    measure_steps,
    too_short,
    unmoved,
)
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted

SHAPE = (1, 16, 16)


def logits_of(images: Tensor) -> Tensor:
    """Return logits that are smooth in the image, and neither flat nor saturated."""
    weight = torch.randn(256, 5, generator=torch.Generator().manual_seed(1)).double()
    return torch.tanh(images.flatten(1).double() @ weight / 16).float() * 2


def probabilities_of(images: Tensor) -> Tensor:
    return logits_of(images).softmax(1)


def api(function: Callable[[Tensor], Tensor] = logits_of, **fields: Any) -> FunctionBlackBox:
    return FunctionBlackBox(function, APISpec(5, SHAPE, name="probed", **fields))


def test_a_clean_api(seed: int) -> None:
    box = api()
    report = probe(box, seed=seed)
    assert report.problem is None
    assert (report.scores_kind, report.n_classes, report.decimals) == ("logits", 5, None)
    assert report.deterministic is True and report.input_bits == 32
    assert report.queries == box.ledger.queries == PROBE_QUERIES
    assert (
        report.steps is not None
        and report.steps.smallest is not None
        and report.steps.smallest < 0.01
    )
    rows = dict(report.rows())
    assert (
        rows["usable"] == "yes"
        and rows["input"] == "finer than 8 bits"
        and "images/s, 32 a call" in rows
    )


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (
            {"scores_kind": "probabilities"},
            {"scores_kind": "probabilities", "decimals": None, "input_bits": 32},
        ),
        ({"scores_kind": "probabilities", "decimals": 4}, {"decimals": 4}),
        ({"scores_kind": "probabilities", "decimals": 2}, {"decimals": 2}),
        ({"dtype": "uint8"}, {"input_bits": 8}),
        ({"encoding": "png"}, {"input_bits": 8}),
        ({"scores_kind": "top_k", "top_k": 3}, {"scores_kind": "top_k"}),
    ],
)
def test_what_an_api_lacks_is_found(
    fields: dict[str, Any], found: dict[str, Any], seed: int
) -> None:
    function = logits_of if fields.get("scores_kind", "logits") == "logits" else probabilities_of
    report = probe(api(function, **fields), seed=seed)
    assert report.problem is None
    assert {name: getattr(report, name) for name in found} == found


def test_rounding_and_8_bits_that_the_spec_does_not_tell(seed: int) -> None:
    def coarse(images: Tensor) -> Tensor:
        return probabilities_of((images * 255).round() / 255).double().round(decimals=3).float()

    report = probe(api(coarse, scores_kind="probabilities"), seed=seed)
    assert (report.decimals, report.input_bits) == (3, 8)


def test_an_api_that_varies(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noisy(images: Tensor) -> Tensor:
        return logits_of(images) + 0.01 * torch.randn(len(images), 5, generator=generator)

    report = probe(api(noisy), seed=seed)
    clean = probe(api(), seed=seed)
    assert report.deterministic is False and dict(report.rows())["same answer twice"] == "no"
    assert report.steps is not None and clean.steps is not None
    assert report.steps.suggested > clean.steps.suggested


def test_what_cannot_be_used_is_said_why(seed: int) -> None:
    def labels(images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(logits_of(images).argmax(1), 5).float()

    report = probe(api(labels), seed=seed)
    assert report.scores_kind == "labels" and "a label alone gives no gradient" in str(
        report.problem
    )
    assert "set scores_kind='labels'" in str(report.problem)
    report = probe(api(probabilities_of), seed=seed)
    assert report.problem == "its scores look like probabilities; set scores_kind in its spec"
    report = probe(api(lambda images: logits_of(images) * float("nan")), seed=seed)
    assert "NaN" in str(report.problem) and dict(report.rows())["usable"].startswith("no: probed")
    dead = RemoteBlackBox("http://127.0.0.1:9", "m", APISpec(5, SHAPE, name="dead"), retries=0)
    assert "dead: no answer" in str(probe(dead).problem)


def test_a_budget_stops_a_probe() -> None:
    box = api()
    box.budget = Budget(max_queries=20)
    with pytest.raises(
        BudgetExhausted, match="probe: probed would be asked 178 queries, more than is left"
    ):
        probe(box)
    assert box.ledger.queries == 0


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], "labels"),
        ([[0.7, 0.3], [0.1, 0.9]], "probabilities"),
        ([[-0.3567, -1.204], [-2.3026, -0.1054]], "log_probabilities"),
        ([[0.7, 0.9], [0.1, 0.9]], "logits"),
        ([[-3.0, -1.0], [-2.0, -0.1]], "logits"),
    ],
)
def test_kinds(scores: list[list[float]], kind: str) -> None:
    assert kind_of(torch.tensor(scores)) == kind


def test_decimals(seed: int) -> None:
    values = torch.rand(40, 5, generator=torch.Generator().manual_seed(seed)).double() * 10
    for decimals in (1, 2, 4):
        assert decimals_of(values.round(decimals=decimals).float()) == decimals
    assert decimals_of(values.float()) is None


def test_steps_cost_what_they_say_and_leave_the_global_generator_alone(seed: int) -> None:
    box, before = api(), torch.get_rng_state()
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
    choice = measure_steps(box, images, seed=seed)
    assert box.ledger.queries == QUERIES and torch.equal(before, torch.get_rng_state())
    assert len(choice.agreement) == len(STEPS) - 1
    assert min(choice.agreement.values()) > 0.8  # smooth and exact
    again = measure_steps(api(input_range=(0.0, 255.0)), images * 255, seed=seed)
    assert list(again.agreement) == pytest.approx([255 * mu for mu in choice.agreement])


def test_a_step_the_api_does_not_resolve_is_not_suggested(seed: int) -> None:
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
    exact = measure_steps(api(probabilities_of, scores_kind="probabilities"), images, seed=seed)
    bytes_ = measure_steps(api(dtype="uint8"), images, seed=seed)
    coarse = measure_steps(
        api(probabilities_of, scores_kind="probabilities", decimals=2), images, seed=seed
    )
    assert exact.suggested < bytes_.suggested <= coarse.suggested
    flat = measure_steps(api(lambda images: images.new_ones(len(images), 5)), images)
    assert flat.smallest is None and flat.suggested > max(flat.agreement)


def test_the_choice() -> None:
    choice = choose({0.1: 0.2, 0.2: 0.5, 0.4: 0.8, 0.8: 0.9}, 1.6, 0.05)
    assert (choice.smallest, choice.suggested) == (0.2, 0.4)
    assert (
        choose({0.01: 0.99, 0.1: 1.0}, 1.6, 0.05).suggested == 0.05
    )  # the usual step where all are good
    assert choose({0.1: 0.1, 0.2: -3.0}, 1.6, 0.05).smallest is None
    assert choose({0.1: 0.1, 1.0: 0.9}, 1.6, 0.05).suggested == 1.6


def test_curvature_is_no_reason_for_a_longer_step(seed: int) -> None:
    """Keep the short step where long steps find other slopes, since all digits are answered."""
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
    weight = torch.randn(256, 5, generator=torch.Generator().manual_seed(seed)).double()
    bent = api(lambda images: torch.sin(images.flatten(1).double() @ weight * 8).float() * 3)
    choice = measure_steps(bent, images, seed=seed)
    assert choice.suggested == 0.025 and list(choice.agreement.values())[-1] < 0.9


def test_too_short_for_8_bits() -> None:
    spec = APISpec(5, (3, 32, 32), dtype="uint8", name="bytes")
    assert "mu=0.005 moves a pixel by 0.023 of a level, and bytes takes images of 8 bits" in str(
        too_short(spec, 0.005)
    )
    assert too_short(spec, 0.5) is None and too_short(APISpec(5, (3, 32, 32)), 0.005) is None
    wide = APISpec(5, (3, 32, 32), (0.0, 255.0), dtype="uint8")
    assert too_short(wide, 0.5) is not None and too_short(wide, 127.5) is None


def test_unmoved_answers() -> None:
    """Use three directions and four images; class 1 is wanted for all of them."""
    labels = torch.ones(4, dtype=torch.int64)
    scores = torch.zeros(4, 4, 3)
    scores[:, 0, 0] = torch.tensor([0.0, 9.0, 9.0, 9.0])  # another class moves
    scores[2, 1, 1] = 0.001  # one answer moves a little
    scores[3, 2, 1] = 0.01  # by the last of two places: 0.0058 root mean square
    scores[1:, 3, 1] = 0.3
    assert unmoved(scores, labels, APISpec(3, SHAPE)) == 0.25
    rounded = APISpec(3, SHAPE, scores_kind="probabilities", decimals=2)
    assert unmoved(scores, labels, rounded) == 0.5


def test_bad_answers_are_not_swallowed_by_steps() -> None:
    with pytest.raises(BadAnswer):
        measure_steps(api(lambda images: logits_of(images) * float("nan")), torch.rand(2, *SHAPE))


@pytest.mark.parametrize("flatness", [1.0, 1e-2, 4e-3, 2e-3, 1e-3, 1e-4, 1e-5, 0.0])
def test_a_flat_api_is_not_one_of_8_bits(flatness: float, seed: int) -> None:
    def flat(images: Tensor) -> Tensor:
        return (logits_of(images) * flatness).softmax(1)

    assert probe(api(flat, scores_kind="probabilities"), seed=seed).input_bits in (32, None)


@pytest.mark.parametrize("to_bytes", [torch.round, torch.floor])
@pytest.mark.parametrize("flatness", [1.0, 4e-3])
def test_a_flat_api_of_8_bits_is_one(
    to_bytes: Callable[[Tensor], Tensor], flatness: float, seed: int
) -> None:
    def flat(images: Tensor) -> Tensor:
        return logits_of(to_bytes(images * 255) / 255) * flatness

    assert probe(api(flat), seed=seed).input_bits == 8


def test_rounded_scores_of_a_float32_api_are_not_taken_for_8_bits(seed: int) -> None:
    def rounded(images: Tensor) -> Tensor:
        return probabilities_of(images).double().round(decimals=3).float()

    assert probe(api(rounded, scores_kind="probabilities"), seed=seed).input_bits in (32, None)


def test_an_api_of_labels_is_usable_and_what_that_means_is_said(seed: int) -> None:
    spec = APISpec(5, SHAPE, scores_kind="labels", name="tags")
    box = FunctionBlackBox(lambda images: logits_of(images).argmax(1), spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = probe(box, seed=seed)
    assert report.problem is None and report.scores_kind == report.stated_kind == "labels"
    assert report.steps is None and report.queries == box.ledger.queries <= PROBE_QUERIES
    assert "recovery recovers nothing from it: a label alone gives no gradient" in report.notes[0]
    rows = dict(report.rows())
    assert rows["usable"] == "yes" and rows["scores"] == "labels" and "decimals" not in rows
