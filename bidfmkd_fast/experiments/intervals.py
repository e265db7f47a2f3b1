"""Compute confidence intervals over training seeds, of which there are few."""

from __future__ import annotations

import math

from torch import Tensor

# 97.5 % quantiles of Student's t distribution for 1 to 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_quantile(degrees_of_freedom: int) -> float:
    """Return the factor of a 95 % t-interval, for at least one degree of freedom.

    More than 30 degrees of freedom get the factor of 30, which is larger by less than 0.09.
    """
    return T_QUANTILES[min(degrees_of_freedom, len(T_QUANTILES)) - 1]


def mean_and_t95(values: Tensor) -> tuple[float, float]:
    """Return the mean of float64 `[n]` and the half width of its 95 % t-interval.

    The half width is `t * sd / sqrt(n)`, with n - 1 degrees of freedom for t and sd; NaN for a
    single value.
    """
    n = len(values)
    half = t_quantile(n - 1) * float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), half
