"""The plane fit and the price of an image: planes with known answers, intervals, warnings."""

import numpy as np
import pytest

from uml_fast.analysis.exchange import Point, exchange_rate
from uml_fast.analysis.inputs import AnalysisError


def grid(seeds, accuracy, images=(1, 2, 4, 8, 16), texts=(0, 1, 5, 15)):
    return [
        Point(seed=s, image_shots=i, text_shots=t, accuracy=accuracy(s, i, t))
        for s in range(seeds)
        for i in images
        for t in texts
    ]


def noisy(rng, noise=0.01, b=0.02, c=0.002):
    """A plane whose slopes and level differ from seed to seed, with noise in each cell."""
    draws = rng.normal(0, 1, (20, 3))
    return lambda s, i, t: (
        0.4 + 0.02 * draws[s, 0] + b * (1 + 0.1 * draws[s, 1]) * i
        + c * (1 + 0.1 * draws[s, 2]) * t + noise * rng.normal()
    )  # fmt: skip


def test_an_exact_plane_is_found():
    got = exchange_rate(grid(3, lambda s, i, t: 0.3 + 0.02 * i + 0.001 * t), words_per_text=15.2)
    assert (got.intercept, got.per_image.mean, got.per_text.mean) == pytest.approx(
        (0.3, 0.02, 0.001)
    )
    assert got.texts_per_image == pytest.approx(20)
    # the paper's Pets: 15.0 texts an image of 15.20 words are 228 words
    assert got.words_per_image == pytest.approx(20 * 15.2)
    assert got.r_squared == pytest.approx(1) and got.residual == pytest.approx(0, abs=1e-12)
    assert got.warnings == () and got.seeds == 3


def test_is_the_least_squares_fit_of_all_points():
    rng = np.random.default_rng(0)
    points = grid(5, noisy(rng))
    got = exchange_rate(points)
    design = np.array([[1, p.image_shots, p.text_shots] for p in points])
    expected = np.linalg.lstsq(design, np.array([p.accuracy for p in points]))[0]
    found = (got.intercept, got.per_image.mean, got.per_text.mean)
    assert found == pytest.approx(tuple(expected))
    assert got.words_per_image is None


def test_interval_covers_the_true_rate():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        got = exchange_rate(grid(3, noisy(rng), images=(1, 4, 16), texts=(1, 15)))
        covered += got.ci95 is None or got.ci95[0] <= 10 <= got.ci95[1]
    assert 0.91 < covered / 300 < 0.985


def test_bootstrap_stands_beside_it_with_many_seeds():
    rng = np.random.default_rng(2)
    got = exchange_rate(grid(12, noisy(rng)), words_per_text=10)
    assert got.bootstrap[0] < got.texts_per_image < got.bootstrap[1]
    assert got.bootstrap == pytest.approx(got.ci95, rel=0.2)
    assert got.words_ci95 == pytest.approx((10 * got.ci95[0], 10 * got.ci95[1]))
    assert exchange_rate(grid(3, noisy(rng))).bootstrap is None


def test_text_without_effect_gives_no_price():
    rng = np.random.default_rng(3)
    got = exchange_rate(grid(4, noisy(rng, noise=0.02, c=0.0)))
    assert got.ci95 is None
    assert "texts show no effect" in got.warnings[0]
    harmful = exchange_rate(grid(1, lambda s, i, t: 0.3 + 0.02 * i - 0.001 * t))
    assert "texts do not raise the accuracy" in " ".join(harmful.warnings)
    flat = exchange_rate(grid(2, lambda s, i, t: 0.5))
    assert flat.texts_per_image is None and flat.words_per_image is None and flat.ci95 is None


def test_a_curved_grid_is_said_not_to_fit():
    got = exchange_rate(grid(3, lambda s, i, t: 0.2 + 0.15 * np.log2(i) + 0.01 * np.log1p(t)))
    assert got.r_squared < 0.9
    assert "a plane does not fit" in got.warnings[-1] and "1 images" in got.warnings[-1]


def test_one_seed_has_a_rate_without_an_interval():
    got = exchange_rate(grid(1, lambda s, i, t: 0.3 + 0.02 * i + 0.001 * t))
    assert got.texts_per_image == pytest.approx(20)
    assert got.ci95 is None and got.per_image.ci95_low is None
    assert got.warnings == ("one seed: the rate has no interval",)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "no cells"),
        (grid(2, lambda s, i, t: 0.5, images=(4,)), "seed 0 do not span a plane"),
        (grid(2, lambda s, i, t: 0.5, texts=(4,)), "do not span a plane"),
        (grid(1, lambda s, i, t: float("nan")), "is not finite"),
    ],
)
def test_what_is_no_grid_is_refused(points, message):
    with pytest.raises(AnalysisError, match=message):
        exchange_rate(points)


def test_a_plane_that_says_nothing_gives_no_rate():
    cells = [(1, 1, 0.5), (1, 8, 0.3), (8, 1, 0.2), (8, 8, 0.6), (4, 4, 0.1)]
    points = [Point(seed=0, image_shots=i, text_shots=t, accuracy=a) for i, t, a in cells]
    rate = exchange_rate(points, 15.0)
    assert rate.r_squared < 0.5 and "no exchange rate can be given" in rate.sentence()


def test_texts_that_lower_accuracy_give_no_rate():
    points = [
        Point(seed=0, image_shots=i, text_shots=t, accuracy=0.5 + 0.02 * i - 0.01 * t)
        for i in (1, 2, 4) for t in (1, 2, 4)
    ]  # fmt: skip
    sentence = exchange_rate(points, 15.0).sentence()
    assert "no exchange rate can be given: more images and more texts do not both raise" in sentence
