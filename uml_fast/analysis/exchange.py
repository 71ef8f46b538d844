"""How many texts, and words, an image is worth (paper 4.4 and E.4, figures 32 to 35).

Accuracy over a grid of image shots and text shots is fitted by a plane, acc = a + b img + c txt;
along its isolines one image a class is worth b / c texts a class, times the words of a text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.inputs import AnalysisError
from uml_fast.analysis.statistics import (
    Interval,
    bootstrap_interval,
    mean_interval,
    ratio_interval,
)

POOR_FIT = 0.5
"""Part of the variance below which no rate is given."""
GOOD_FIT = 0.9
"""Part of the variance of the cells' means below which the plane is said not to fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One trained cell of the grid."""

    seed: int
    image_shots: float
    """Images of each class."""
    text_shots: float
    """Texts of each class; 0: trained without text."""
    accuracy: float
    """On the test samples, 0..1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeRate:
    """The plane and what it says an image is worth."""

    intercept: float
    """a, accuracy 0..1."""
    per_image: Interval
    """b, accuracy an image of each class adds; interval over seeds (Student t)."""
    per_text: Interval
    """c, accuracy a text of each class adds; interval over seeds (Student t)."""
    texts_per_image: float | None
    """b / c; None where c is 0."""
    ci95: tuple[float, float] | None
    """Fieller's interval of b / c over seeds; None where it has no bounds."""
    bootstrap: tuple[float, float] | None
    """Percentile-bootstrap interval of b / c over seeds; None with few seeds."""
    words_per_image: float | None
    """b / c times the words of a text; None where they are unknown."""
    words_ci95: tuple[float, float] | None
    """``ci95`` in words."""
    r_squared: float
    """Part of the variance of the cells' means over seeds that the plane explains."""
    residual: float
    """Root mean square of the cells' means about the plane, accuracy 0..1."""
    warnings: tuple[str, ...]
    """Why the rate should not be quoted; empty where nothing speaks against it."""
    seeds: int

    def sentence(self) -> str:
        """What the fit says, in words."""
        if self.texts_per_image is None:
            return "texts change nothing, so that an image has no price in them"
        if self.ci95 is None and self.seeds > 1:
            return (
                f"no exchange rate is shown: over {self.seeds} seeds the effect of a text is not "
                "told from zero"
            )
        if self.texts_per_image < 0:
            return (
                "no exchange rate can be given: more images and more texts do not both raise "
                "accuracy here"
            )
        if self.r_squared < POOR_FIT:
            return (
                "no exchange rate can be given: the plane explains "
                f"{100 * self.r_squared:.0f} % of the variance"
            )
        unit = "texts" if self.words_per_image is None else "words"
        value = self.texts_per_image if self.words_per_image is None else self.words_per_image
        ends = self.ci95 if self.words_per_image is None else self.words_ci95
        interval = "no interval" if ends is None else (
            f"95 % interval {ends[0]:,.3g} to {ends[1]:,.3g}"
        )  # fmt: skip
        return (
            f"an image is worth {value:,.3g} {unit} ({interval}, {self.seeds} "
            f"seed{'s' if self.seeds != 1 else ''}; the plane explains "
            f"{100 * self.r_squared:.0f} % of the variance)"
        )


