"""The theorems and corollaries of the paper (section 3.1), measured on given designs and by
simulation.

Each check measures the conclusion under the block reading, as the paper proves it, and beside it
under the Schur reading, where the specific parameters are estimated too and a full-rank ``B_c`` is
*not* enough (``fisher.py``).

Three conclusions about single directions need one condition more than a non-zero ``B_c v``; the
functions name it, and ``TheoremCheck.assumed`` includes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.fisher import (
    RANK_TOLERANCE,
    Design,
    block_information,
    directional_variance,
    is_invertible,
    loewner_gap,
    null_space,
    random_basis,
    random_design,
    schur_information,
)


@dataclass(frozen=True, slots=True)
class TheoremCheck:
    """One statement measured on one pair of designs."""

    name: str
    """Where the statement stands, for example "Theorem 1"."""
    statement: str
    """What is claimed, in one sentence."""
    assumed: bool
    """The designs satisfy what the statement assumes."""
    holds: bool
    """The measured quantities satisfy its conclusion (block reading), whether assumed or not."""
    holds_schur: bool | None
    """The same with the specific parameters estimated; None: the statement has no such reading."""
    quantities: tuple[tuple[str, float], ...]
    """What was measured: (name, value)."""

    def quantity(self, name: str) -> float:
        """The measured value called ``name``."""
        return next(value for key, value in self.quantities if key == name)


def _variance_gap(x: np.ndarray, joint: np.ndarray) -> float:
    """Loewner gap of the variances; NaN where X alone leaves some direction unidentified."""
    return loewner_gap(np.linalg.inv(x), np.linalg.inv(joint)) if is_invertible(x) else math.nan


def _drops(after: float, before: float) -> bool:
    return after < before * (1 - RANK_TOLERANCE) if math.isfinite(before) else math.isfinite(after)


def _sees(y: Design, v: np.ndarray) -> bool:
    return bool(np.linalg.norm(y.common @ v) > math.sqrt(RANK_TOLERANCE) * np.linalg.norm(v))


def _has_eigenvector(information: np.ndarray, v: np.ndarray) -> bool:
    image = information @ v
    rest = image - v * (v @ image) / (v @ v)
    scale = np.linalg.norm(information, 2) * np.linalg.norm(v)
    return bool(np.linalg.norm(rest) <= math.sqrt(RANK_TOLERANCE) * max(scale, RANK_TOLERANCE))


def check_theorem_1(x: Design, y: Design) -> TheoremCheck:
    """Theorem 1: some B_cj of full column rank makes the variance of theta_c strictly smaller
    (Loewner order).

    The information always grows strictly; the variances are compared where X alone identifies
    theta_c (else the drop is from infinite, Theorem 2).
    """
    ranks = np.linalg.matrix_rank(y.common)
    block_x, block_y = block_information(x), block_information(y)
    schur_x, schur_y = schur_information(x), schur_information(y)
    information_gap = loewner_gap(block_x + block_y, block_x)
    schur_gap = loewner_gap(schur_x + schur_y, schur_x)
    variance_gap = _variance_gap(block_x, block_x + block_y)
    return TheoremCheck(
        "Theorem 1",
        "one full-rank B_c of Y makes Var(theta_c) strictly smaller in every direction",
        assumed=bool((ranks == y.common.shape[2]).any()) and is_invertible(block_x),
        holds=information_gap > RANK_TOLERANCE and variance_gap > RANK_TOLERANCE,
        holds_schur=schur_gap > RANK_TOLERANCE
        and _variance_gap(schur_x, schur_x + schur_y) > RANK_TOLERANCE,
        quantities=(
            ("information_gap", information_gap),
            ("variance_gap", variance_gap),
            ("information_gap_schur", schur_gap),
            ("trace_ratio", _trace_ratio(block_x, block_x + block_y)),
            ("trace_ratio_schur", _trace_ratio(schur_x, schur_x + schur_y)),
        ),
    )


def _trace_ratio(x: np.ndarray, joint: np.ndarray) -> float:
    """Total variance of the joint estimate over that of X alone; 0 where X alone is infinite."""
    if not is_invertible(x):
        return 0.0 if is_invertible(joint) else math.nan
    return float(np.trace(np.linalg.inv(joint)) / np.trace(np.linalg.inv(x)))


def _directional(
    name: str, statement: str, x: Design, y: Design, v: np.ndarray, assumed: bool
) -> TheoremCheck:
    """The variance of ``v' theta_c`` falls strictly."""
    before, after = (directional_variance(i, v) for i in _x_and_joint(x, y))
    schur_x = schur_information(x)
    before_schur = directional_variance(schur_x, v)
    after_schur = directional_variance(schur_x + schur_information(y), v)
    return TheoremCheck(
        name, statement, assumed, _drops(after, before), _drops(after_schur, before_schur),
        (
            ("variance_x", before), ("variance_joint", after),
            ("variance_x_schur", before_schur), ("variance_joint_schur", after_schur),
        ),
    )  # fmt: skip


