"""Check t-intervals against published quantiles, and against scipy where it is installed."""

from __future__ import annotations

import math

import pytest
import torch

from bidfmkd_fast.experiments.intervals import T_QUANTILES, mean_and_t95, t_quantile


def test_quantiles_are_those_of_the_literature() -> None:
    published = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 20: 2.086, 30: 2.042}
    assert {degrees: t_quantile(degrees) for degrees in published} == published
    assert len(T_QUANTILES) == 30 and sorted(T_QUANTILES, reverse=True) == list(T_QUANTILES)
    assert t_quantile(31) == t_quantile(1000) == 2.042  # never below the true one


def test_quantiles_are_the_roots_of_the_distribution() -> None:
    """Integrate the density from 0 to each quantile with Simpson's rule, which must give 0.475.

    The quantiles are rounded to 0.0005, and the density there is at most 0.06.
    """
    for degrees, quantile in enumerate(T_QUANTILES, 1):
        at = torch.linspace(0, quantile, 4001, dtype=torch.float64)
        density = (1 + at**2 / degrees) ** (-(degrees + 1) / 2)
        density *= math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        density /= math.sqrt(degrees * math.pi)
        weights = torch.full_like(at, 2.0)
        weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
        share = float((weights * density).sum()) * quantile / 4000 / 3
        assert abs(share - 0.475) < 0.0005 * 0.06


def test_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = [round(float(stats.t.ppf(0.975, degrees)), 3) for degrees in range(1, 31)]
    assert list(T_QUANTILES) == wanted


def test_an_interval_by_hand() -> None:
    mean, half = mean_and_t95(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    mean, half = mean_and_t95(torch.tensor([1.0], dtype=torch.float64))
    assert mean == 1.0 and math.isnan(half)
