"""Probes of embeddings with a known answer, and refusals that name what is wrong."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from uml_fast.analysis.probe import ProbeError, knn, linear_probe


def clusters(n: int, classes: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 6) points around fixed class centres and their classes."""
    centres = np.random.default_rng(99).normal(0, 1, (classes, 6))
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (centres[y] + rng.normal(0, spread, (n, 6))).astype(np.float32), y.astype(np.int32)


@pytest.fixture
def overlapping():
    return (*clusters(200, 4, 1.0, 0), *clusters(300, 4, 1.0, 1))


def test_separable_classes_are_found_and_shuffled_labels_are_not():
    train_x, train_y = clusters(120, 4, 0.05, 0)
    test_x, test_y = clusters(400, 4, 0.05, 1)
    assert linear_probe(train_x, train_y, test_x, test_y) == 1.0
    assert knn(train_x, train_y, test_x, test_y) == 1.0
    noise = np.random.default_rng(2).normal(size=test_x.shape)
    assert linear_probe(train_x, train_y, noise, test_y) < 0.45


def test_default_preset_is_the_papers_setting(overlapping):
    train_x, train_y, test_x, test_y = overlapping
    model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=200).fit(
        train_x.astype(np.float64), train_y
    )
    assert linear_probe(*overlapping) == model.score(test_x.astype(np.float64), test_y) < 1.0


def test_mosi_preset_standardises_and_uses_liblinear():
    train_x, train_y = clusters(60, 2, 2.0, 0)
    test_x, test_y = clusters(500, 2, 2.0, 1)
    scale = np.array([1e-3, 1, 1, 1e3, 1, 1])
    train_x, test_x = train_x * scale, test_x * scale
    scaler = StandardScaler().fit(train_x)
    model = LogisticRegression(solver="liblinear", max_iter=1000).fit(
        scaler.transform(train_x), train_y
    )
    expected = model.score(scaler.transform(test_x), test_y)
    assert linear_probe(train_x, train_y, test_x, test_y, preset="mosi") == expected
    assert linear_probe(train_x, train_y, test_x, test_y) != expected


def test_mosi_preset_refuses_more_than_two_classes(overlapping):
    with pytest.raises(ProbeError, match=r"two classes, there are 4"):
        linear_probe(*overlapping, preset="mosi")


def test_iteration_limit_is_logged_and_does_not_warn(overlapping, caplog):
    train_x, train_y, test_x, test_y = overlapping
    ill = np.array([1e4, 1e-2, 1e3, 1, 1e2, 1e-1])
    with caplog.at_level("INFO"):
        linear_probe(train_x * ill, train_y, test_x * ill, test_y)
    assert "iteration limit" in caplog.text


def test_knn_votes_and_measures_angles():
    train_x = np.array([[1.0, 0.0], [0.9, 0.0], [0.0, 10.0]])
    train_y = np.array([0, 0, 1])
    query = np.array([[0.2, 1.0]])
    assert knn(train_x, train_y, query, np.array([0])) == 1.0
    assert knn(train_x, train_y, query, np.array([1]), metric="cosine") == 1.0
    assert knn(train_x, train_y, np.array([[0.0, 9.0]]), np.array([0]), k=3) == 1.0


def corrupt(**change):
    train_x, train_y = clusters(40, 4, 0.3, 0)
    test_x, test_y = clusters(20, 4, 0.3, 1)
    data = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    return {**data, **{k: f(data[k].copy()) for k, f in change.items()}}


def with_nan(x):
    x[3, 2] = np.nan
    return x


@pytest.mark.parametrize("probe", [linear_probe, knn])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_x": with_nan},
            "train: 1 of 40 embeddings hold NaN or infinity.* row 3",
        ),
        ({"test_x": with_nan}, "test: 1 of 20 embeddings"),
        ({"train_y": lambda y: np.where(y == 2, 0, y)}, "no training sample of class 'owl'"),
        ({"test_x": lambda x: x[:, :4]}, "6 features in train and 4 in test"),
        ({"train_y": lambda y: y[:-1]}, r"train: embeddings \[40, 6\] and labels \[39\]"),
    ],
)
def test_bad_input_is_named(probe, change, message):
    with pytest.raises(ProbeError, match=message):
        probe(**corrupt(**change), class_names=("ant", "bee", "owl", "yak"))


def test_one_class_is_refused():
    data = corrupt(train_y=np.zeros_like, test_y=np.zeros_like)
    with pytest.raises(ProbeError, match="all 40 training samples are of class 0"):
        linear_probe(**data)
    assert knn(**data) == 1.0


def test_knn_refuses_more_neighbours_than_samples():
    with pytest.raises(ProbeError, match="k is 41; there are 40"):
        knn(**corrupt(), k=41)
