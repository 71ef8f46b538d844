"""Paired intervals: against scipy's paired t-test, by coverage, and the sentences they allow."""

import numpy as np
import pytest
from scipy import stats

from uml_fast.analysis.statistics import mean_interval, paired_comparison


def test_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    unimodal = rng.normal(0.5, 0.1, 7)
    uml = unimodal + rng.normal(0.05, 0.02, 7)
    got = paired_comparison(unimodal, uml)
    expected = stats.ttest_rel(uml, unimodal).confidence_interval(0.95)
    assert got.ci95_low == pytest.approx(expected.low)
    assert got.ci95_high == pytest.approx(expected.high)
    assert got.paired_diff_mean == pytest.approx(got.uml_mean - got.unimodal_mean)
    assert got.n == 7


def test_interval_covers_the_true_difference_at_its_level():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        seed_effect = rng.normal(0, 1.0, 5)
        got = paired_comparison(seed_effect, seed_effect + 0.3 + rng.normal(0, 0.2, 5))
        covered += got.ci95_low <= 0.3 <= got.ci95_high
    assert 0.93 < covered / 1500 < 0.97


def test_pairing_removes_what_seeds_share():
    seed_effect = np.array([0.2, 0.5, 0.8, 0.3])
    noise = np.array([0.01, 0.0, 0.02, 0.01])
    got = paired_comparison(seed_effect, seed_effect + 0.1 + noise)
    assert got.ci95_low > 0.08


@pytest.mark.parametrize(
    ("unimodal", "uml", "lower_is_better", "verdict"),
    [
        ([0.5, 0.6, 0.7], [0.62, 0.7, 0.84], False,
         "UML is better by 12.0 points (95 % interval 7.0..17.0, 3 seeds)"),
        ([0.62, 0.7, 0.84], [0.5, 0.6, 0.7], False,
         "UML is worse by 12.0 points (95 % interval 7.0..17.0, 3 seeds)"),
        ([6.0, 4.9, 3.7, 4.1], [3.6, 3.6, 3.0, 3.0], True,
         "UML is better by 1.38 (95 % interval 0.217..2.53, 4 seeds)"),
        ([3.6, 3.6, 3.0, 3.0], [6.0, 4.9, 3.7, 4.1], True,
         "UML is worse by 1.38 (95 % interval 0.217..2.53, 4 seeds)"),
        ([0.5, 0.6, 0.7], [0.4, 0.7, 0.71], False,
         "no difference shown (UML - unimodal is +0.3 points, "
         "95 % interval -24.5..+25.2, 3 seeds)"),
        ([0.5], [0.6], False, "one seed: no interval (UML - unimodal is +10.0 points)"),
        ([0.5, 0.5], [0.5, 0.5], False, "no difference shown (equal in all 2 seeds)"),
        ([0.5, 0.5], [0.75, 0.75], False,
         "UML is better by 25.0 points in each of 2 seeds, without spread: no interval"),
        ([0.5, 0.5], [0.75, 0.75], True,
         "UML is worse by 0.25 in each of 2 seeds, without spread: no interval"),
    ],
)  # fmt: skip
def test_verdict_says_what_the_interval_allows(unimodal, uml, lower_is_better, verdict):
    got = paired_comparison(unimodal, uml, lower_is_better=lower_is_better)
    assert got.verdict == verdict
    assert (got.ci95_low is None) == ("no interval" in verdict or "equal" in verdict)


def test_rounding_noise_of_equal_differences_is_no_spread():
    got = paired_comparison([0.1, 0.2, 0.3], [0.3, 0.4, 0.5])
    assert got.ci95_low is None
    assert "without spread" in got.verdict


def test_mean_interval_of_one_value_has_none():
    assert mean_interval([0.7]).ci95_low is None
    low, high = stats.t.interval(0.95, 2, 2.0, stats.sem([1, 2, 3]))
    got = mean_interval([1, 2, 3])
    assert (got.mean, got.ci95_low, got.ci95_high) == pytest.approx((2.0, low, high))


@pytest.mark.parametrize(
    ("unimodal", "uml", "message"),
    [
        ([0.1, 0.2], [0.1], "2 unimodal and 1 uml"),
        ([], [], "one number per seed"),
        ([0.1, float("nan")], [0.1, 0.2], "unimodal: value 1 is nan"),
        ([0.1], [float("inf")], "uml: value 0 is inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(unimodal, uml, message):
    with pytest.raises(ValueError, match=message):
        paired_comparison(unimodal, uml)
