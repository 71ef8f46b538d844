"""Functional margins, the picture of a boundary and cluster scores against independent formulas."""

import numpy as np
import pytest

from uml_fast.analysis.boundary import boundary_view, most_confused
from uml_fast.analysis.clusters import cluster_scores
from uml_fast.analysis.inputs import AnalysisError, class_means, evenly
from uml_fast.analysis.margins import functional_margins


@pytest.fixture
def head():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 6)), rng.normal(size=(50, 6)), rng.integers(0, 4, 50)


def test_margin_is_the_distance_to_the_nearest_point_that_the_rival_wins(head):
    w, x, y = head
    got = functional_margins(w, x, y)
    for i in range(len(x)):
        logits = w @ x[i]
        wrong = max((c for c in range(4) if c != y[i]), key=lambda c: logits[c])
        normal = w[y[i]] - w[wrong]
        on_boundary = x[i] - got[i] * normal / np.linalg.norm(normal)
        assert w[y[i]] @ on_boundary == pytest.approx(w[wrong] @ on_boundary)
    assert ((got > 0) == ((x @ w.T).argmax(1) == y)).all()


def test_margin_ignores_the_scale_of_the_head_and_follows_that_of_the_features(head):
    w, x, y = head
    assert functional_margins(5 * w, x, y) == pytest.approx(functional_margins(w, x, y))
    assert functional_margins(w, 2 * x, y) == pytest.approx(2 * functional_margins(w, x, y))


def test_margin_of_equal_head_rows_is_zero():
    assert functional_margins(np.ones((2, 3)), np.eye(3), np.array([0, 1, 0])).tolist() == [0] * 3


@pytest.mark.parametrize(
    ("weight", "rows", "labels", "message"),
    [
        (np.ones((1, 3)), np.eye(3), np.zeros(3, int), "head: 1 samples; at least 2"),
        (np.ones((2, 4)), np.eye(3), np.zeros(3, int), "reads 4 features, the samples have 3"),
        (np.ones((2, 3)), np.eye(3), np.full(3, 2), "label 2; they are 0..1"),
        (np.ones((2, 3)), np.full((3, 3), np.inf), np.zeros(3, int), "3 of 3 rows hold NaN"),
        (np.ones((2, 3)), np.eye(3), np.zeros(3), "one integer for each"),
    ],
)
def test_margins_refuse(weight, rows, labels, message):
    with pytest.raises(AnalysisError, match=message):
        functional_margins(weight, rows, labels)


def test_view_is_orthonormal_and_shows_the_decision(head):
    w, x, y = head
    got = boundary_view(w, x, y, 1, 3)
    axes = np.stack([got.axis_1, got.axis_2])
    assert axes @ axes.T == pytest.approx(np.eye(2), abs=1e-12)
    shown = np.isin(y, (1, 3))
    assert got.points_M2 == pytest.approx(x[shown] @ axes.T)
    prefers_a = (x[shown] @ (w[1] - w[3])) > 0
    assert ((got.points_M2[:, 0] > 0) == prefers_a).all()
    assert (got.is_a_M == (y[shown] == 1)).all()
    between = x[y == 1].mean(0) - x[y == 3].mean(0)
    assert between == pytest.approx(axes.T @ (axes @ between))  # the means lie in the plane


@pytest.mark.parametrize(
    ("weight", "labels", "pair", "message"),
    [
        (np.eye(3), [0, 0, 1], (0, 2), "class 2 has no sample"),
        (np.ones((3, 3)), [0, 1, 2], (0, 1), "does not tell classes 0 and 1 apart"),
        (np.eye(3), [0, 1, 2], (1, 1), "does not tell"),
        (np.eye(3), [0, 1, 2], (0, 1), "differ along the head's normal alone"),
    ],
)
def test_view_refuses(weight, labels, pair, message):
    with pytest.raises(AnalysisError, match=message):
        boundary_view(weight, np.eye(3), np.array(labels), *pair)


def test_most_confused_pair():
    logits = np.eye(4)[[0, 1, 2, 3, 1, 2, 2, 1]] * 5
    labels = np.array([0, 1, 2, 3, 2, 1, 2, 0])
    assert most_confused(logits, labels) == (1, 2)
    # nothing is confused: the classes 0 and 2 are nearest
    apart = np.array([[9.0, 0, 8], [0, 9, 1], [3, 0, 9]])
    assert most_confused(apart, np.arange(3)) == (0, 2)
    with pytest.raises(AnalysisError, match="one class alone"):
        most_confused(np.eye(3), np.ones(3, int))


def test_most_confused_never_names_a_class_without_samples():
    logits = np.array([[0.0, 1, 9], [0, 1, 9], [1, 0, 9]])
    assert most_confused(logits, np.array([0, 1, 0])) == (0, 1)


def test_silhouette_and_davies_bouldin_by_hand():
    x = np.array([[0.0], [1.0], [10.0], [12.0]])
    y = np.array([0, 0, 1, 1])
    got = cluster_scores(x, y)
    own = np.array([1, 1, 2, 2])
    other = np.array([11, 10, 9.5, 11.5])
    assert got.silhouette == pytest.approx(np.mean((other - own) / other))
    assert got.davies_bouldin == pytest.approx((0.5 + 1.0) / 10.5)
    assert got.samples == 4


def test_tighter_classes_score_better():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(5), 20)
    centres = rng.normal(size=(5, 8)) * 3
    loose, tight = (cluster_scores(centres[y] + s * rng.normal(size=(100, 8)), y) for s in (3, 1))
    assert tight.silhouette > loose.silhouette
    assert tight.davies_bouldin < loose.davies_bouldin


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (np.eye(4), [1, 1, 1, 1], "1 classes in 4 samples"),
        (np.eye(4), [0, 1, 2, 3], "4 classes in 4 samples"),
        (np.ones((4, 3)), [0, 0, 1, 1], "collapsed"),
        (np.eye(4), [0, 0, 1, -1], "sample 3 has label -1"),
        (np.full((4, 3), np.nan), [0, 0, 1, 1], "hold NaN"),
    ],
)
def test_clusters_refuse(rows, labels, message):
    with pytest.raises(AnalysisError, match=message):
        cluster_scores(rows, np.array(labels))


def test_class_means_and_even_choice():
    got = class_means(np.array([[1.0], [3.0], [5.0]]), np.array([0, 0, 2]), 3)
    assert got[[0, 2]].tolist() == [[2.0], [5.0]] and np.isnan(got[1]).all()
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(100, 5).tolist() == [0, 24, 49, 74, 99]