def _x_and_joint(x: Design, y: Design) -> tuple[np.ndarray, np.ndarray]:
    block = block_information(x)
    return block, block + block_information(y)


def check_theorem_2_information(x: Design, y: Design, v: np.ndarray) -> TheoremCheck:
    """Theorem 2, information: B_cj v != 0 for some j gives v'(I_X + I_Y)v > v'I_X v."""
    block_x, joint = _x_and_joint(x, y)
    before, after = float(v @ block_x @ v), float(v @ joint @ v)
    gain_schur = float(v @ schur_information(y) @ v)
    return TheoremCheck(
        "Theorem 2, information",
        "a direction that some B_c of Y sees gains information",
        assumed=_sees(y, v),
        holds=after - before > RANK_TOLERANCE * max(after, RANK_TOLERANCE),
        holds_schur=gain_schur > RANK_TOLERANCE * max(after, RANK_TOLERANCE),
        quantities=(
            ("information_x", before),
            ("information_joint", after),
            ("gain_schur", gain_schur),
        ),
    )


def check_theorem_2_variance(x: Design, y: Design, v: np.ndarray) -> TheoremCheck:
    """Theorem 2, variance: outside the range of I_X the variance of direction v falls from infinite
    to finite.

    Needs v in the range of I_X + I_Y besides B_c v != 0: with ``I_X = 0`` and ``I_Y = w w'`` a v
    that is neither parallel nor orthogonal to w is seen, yet stays unidentified.
    """
    block_x, joint = _x_and_joint(x, y)
    assumed = _sees(y, v) and math.isinf(directional_variance(block_x, v))
    return _directional(
        "Theorem 2, variance",
        "a direction X alone does not identify gets a finite variance",
        x, y, v, assumed and math.isfinite(directional_variance(joint, v)),
    )  # fmt: skip


def check_theorem_2_range(x: Design, y: Design, v: np.ndarray) -> TheoremCheck:
    """Theorem 2, inside the range: the direction u = (I_X)_cc v improves for every v that
    some B_c sees.

    Needs (I_X)_cc invertible: with ``I_X = e1 e1'`` and ``I_Y = (e1 + e2)(e1 + e2)'`` the only
    direction of the range, e1, keeps its variance although Y sees it, because Y spends its one
    equation on e2.
    """
    block_x = block_information(x)
    return _directional(
        "Theorem 2, inside the range",
        "some direction that X alone identifies improves as well",
        x, y, block_x @ v, _sees(y, v) and is_invertible(block_x),
    )  # fmt: skip


def check_corollary_1(x: Design, y: Design, v: np.ndarray) -> TheoremCheck:
    """Corollary 1: along a common eigenvector the variance shrinks by the factor a / (a + b).

    a = v'I_X v and b = v'I_Y v.
    """
    block_x, block_y = block_information(x), block_information(y)
    a, b = float(v @ block_x @ v), float(v @ block_y @ v)
    expected = a / (a + b) if a + b > 0 else math.nan
    before, after = directional_variance(block_x, v), directional_variance(block_x + block_y, v)
    ratio = after / before if math.isfinite(before) else (0.0 if math.isfinite(after) else math.nan)
    return TheoremCheck(
        "Corollary 1",
        "along a common eigenvector the variance shrinks by the factor a / (a + b)",
        assumed=_has_eigenvector(block_x, v) and _has_eigenvector(block_y, v) and a > 0,
        holds=abs(ratio - expected) <= 1e-6,
        holds_schur=None,
        quantities=(("ratio", ratio), ("expected", expected)),
    )


