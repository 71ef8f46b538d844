"""Paired comparison over seeds: means, Student-t 95 % intervals and the sentence that may be said.

A seed fixes data split, initial weights and sample order, so the two modes of one seed are a pair
and the interval is that of the mean of their differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Values that differ by less than this have no spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Mean of a sample and its 95 % interval."""

    mean: float
    ci95_low: float | None
    """None where a single value, or values without spread, allow no interval."""
    ci95_high: float | None
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """UML against the unimodal run, in the metric's own unit (accuracy: fraction 0..1)."""

    unimodal_mean: float
    uml_mean: float
    paired_diff_mean: float
    """Mean of uml - unimodal over the seeds; negative is the improvement where lower is better."""
    ci95_low: float | None
    """None where one seed, or differences without spread, allow no interval."""
    ci95_high: float | None
    n: int
    """Paired seeds."""
    verdict: str
    """What the interval allows to say, one sentence."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student-t 95 % interval of independent values, for example a baseline's over seeds.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    x = _finite("values", values)
    mean, n = float(x.mean()), len(x)
    if n == 1 or np.allclose(x, mean, rtol=0, atol=ROUNDING):
        return Interval(mean=mean, ci95_low=None, ci95_high=None, n=n)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean=mean, ci95_low=mean - half, ci95_high=mean + half, n=n)


def paired_comparison(
    unimodal: Sequence[float], uml: Sequence[float], *, lower_is_better: bool = False
) -> Comparison:
    """Compare two modes that were run with the same seeds.

    Args:
        unimodal: metric of the target-only run, one value a seed.
        uml: metric of the UML run, same seeds in the same order.
        lower_is_better: False: accuracies as fractions, and the verdict speaks of points
            (hundredths); True: errors, and the verdict speaks in the error's own unit.

    Raises:
        ValueError: lengths differ, nothing to compare, or a value that is not finite.
    """
    a, b = _finite("unimodal", unimodal), _finite("uml", uml)
    if len(a) != len(b):
        raise ValueError(
            f"{len(a)} unimodal and {len(b)} uml values; "
            "a paired comparison needs both for every seed"
        )
    interval = mean_interval([float(d) for d in b - a])
    return Comparison(
        unimodal_mean=float(a.mean()),
        uml_mean=float(b.mean()),
        paired_diff_mean=interval.mean,
        ci95_low=interval.ci95_low,
        ci95_high=interval.ci95_high,
        n=interval.n,
        verdict=_verdict(interval, lower_is_better),
    )


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name}: one number per seed is needed, got shape {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(
            f"{name}: value {bad[0]} is {x[bad[0]]}; a seed that failed cannot be compared"
        )
    return x


def _verdict(diff: Interval, lower_is_better: bool) -> str:
    def amount(value: float, sign: str = "") -> str:
        return f"{value:{sign}.3g}" if lower_is_better else f"{100 * value:{sign}.1f}"

    unit = "" if lower_is_better else " points"
    gain = -diff.mean if lower_is_better else diff.mean
    side = "better" if gain > 0 else "worse"
    if diff.n == 1:
        return f"one seed: no interval (UML - unimodal is {amount(diff.mean, '+')}{unit})"
    if diff.ci95_low is None or diff.ci95_high is None:
        if gain == 0:
            return f"no difference shown (equal in all {diff.n} seeds)"
        return (
            f"UML is {side} by {amount(abs(gain))}{unit} in each of {diff.n} seeds, "
            "without spread: no interval"
        )
    if diff.ci95_low <= 0 <= diff.ci95_high:
        low, high = amount(diff.ci95_low, "+"), amount(diff.ci95_high, "+")
        return (
            f"no difference shown (UML - unimodal is {amount(diff.mean, '+')}{unit}, "
            f"95 % interval {low}..{high}, {diff.n} seeds)"
        )
    near, far = sorted((abs(diff.ci95_low), abs(diff.ci95_high)))
    return (
        f"UML is {side} by {amount(abs(gain))}{unit} "
        f"(95 % interval {amount(near)}..{amount(far)}, {diff.n} seeds)"
    )
