"""Means, proportions and correlations with 95% confidence intervals."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpo_jax.records import Array

Z95 = 1.959963984540054  # a normal variable lies within +-Z95 standard deviations 95% of the time


class MeanInterval(NamedTuple):
    """A mean and half the width of its 95% interval."""

    mean: float
    half: float


def mean_interval(values: Array, weights: Array | None = None) -> MeanInterval:
    """Returns the (weighted) mean of n values, and half the width of its 95% interval (normal approximation).

    The variance of a weighted mean m is n / (n - 1) * sum(w^2 (x - m)^2) / sum(w)^2 over the n values of positive
    weight; for equal weights this is s^2 / n. The interval of a single value is infinite.

    Raises:
      ValueError: no value has a positive weight.
    """
    counted = np.ones(len(values)) if weights is None else weights
    pairs = [(float(x), float(w)) for x, w in zip(values, counted, strict=True) if w > 0]
    if not pairs:
        raise ValueError("the mean of no values; give a value with a positive weight")
    total = math.fsum(w for _, w in pairs)
    mean = math.fsum(w * x for x, w in pairs) / total
    if len(pairs) == 1:
        return MeanInterval(mean, math.inf)
    spread = math.fsum((w * (x - mean)) ** 2 for x, w in pairs) * len(pairs) / (len(pairs) - 1)
    return MeanInterval(mean, Z95 * math.sqrt(spread) / total)


def mean_t_interval(values: Array) -> MeanInterval:
    """Returns the mean of n values, and half the width of its 95% interval by Student's t, n - 1 degrees of freedom.

    For few normal values, as of seeds. The interval of a single value is infinite.
    """
    from scipy.special import stdtrit  # here, because commands without it start faster

    mean, half = mean_interval(values)
    return MeanInterval(mean, half * float(stdtrit(len(values) - 1, 0.975)) / Z95 if len(values) > 1 else half)


def measured(mean: float, low: float, high: float, n: float) -> dict[str, float]:
    """Returns an entry of metrics: mean, low, high and n; low and high are left out where they are not finite."""
    ends = {"low": low, "high": high} if math.isfinite(high - low) else {}
    return {"mean": mean, **ends, "n": n}


def interval_text(entry: Mapping[str, float], digits: int = 4) -> str:
    """Returns the ends of an entry's interval; "unknown" if it has none."""
    return f"{entry['low']:.{digits}f} .. {entry['high']:.{digits}f}" if "low" in entry else "unknown"


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Returns Wilson's 95% interval for a proportion; (0, 1) for n = 0.

    It contains the proportions p with |successes/n - p| <= z sqrt(p (1 - p) / n) (Wilson 1927). Unlike the normal
    approximation it has a positive width at 0 of n and n of n, and stays within [0, 1]. A tie may count as half a
    success.

    Raises:
      ValueError: successes are not in [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: give a number in [0, {n}]")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (low if p > 0 else 0.0), (high if p < 1 else 1.0)  # rounding leaves 1e-16 of them


def fisher(correlation: float, n: float) -> tuple[float, float]:
    """Returns Fisher's 95% interval for a correlation over n pairs; (-1, 1) for n < 4.

    atanh of the correlation is nearly normal with variance 1 / (n - 3) (Fisher 1915).
    """
    if n < 4 or abs(correlation) >= 1:
        return (-1.0, 1.0) if n < 4 else (correlation, correlation)
    centre, half = math.atanh(correlation), Z95 / math.sqrt(n - 3)
    return math.tanh(centre - half), math.tanh(centre + half)