def check_corollary_2(x: Design, y: Design, v: np.ndarray) -> TheoremCheck:
    """Corollary 2 (identifiability): v'I_X v = 0 and v'I_Y v > 0 turn an infinite variance into a
    finite one.

    Needs v in the range of I_X + I_Y, as Theorem 2 does.
    """
    block_x, joint = _x_and_joint(x, y)
    unseen = float(v @ block_x @ v) <= RANK_TOLERANCE * float(v @ joint @ v)
    return _directional(
        "Corollary 2",
        "a direction invisible in X becomes identifiable through Y",
        x, y, v, unseen and _sees(y, v) and math.isfinite(directional_variance(joint, v)),
    )  # fmt: skip


def check_corollary_3(x: Design, y: Design, v: np.ndarray) -> TheoremCheck:
    """Corollary 3: an eigenvector v of I_X with v'I_Y v > 0 has a strictly smaller variance.

    Needs (I_X)_cc invertible; the example of ``check_theorem_2_range`` has an eigenvector that
    keeps its variance.
    """
    block_x = block_information(x)
    return _directional(
        "Corollary 3",
        "an eigenvector of I_X that Y sees has a strictly smaller variance",
        x, y, v, _has_eigenvector(block_x, v) and _sees(y, v) and is_invertible(block_x),
    )  # fmt: skip


def check_theorem_3(x: Design, y: Design) -> TheoremCheck:
    """Theorem 3 (exchange rate): with equally many samples, range I_Y not inside range I_X gives a
    direction in which Y carries more information than X, so that there a sample of Y is worth more
    than one of X.

    The direction is the one outside the range of I_X that Y sees best; where there is none, the
    direction of the largest ``v'(I_Y - I_X)v``.
    """
    block_x, block_y = block_information(x), block_information(y)
    unseen = null_space(block_x)
    inside = unseen.T @ block_y @ unseen
    best = np.linalg.eigvalsh(inside)[-1] if unseen.shape[1] else 0.0
    outside = bool(best > RANK_TOLERANCE * np.linalg.norm(block_y, 2))
    v = (
        unseen @ np.linalg.eigh(inside)[1][:, -1]
        if outside
        else np.linalg.eigh(block_y - block_x)[1][:, -1]
    )
    of_x, of_y = float(v @ block_x @ v), float(v @ block_y @ v)
    schur_x, schur_y = schur_information(x), schur_information(y)
    return TheoremCheck(
        "Theorem 3",
        "in some direction one sample of Y is worth more than one of X",
        assumed=outside and len(x.common) == len(y.common),
        holds=of_y - of_x > RANK_TOLERANCE * max(of_x, of_y),
        holds_schur=loewner_gap(schur_x, schur_y) < -RANK_TOLERANCE,
        quantities=(("information_x", of_x), ("information_y", of_y)),
    )


@dataclass(frozen=True, slots=True)
class VarianceCheck:
    """Empirical and predicted variance of least-squares estimates of theta_c."""

    known_specific: bool
    """The specific parameters were given (block reading) rather than estimated (Schur reading)."""
    trials: int
    """Independent noise draws."""
    empirical_x: float
    """Trace of the sample covariance of the estimate from X alone."""
    predicted_x: float
    """Trace of the inverse information of X alone."""
    empirical_joint: float
    """Trace of the sample covariance of the joint estimate."""
    predicted_joint: float
    """Trace of the inverse joint information."""


