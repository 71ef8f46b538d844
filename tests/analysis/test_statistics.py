"""Paired intervals: against scipy's paired t-test, by coverage, and the sentences they allow."""

import numpy as np
import pytest
from scipy import stats

from uml_fast.analysis.statistics import (
    BOOTSTRAP_SEEDS,
    bootstrap_interval,
    correct_rows,
    holm,
    mean_interval,
    paired_comparison,
    ratio_interval,
)


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
    assert got.p_value == pytest.approx(stats.ttest_rel(uml, unimodal).pvalue)


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


def test_units_and_words_of_the_verdict():
    a, b = [1.0, 2.0, 3.0], [1.5, 2.7, 3.6]
    own = paired_comparison(a, b, in_points=False)
    assert own.verdict.startswith("UML is better by 0.6 (95 % interval")
    neutral = paired_comparison(b, a, in_points=False, is_judged=False)
    assert neutral.verdict.startswith("UML is lower by 0.6 (95 % interval")


def test_holm_steps_down():
    got = holm([0.01, 0.04, 0.03, 0.005])
    assert got == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None, 0.03]) == [None, pytest.approx(0.06)]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values must be"):
        holm([1.2])


def test_holm_holds_its_level_over_many_settings_where_nothing_differs():
    rng = np.random.default_rng(0)
    alone = wrong = 0
    for _ in range(400):
        p = stats.ttest_1samp(rng.normal(0, 1, (5, 8)), 0).pvalue.tolist()
        alone += min(p) <= 0.05
        wrong += min(holm(p)) <= 0.05
    assert alone / 400 > 0.25  # what the uncorrected table would say
    assert wrong / 400 < 0.08


def test_a_verdict_that_the_correction_does_not_uphold_says_so():
    row = paired_comparison([0.5, 0.6, 0.7], [0.62, 0.7, 0.84])
    rows = [{"p_value": row.p_value, "verdict": row.verdict}] + [
        {"p_value": 0.5, "verdict": "no difference shown"}
    ] * 9
    first, second, *_ = correct_rows(rows)
    assert first["p_holm"] == pytest.approx(10 * row.p_value) and first["p_holm"] > 0.05
    assert first["verdict"].endswith("; not shown when corrected for 10 comparisons")
    assert second["verdict"] == "no difference shown"
    assert rows[0]["verdict"] == row.verdict
    assert correct_rows(rows[:1]) == [rows[0] | {"p_holm": row.p_value}]


def experiment(rng, seeds):
    """Numerator and denominator of seeds whose means have the ratio 20."""
    return 1 + rng.normal(0, 0.2, seeds), 0.05 * (1 + rng.normal(0, 0.1, seeds))


@pytest.mark.parametrize("seeds", [3, 5, 12])
def test_ratio_interval_covers_with_few_seeds(seeds):
    rng = np.random.default_rng(seeds)
    found = [ratio_interval(*experiment(rng, seeds)) for _ in range(1500)]
    covered = [f is None or f[0] <= 20 <= f[1] for f in found]
    assert 0.93 < np.mean(covered) < 0.97


def test_ratio_interval_without_spread_is_the_ratio():
    assert ratio_interval([3.0, 3.0], [2.0, 2.0]) == pytest.approx((1.5, 1.5))


def test_ratio_of_an_uncertain_denominator_has_no_bounds():
    assert ratio_interval([1.0, 1.1, 0.9], [0.1, -0.2, 0.3]) is None
    assert ratio_interval([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        ratio_interval([1.0, 2.0], [1.0])


def ratio(b, c, axis):
    return b.mean(axis) / c.mean(axis)


def test_bootstrap_covers_with_enough_seeds_and_is_not_given_below():
    rng = np.random.default_rng(2)
    found = [bootstrap_interval(experiment(rng, 20), ratio) for _ in range(120)]
    assert np.mean([low <= 20 <= high for low, high in found]) > 0.86
    assert bootstrap_interval(experiment(rng, BOOTSTRAP_SEEDS - 1), ratio) is None
    again = experiment(rng, 20)
    assert bootstrap_interval(again, ratio) == bootstrap_interval(again, ratio)
    with pytest.raises(ValueError, match="one a seed"):
        bootstrap_interval([np.ones(12), np.ones(11)], ratio)
