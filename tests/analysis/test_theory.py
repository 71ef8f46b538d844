"""The theorems hold on random designs that satisfy their assumptions, not where one is broken."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uml_fast.analysis.fisher import (
    Design,
    block_information,
    directional_variance,
    random_basis,
    random_design,
    schur_information,
)
from uml_fast.analysis.theory import (
    check_all,
    check_corollary_1,
    check_corollary_2,
    check_corollary_3,
    check_simulation,
    check_theorem_1,
    check_theorem_2_information,
    check_theorem_2_range,
    check_theorem_2_variance,
    check_theorem_3,
    simulate_variance,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(2, 8)


def draw(seed: int, common: int, x_blind: int = 0, y_blind: int = 0) -> tuple[Design, Design]:
    """X and Y with their own eigenvectors; the first directions may carry nothing."""
    rng = np.random.default_rng(seed)

    def one(blind: int) -> Design:
        strength = rng.uniform(0.1, 2.0, common)
        strength[:blind] = 0.0
        basis = random_basis(rng, common)
        return random_design(
            rng, basis, strength, samples=6, rows=12, specific=3, noise=rng.uniform(0.1, 2.0)
        )

    return one(x_blind), one(y_blind)


def from_rows(*rows: list[float]) -> Design:
    """One sample whose observation has the given rows, and no parameters of its own."""
    return Design(np.array([rows]), np.zeros((1, len(rows), 0)))


def test_block_information_is_the_sum_over_samples() -> None:
    x, _ = draw(0, 4)
    expected = sum(a.T @ a for a in x.common) / x.noise**2
    np.testing.assert_allclose(block_information(x), expected, rtol=1e-12)


def test_schur_information_is_the_inverse_of_the_block_of_the_inverse() -> None:
    x, _ = draw(1, 4)
    full = np.concatenate([x.common, x.specific], axis=2).reshape(-1, 7) / x.noise
    expected = np.linalg.inv(np.linalg.inv(full.T @ full)[:4, :4])
    np.testing.assert_allclose(schur_information(x), expected, rtol=1e-9)


def test_directional_variance_is_infinite_outside_the_range_alone() -> None:
    information = np.diag([4.0, 0.0])
    assert directional_variance(information, np.array([1.0, 0.0])) == 0.25
    assert directional_variance(information, np.array([1.0, 1.0])) == math.inf
    assert directional_variance(information * 1e-20, np.array([1.0, 0.0])) == pytest.approx(2.5e19)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, common=SIZES)
def test_statements_hold_for_full_designs(seed: int, common: int) -> None:
    x, y = draw(seed, common)
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(common)
    eigenvector = np.linalg.eigh(block_information(x))[1][:, 0]
    for check in (
        check_theorem_1(x, y),
        check_theorem_2_information(x, y, v),
        check_theorem_2_range(x, y, v),
        check_corollary_3(x, y, eigenvector),
    ):
        assert check.assumed and check.holds, check


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, common=SIZES)
def test_statements_hold_where_x_is_blind_to_a_direction(seed: int, common: int) -> None:
    x, y = draw(seed, common, x_blind=1)
    unseen = np.linalg.eigh(block_information(x))[1][:, 0]
    for check in (
        check_theorem_2_variance(x, y, unseen),
        check_corollary_2(x, y, unseen),
        check_theorem_3(x, y),
    ):
        assert check.assumed and check.holds, check
    assert check_corollary_2(x, y, unseen).quantity("variance_x") == math.inf


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, a=st.floats(0.1, 10), b=st.floats(0, 10))
def test_corollary_1_gives_the_factor(seed: int, a: float, b: float) -> None:
    rng = np.random.default_rng(seed)
    basis = random_basis(rng, 3)
    x, y = (
        random_design(rng, basis, np.array([s, 1.0, 2.0]), samples=4, rows=5, specific=2)
        for s in (math.sqrt(a), math.sqrt(b))
    )
    check = check_corollary_1(x, y, basis[:, 0])
    assert check.assumed and check.holds
    assert check.quantity("ratio") == pytest.approx(a / (a + b), rel=1e-6)


def test_corollary_1_needs_a_common_eigenvector() -> None:
    x, y = draw(2, 4)
    eigenvector_of_x = np.linalg.eigh(block_information(x))[1][:, 0]
    check = check_corollary_1(x, y, eigenvector_of_x)
    assert not check.assumed and not check.holds


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, common=SIZES)
def test_a_rank_deficient_y_does_not_improve_every_direction(seed: int, common: int) -> None:
    x, y = draw(seed, common, y_blind=1)
    check = check_theorem_1(x, y)
    assert not check.assumed and not check.holds
    assert abs(check.quantity("information_gap")) < 1e-9


def test_a_direction_y_does_not_see_gains_nothing() -> None:
    x, y = draw(3, 5, y_blind=1)
    unseen = np.linalg.eigh(block_information(y))[1][:, 0]
    check = check_theorem_2_information(x, y, unseen)
    assert not check.assumed and not check.holds
    assert check.quantity("information_joint") == pytest.approx(check.quantity("information_x"))


def test_y_confounded_with_its_own_parameters_helps_only_the_block_reading() -> None:
    """Y observes theta_c + theta_y alone: full rank, but worthless once theta_y is estimated."""
    x, _ = draw(4, 3)
    identity = np.eye(3)[None]
    check = check_theorem_1(x, Design(identity, identity))
    assert check.assumed and check.holds and check.holds_schur is False
    assert check.quantity("trace_ratio") < 1
    assert check.quantity("trace_ratio_schur") == pytest.approx(1)


def test_seeing_a_direction_is_not_enough_to_identify_it() -> None:
    """I_X = 0 and I_Y = w w': v is seen, yet only w becomes identified."""
    blind, w = from_rows([0.0, 0.0]), from_rows([1.0, 0.0])
    oblique = check_theorem_2_variance(blind, w, np.array([1.0, 1.0]))
    assert not oblique.assumed and not oblique.holds
    along = check_theorem_2_variance(blind, w, np.array([1.0, 0.0]))
    assert along.assumed and along.holds


