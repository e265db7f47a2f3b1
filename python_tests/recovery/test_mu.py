"""Check mu="auto" (measured, paid for, recorded) and the warnings about a mu that is too small."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox
from bidfmkd_fast.black_box.step_length import QUERIES
from bidfmkd_fast.errors import BudgetExhausted, InputError, PrecisionWarning
from bidfmkd_fast.recovery import Recovered, RecoveryConfig, recover

SHAPE, N_CLASSES, N_PER_CLASS = (3, 32, 32), 5, 4
B = N_CLASSES * N_PER_CLASS
AUTO = RecoveryConfig(steps=40, num_directions=8, mu="auto", generator_width=8, latent_dim=16)


def logits_of(images: Tensor) -> Tensor:
    weight = torch.randn(3072, N_CLASSES, generator=torch.Generator().manual_seed(3)).double()
    return (torch.tanh((images.flatten(1).double() - 0.5) @ weight / 16) * 3).float()


def api(**fields: Any) -> FunctionBlackBox:
    function = logits_of
    if fields.get("scores_kind", "logits") != "logits":
        function = lambda images: logits_of(images).softmax(1)  # noqa: E731
    return FunctionBlackBox(function, APISpec(N_CLASSES, SHAPE, name="coarse", **fields))


def test_auto_is_measured_paid_for_and_recorded(seed: int) -> None:
    box = api()
    config = RecoveryConfig(steps=2, num_directions=3, mu="auto", generator_width=4)
    recovered = recover(box, N_PER_CLASS, config=config, seed=seed)
    assert recovered.mu == 0.025  # the default, since this API answers in full precision
    assert box.ledger.queries == QUERIES + 2 * 4 * B
    fixed = RecoveryConfig(steps=2, num_directions=3, mu=0.025, generator_width=4)
    assert torch.equal(
        recovered.images, recover(api(), N_PER_CLASS, config=fixed, seed=seed).images
    )
    untrained = RecoveryConfig(steps=0, mu="auto", generator_width=4)
    asked = api()
    assert (
        recover(asked, N_PER_CLASS, config=untrained, seed=seed).mu is None
        and asked.ledger.queries == B
    )


def test_a_budget_must_pay_for_the_measurement_too() -> None:
    box = api()
    box.budget = Budget(max_queries=QUERIES + 9 * B - 1)
    with pytest.raises(BudgetExhausted, match="one step"):
        recover(box, N_PER_CLASS, config=AUTO)
    assert box.ledger.queries == 0


COARSE: list[dict[str, Any]] = [
    {"dtype": "uint8"},
    {"scores_kind": "probabilities", "decimals": 2},
    {"scores_kind": "top_k", "top_k": 3, "dtype": "uint8", "decimals": 2},
]


def descent(recovered: Recovered) -> float:
    """Return by how much the mean loss of the last 5 steps is below the loss of the first."""
    losses = [record["loss"] for record in recovered.history]
    return losses[0] - sum(losses[-5:]) / 5


def mean_descent(api_fields: dict[str, Any], config: RecoveryConfig) -> float:
    """Return the mean of `descent` over three seeds.

    If the API does not resolve the step, the estimate is noise, and the loss walks at random by
    about 0.4 in either direction. Where a walk ends depends on the processor: processors differ in
    the last bit, and rounding to 8 bits and two decimals turns this into a whole unit. So a single
    walk proves nothing. The mean of three lies below 0.4 with 3 standard errors to spare. If the
    API resolves the step, the descent is above 1 in the mean, with a standard deviation of 0.2.
    """
    sets = [recover(api(**api_fields), N_PER_CLASS, config=config, seed=seed) for seed in range(3)]
    assert config.mu != "auto" or all(found.mu is not None and found.mu > 0.1 for found in sets)
    return sum(descent(found) for found in sets) / len(sets)


@pytest.mark.parametrize("fields", COARSE)
def test_auto_descends_on_a_coarse_api_where_the_papers_step_does_not(
    fields: dict[str, Any],
) -> None:
    auto = replace(AUTO, num_directions=16)
    chosen = mean_descent(fields, auto)
    with pytest.warns(PrecisionWarning, match=r"coarse.*increase mu or use mu='auto'"):
        papers = mean_descent(fields, replace(auto, mu=0.005))
    assert chosen > 0.7
    assert papers < 0.3 * chosen


def test_the_papers_step_descends_on_an_exact_api() -> None:
    """Show that the same mu works with an API that answers exactly."""
    assert mean_descent({}, replace(AUTO, mu=0.005)) > 0.7


def test_no_warning_where_the_step_is_resolved() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mu in (0.005, "auto"):
            recover(
                api(),
                N_PER_CLASS,
                config=RecoveryConfig(steps=2, num_directions=3, mu=mu, generator_width=4),
            )


def test_an_api_that_resolves_nothing_gives_a_warning() -> None:
    flat = FunctionBlackBox(
        lambda images: images.new_ones(len(images), 5), APISpec(5, SHAPE, name="flat")
    )
    with pytest.warns(
        PrecisionWarning, match=r"no step length \(mu\) changes the scores of 'flat'"
    ):
        recover(flat, N_PER_CLASS, config=RecoveryConfig(steps=1, mu="auto", generator_width=4))


def test_mu_as_text() -> None:
    assert RecoveryConfig(mu="1e-3").mu == 0.001
    with pytest.raises(InputError, match="mu must be a number or 'auto'; got 'long'"):
        RecoveryConfig(mu="long")