def exchange_rate(points: Sequence[Point], words_per_text: float | None = None) -> ExchangeRate:
    """Fit the plane by least squares.

    Each seed is fitted by itself and the coefficients are averaged, which for a full grid is the
    fit of all points; so seeds are the independent samples of every interval.

    Args:
        points: cells; every seed with at least three that do not lie on one line.
        words_per_text: mean words of a text, for the rate in words; None: not given.

    Raises:
        AnalysisError: no points, an accuracy that is not finite, or a seed whose points are too few
            or vary in one kind of shots alone.
    """
    if not points:
        raise AnalysisError("exchange rate: no cells")
    by_seed: dict[int, list[Point]] = defaultdict(list)
    for p in points:
        if not np.isfinite([p.image_shots, p.text_shots, p.accuracy]).all():
            raise AnalysisError(f"exchange rate: a value of {p} is not finite")
        by_seed[p.seed].append(p)
    fits = np.array([_fit(seed, own) for seed, own in sorted(by_seed.items())])
    a, b, c = fits.mean(0)
    per_image, per_text = (mean_interval(fits[:, k].tolist()) for k in (1, 2))
    r_squared, residual, worst = _quality(points, (a, b, c))
    is_flat = bool(abs(c) <= 1e-12)
    interval = None if is_flat else ratio_interval(fits[:, 1], fits[:, 2])
    has_words = words_per_text is not None and not is_flat
    words = float(words_per_text or 0.0)
    return ExchangeRate(
        intercept=float(a),
        per_image=per_image,
        per_text=per_text,
        texts_per_image=None if is_flat else float(b / c),
        ci95=interval,
        bootstrap=None if is_flat else bootstrap_interval((fits[:, 1], fits[:, 2]), _ratio),
        words_per_image=float(b / c * words) if has_words else None,
        words_ci95=(interval[0] * words, interval[1] * words) if interval and has_words else None,
        r_squared=r_squared,
        residual=residual,
        warnings=_warnings(per_text, r_squared, worst, len(fits)),
        seeds=len(fits),
    )


def _ratio(b: np.ndarray, c: np.ndarray, axis: int) -> np.ndarray:
    ratio: np.ndarray = b.mean(axis) / c.mean(axis)
    return ratio


def _fit(seed: int, points: Sequence[Point]) -> np.ndarray:
    design = np.array([[1.0, p.image_shots, p.text_shots] for p in points])
    if np.linalg.matrix_rank(design) < 3:
        raise AnalysisError(
            f"exchange rate: the {len(points)} cells of seed {seed} do not span a plane; train at "
            "least two image shots with two text shots each"
        )
    fitted: np.ndarray = np.linalg.lstsq(design, np.array([p.accuracy for p in points]))[0]
    return fitted


def _quality(
    points: Sequence[Point], plane: tuple[float, float, float]
) -> tuple[float, float, tuple[Point, float]]:
    """R squared and root mean square of the cells' means, and the cell farthest from the plane."""
    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for p in points:
        cells[p.image_shots, p.text_shots].append(p.accuracy)
    means = [
        Point(seed=-1, image_shots=i, text_shots=t, accuracy=float(np.mean(v)))
        for (i, t), v in cells.items()
    ]
    found = np.array([p.accuracy for p in means])
    a, b, c = plane
    off = found - np.array([a + b * p.image_shots + c * p.text_shots for p in means])
    total = float(((found - found.mean()) ** 2).sum())
    r_squared = 1 - float((off**2).sum()) / total if total > 0 else 1.0
    far = int(np.abs(off).argmax())
    return r_squared, float(np.sqrt((off**2).mean())), (means[far], float(off[far]))


def _warnings(
    per_text: Interval, r_squared: float, worst: tuple[Point, float], seeds: int
) -> tuple[str, ...]:
    out = []
    if seeds == 1:
        out.append("one seed: the rate has no interval")
    low, high = per_text.ci95_low, per_text.ci95_high
    if low is not None and high is not None and low <= 0 <= high:
        out.append(
            f"texts show no effect: one of each class adds {100 * per_text.mean:+.2g} points, "
            f"95 % interval {100 * low:+.2g}..{100 * high:+.2g}"
        )
    elif per_text.mean <= 0:
        out.append("texts do not raise the accuracy, so that an image has no price in them")
    if r_squared < GOOD_FIT:
        p, off = worst
        out.append(
            f"a plane does not fit: it explains {100 * r_squared:.0f} % of the variance of the "
            f"cells, and lies {100 * abs(off):.1f} points off at {p.image_shots:g} images and "
            f"{p.text_shots:g} texts; the rate differs from place to place"
        )
    return tuple(out)
