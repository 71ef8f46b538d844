"""Alignment of head and texts, units over true pairs, CKA and mutual neighbours."""

import numpy as np
import pytest
from scipy import stats

from uml_fast.analysis.alignment import alignment, alignment_matrix
from uml_fast.analysis.inputs import AnalysisError
from uml_fast.analysis.neurons import neuron_correlations, pearson
from uml_fast.analysis.similarity import linear_cka, mutual_knn

RNG = np.random.default_rng


def test_aligned_head_has_a_strong_diagonal_and_a_random_one_has_not():
    rng = RNG(0)
    texts = rng.normal(size=(20, 16))
    aligned = alignment(alignment_matrix(texts + rng.normal(size=texts.shape), texts))
    random = alignment(alignment_matrix(rng.normal(size=texts.shape), texts))
    assert aligned.contrast > 2 and aligned.top1 >= 0.9 and aligned.p_value == 0.001
    assert abs(random.contrast) < 1 and random.top1 < 0.3 and random.p_value > 0.02


def test_alignment_numbers_by_hand():
    m = np.array([[3.0, 1], [0, 2]])
    got = alignment(m)
    assert (got.diagonal, got.off_diagonal, got.top1) == (2.5, 0.5, 1.0)
    assert got.contrast == pytest.approx(2 / m.std())
    assert got.p_value == pytest.approx(0.5, abs=0.06)  # one of two assignments
    assert alignment(10 * m).contrast == pytest.approx(got.contrast)
    assert alignment(np.ones((3, 3))).contrast == 0


def test_permutation_p_values_are_uniform_where_nothing_is_aligned():
    rng = RNG(1)
    p = [alignment(rng.normal(size=(8, 8)), seed=i).p_value for i in range(60)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment(np.ones((2, 3))), "must be square"),
        (lambda: alignment(np.ones((1, 1))), "at least 2"),
        (lambda: alignment_matrix(np.ones((3, 2)), np.ones((3, 4))), "texts are"),
        (lambda: alignment_matrix(np.ones((3, 2)), np.full((3, 2), np.nan)), "hold NaN"),
    ],
)
def test_alignment_refuses(call, message):
    with pytest.raises(AnalysisError, match=message):
        call()


def test_units_correlate_as_scipy_says_and_constant_ones_are_zero():
    rng = RNG(2)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(40, 5))
    b[:, 1] = 3 - 2 * a[:, 1]
    a[:, 3] = 0.1
    b[:, 4] = 1e6
    got = pearson(a, b)
    expected = [stats.pearsonr(a[:, j], b[:, j]).statistic for j in (0, 1, 2)]
    assert got[:3] == pytest.approx(expected)
    assert got[1] == pytest.approx(-1)
    assert got[3] == got[4] == 0


def test_units_are_conditioned_on_labels_and_ranked_against_a_baseline():
    rng = RNG(3)
    labels = np.repeat([0, 1, -1, 2], [30, 30, 10, 2])
    a, b = rng.normal(size=(72, 4)), rng.normal(size=(72, 4))
    b[labels == 1, 2] = a[labels == 1, 2]
    b[:, 3] = a[:, 3] + 0.1 * b[:, 3]
    got = neuron_correlations(a, b, labels)
    assert sorted(got.by_label) == [0, 1]  # 2 has two pairs, -1 is no label
    assert got.by_label[1][2] == pytest.approx(1)
    assert abs(got.by_label[0][2]) < 0.5
    assert got.by_label[0] == pytest.approx(pearson(a[:30], b[:30]))
    assert got.pairs == 72
    assert got.multimodal(0.9).tolist() == [3]
    assert got.multimodal(got.strongest).tolist() == []
    assert got.multimodal(0.0)[0] == 3


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, 3)), np.ones((1, 3)), "1 samples; at least 2"),
        (np.ones((4, 3)), np.ones((5, 3)), "4 and 5 samples"),
        (np.ones((4, 3)), np.ones((4, 2)), "units differ"),
        (np.full((4, 3), np.nan), np.ones((4, 3)), "first modality: 4 of 4 rows hold NaN"),
    ],
)
def test_units_refuse(a, b, message):
    with pytest.raises(AnalysisError, match=message):
        neuron_correlations(a, b)


def test_cka_is_one_up_to_rotation_scale_and_shift():
    rng = RNG(4)
    a = rng.normal(size=(60, 8))
    rotated = 3 * a @ np.linalg.qr(rng.normal(size=(8, 8)))[0] + 5
    for debiased in (True, False):
        assert linear_cka(a, rotated, debiased=debiased) == pytest.approx(1)
        assert mutual_knn(a, rotated, 5) == 1


def test_plain_cka_is_that_of_the_paper():
    rng = RNG(5)
    a, b = rng.normal(size=(30, 6)), rng.normal(size=(30, 9))
    x, y = a - a.mean(0), b - b.mean(0)
    cross = np.linalg.norm(y.T @ x, "fro") ** 2
    own = np.linalg.norm(x.T @ x, "fro") * np.linalg.norm(y.T @ y, "fro")
    assert linear_cka(a, b, debiased=False) == pytest.approx(cross / own)


def test_debiased_cka_of_unrelated_representations_is_zero_on_average():
    rng = RNG(6)
    pairs = [(rng.normal(size=(30, 40)), rng.normal(size=(30, 40))) for _ in range(60)]
    plain = np.mean([linear_cka(a, b, debiased=False) for a, b in pairs])
    debiased = np.mean([linear_cka(a, b) for a, b in pairs])
    assert plain > 0.5
    assert abs(debiased) < 0.02


def test_mutual_neighbours_of_unrelated_representations_are_at_chance():
    rng = RNG(7)
    got = np.mean(
        [mutual_knn(rng.normal(size=(50, 5)), rng.normal(size=(50, 5)), 7) for _ in range(20)]
    )
    assert got == pytest.approx(7 / 49, abs=0.02)


def test_collapsed_representations_have_similarity_zero():
    a = RNG(8).normal(size=(20, 4))
    constant = np.full((20, 4), 0.1)
    assert linear_cka(a, constant) == 0
    assert linear_cka(a, constant, debiased=False) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_cka(np.eye(3), np.eye(3)), "3 samples; at least 4"),
        (lambda: linear_cka(np.eye(5), np.eye(6)), "5 and 6 samples"),
        (lambda: mutual_knn(np.eye(5), np.eye(5), 5), r"must be in 1\.\.4"),
        (lambda: mutual_knn(np.eye(5) * np.nan, np.eye(5), 2), "hold NaN"),
    ],
)
def test_similarity_refuses(call, message):
    with pytest.raises(AnalysisError, match=message):
        call()