def simulate_variance(
    x: Design, y: Design, rng: np.random.Generator, trials: int = 2000, known_specific: bool = True
) -> VarianceCheck:
    """Estimate theta_c by weighted least squares in many noise draws and compare its variance with
    the theory.

    Args:
        x: design of the target; it must identify theta_c.
        y: design of the unpaired auxiliary.
        rng: source of the parameters and the noise.
        trials: noise draws.
        known_specific: subtract the true specific contributions first (the block reading), else
            estimate theta_x and theta_y as well (the Schur reading).

    Raises:
        ValueError: X alone does not identify theta_c.
    """
    information = block_information if known_specific else schur_information
    info_x, info_joint = information(x), information(x) + information(y)
    if not is_invertible(info_x):
        raise ValueError(
            "X alone does not identify theta_c; its variance is infinite and cannot be simulated"
        )
    matrices = [d.stacked()[0] / d.noise for d in (x, y)]
    nuisance = [d.stacked()[1] / d.noise for d in (x, y)]
    common = x.common.shape[2]
    theta_c = rng.standard_normal(common)
    observed, designs = [], []
    for m, matrix in enumerate(matrices):
        signal = matrix @ theta_c
        if not known_specific:
            signal = signal + nuisance[m] @ rng.standard_normal(nuisance[m].shape[1])
        observed.append(signal[:, None] + rng.standard_normal((len(matrix), trials)))
        columns = [np.zeros((len(matrix), n.shape[1])) for n in nuisance]
        columns[m] = nuisance[m]
        designs.append(matrix if known_specific else np.hstack([matrix, *columns]))

    def spread(design: np.ndarray, rows: np.ndarray) -> float:
        estimates = np.linalg.lstsq(design, rows, rcond=RANK_TOLERANCE)[0][:common]
        return float(estimates.var(axis=1, ddof=1).sum())

    return VarianceCheck(
        known_specific=known_specific,
        trials=trials,
        empirical_x=spread(designs[0], observed[0]),
        predicted_x=float(np.trace(np.linalg.inv(info_x))),
        empirical_joint=spread(np.vstack(designs), np.vstack(observed)),
        predicted_joint=float(np.trace(np.linalg.inv(info_joint))),
    )


def check_simulation(
    x: Design, y: Design, rng: np.random.Generator, known_specific: bool, trials: int = 2000
) -> TheoremCheck:
    """Least squares in ``trials`` noise draws has the variance that the information predicts, and
    less of it jointly.

    The trace of a sample covariance has a relative standard error of at most sqrt(2 / trials); five
    of them are allowed.
    """
    found = simulate_variance(x, y, rng, trials, known_specific)
    error_x = found.empirical_x / found.predicted_x - 1
    error_joint = found.empirical_joint / found.predicted_joint - 1
    agrees = max(abs(error_x), abs(error_joint)) <= 5 * math.sqrt(2 / trials)
    smaller = found.empirical_joint < found.empirical_x
    return TheoremCheck(
        "Simulation, specific parameters " + ("known" if known_specific else "estimated"),
        "least squares on X and unpaired Y estimates theta_c with less variance than on X alone",
        assumed=True,
        holds=agrees and smaller,
        holds_schur=None,
        quantities=(
            ("variance_x", found.empirical_x), ("predicted_x", found.predicted_x),
            ("variance_joint", found.empirical_joint), ("predicted_joint", found.predicted_joint),
        ),
    )  # fmt: skip


def check_all(seed: int) -> tuple[TheoremCheck, ...]:
    """Every statement on random designs of the Gaussian experiment's shape, then the variances by
    simulation.

    X sees the first of 10 common directions at full strength and the rest at 0.05 (Theorem 1, 2
    inside the range, Corollaries 1 and 3) or not at all (Theorem 2, Corollary 2, Theorem 3); Y sees
    all of them.
    """
    rng = np.random.default_rng(seed)
    basis = random_basis(rng, 10)
    weak, blind = np.full(10, 0.05), np.zeros(10)
    weak[0] = blind[0] = 1.0

    def design(basis: np.ndarray, strength: np.ndarray) -> Design:
        return random_design(rng, basis, strength, samples=20, rows=15, specific=5, noise=0.3)

    x_weak, x_blind = design(basis, weak), design(basis, blind)
    y = design(random_basis(rng, 10), rng.uniform(0.5, 1.5, 10))
    y_aligned = design(basis, rng.uniform(0.5, 1.5, 10))
    v = rng.standard_normal(10)
    return (
        check_theorem_1(x_weak, y),
        check_theorem_2_information(x_weak, y, v),
        check_theorem_2_variance(x_blind, y, v),
        check_theorem_2_range(x_weak, y, v),
        check_corollary_1(x_weak, y_aligned, basis[:, 3]),
        check_corollary_2(x_blind, y, basis[:, 3]),
        check_corollary_3(x_weak, y, basis[:, 3]),
        check_theorem_3(x_blind, y),
        check_simulation(x_weak, y, rng, known_specific=True),
        check_simulation(x_weak, y, rng, known_specific=False),
    )