def test_a_singular_x_can_keep_the_variance_of_its_own_eigenvector() -> None:
    """I_X = e1 e1' and I_Y = (e1 + e2)(e1 + e2)': Y spends its one equation on e2."""
    x, y, e1 = from_rows([1.0, 0.0]), from_rows([1.0, 1.0]), np.array([1.0, 0.0])
    for check in (check_corollary_3(x, y, e1), check_theorem_2_range(x, y, e1)):
        assert not check.assumed and not check.holds
        assert check.quantity("variance_joint") == pytest.approx(check.quantity("variance_x"))


def test_theorem_3_fails_where_x_sees_more_of_everything() -> None:
    x, y = from_rows([2.0, 0.0], [0.0, 2.0]), from_rows([1.0, 0.0], [0.0, 1.0])
    check = check_theorem_3(x, y)
    assert not check.assumed and not check.holds


@pytest.mark.parametrize("known_specific", [True, False])
def test_least_squares_has_the_predicted_variance(known_specific: bool) -> None:
    x, y = draw(5, 4)
    rng = np.random.default_rng(5)
    found = simulate_variance(x, y, rng, trials=4000, known_specific=known_specific)
    assert found.empirical_x == pytest.approx(found.predicted_x, rel=0.1)
    assert found.empirical_joint == pytest.approx(found.predicted_joint, rel=0.1)
    assert found.empirical_joint < found.empirical_x


def test_estimating_the_specific_parameters_costs_variance() -> None:
    """One sample sees theta_c + theta_x, one theta_x: variance 1 where theta_x is known, else 2."""
    both = np.array([[[1.0]], [[0.0]]]), np.array([[[1.0]], [[1.0]]])
    x = Design(*both)
    rng = np.random.default_rng(6)
    known, estimated = (simulate_variance(x, x, rng, known_specific=k) for k in (True, False))
    assert known.empirical_x == pytest.approx(1, rel=0.2)
    assert estimated.empirical_x == pytest.approx(2, rel=0.2)
    assert estimated.empirical_joint == pytest.approx(1, rel=0.2)


def test_simulation_shows_no_drop_for_a_y_that_sees_nothing() -> None:
    x, y = draw(7, 3, y_blind=3)
    check = check_simulation(x, y, np.random.default_rng(7), known_specific=True)
    assert not check.holds
    assert check.quantity("variance_joint") == pytest.approx(check.quantity("variance_x"))


def test_simulation_refuses_an_unidentified_target() -> None:
    x, y = draw(8, 3, x_blind=1)
    with pytest.raises(ValueError, match="does not identify"):
        simulate_variance(x, y, np.random.default_rng(8))


@pytest.mark.parametrize("seed", range(3))
def test_check_all_confirms_every_statement(seed: int) -> None:
    checks = check_all(seed)
    assert {c.name.split(",")[0] for c in checks} == {
        "Theorem 1", "Theorem 2", "Theorem 3", "Corollary 1", "Corollary 2", "Corollary 3",
        "Simulation",
    }  # fmt: skip
    assert all(c.assumed and c.holds for c in checks), [c for c in checks if not c.holds]


def test_checks_are_plain_values() -> None:
    for check in check_all(0):
        for key, value in dataclasses.asdict(check).items():
            kinds = {type(v) for v in value} if key == "quantities" else {type(value)}
            assert kinds <= {str, bool, type(None), tuple}, (check.name, key, kinds)
        assert all(type(v) is float for _, v in check.quantities)


def test_design_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(N, M, K\)"):
        Design(np.zeros((2, 3, 4)), np.zeros((2, 4, 1)))
    with pytest.raises(ValueError, match="positive"):
        Design(np.zeros((2, 3, 4)), np.zeros((2, 3, 1)), noise=0.0)
