"""Accuracy on shifted sets: subsets of the head's classes, classes that it does not know."""

import numpy as np
import pytest

from uml_fast.analysis.inputs import AnalysisError
from uml_fast.analysis.shift import class_map, shifted_accuracy

LOGITS = np.array(
    [[9.0, 1, 2, 0], [0, 5, 6, 1], [0, 3, 2, 8], [1, 7, 0, 0], [0, 0, 2, 9]], np.float32
)
"""Of a head of four classes."""


def test_all_classes_is_plain_accuracy():
    got = shifted_accuracy(LOGITS, np.array([0, 2, 3, 1, 2]))
    assert got.accuracy == got.accuracy_all == 0.8
    assert (got.samples, got.classes) == (5, 4)


def test_a_subset_is_judged_among_its_own_classes():
    # the set's classes 0, 1 are the head's 2, 1
    got = shifted_accuracy(LOGITS[[1, 2, 3]], np.array([0, 1, 1]), np.array([2, 1]))
    assert got.accuracy == 1.0  # sample 2: 3 > 2 once class 3 is not asked
    assert got.accuracy_all == pytest.approx(2 / 3)
    assert got.classes == 2
    as_mapping = shifted_accuracy(LOGITS[[1, 2, 3]], np.array([0, 1, 1]), {0: 2, 1: 1})
    assert as_mapping == got


def test_equals_the_release_way_on_many_samples():
    """Logits of the set's classes cut out by the label map, then argmax, as ImageNet-R is tested"""
    rng = np.random.default_rng(0)
    logits, names = rng.normal(size=(500, 30)), [f"n{i}" for i in range(30)]
    chosen = rng.permutation(30)[:7]
    labels = rng.integers(0, 7, 500)
    mapping = class_map([names[c] for c in chosen], names)
    assert mapping.tolist() == chosen.tolist()
    got = shifted_accuracy(logits, labels, mapping)
    assert got.accuracy == np.mean(np.argmax(logits[:, chosen], 1) == labels)
    assert got.accuracy_all == np.mean(np.argmax(logits, 1) == chosen[labels])


def test_unknown_classes_are_left_out_and_counted():
    mapping = class_map(["whale", "b"], ["a", "b"])
    assert mapping.tolist() == [-1, 1]
    got = shifted_accuracy(LOGITS[:, :2], np.array([0, 1, 1, 0, 1]), mapping)
    assert (got.samples, got.classes) == (3, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_map(["x"], ["a", "b"]), "none of the set's classes"),
        (lambda: class_map(["a", "a"], ["a", "b"]), "shifted set has the class 'a' twice"),
        (lambda: shifted_accuracy(LOGITS, np.zeros(5, int), np.array([1, 1])), "at most once"),
        (lambda: shifted_accuracy(LOGITS, np.zeros(5, int), np.array([4])), "head's 4 classes"),
        (lambda: shifted_accuracy(LOGITS, np.zeros(5, int), np.array([-1, 0])), "no sample of"),
        (lambda: shifted_accuracy(LOGITS, np.zeros(4, int)), "one integer for each of 5"),
        (lambda: shifted_accuracy(LOGITS, np.full(5, 4)), "sample 0 has label 4; they are 0..3"),
        (lambda: shifted_accuracy(LOGITS * np.nan, np.zeros(5, int)), "5 of 5 rows hold NaN"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(AnalysisError, match=message):
        call()
