"""Accuracy of a trained head on samples from elsewhere (paper figures 5 and 12 to 15).

The paper trains on k shots of ImageNet and tests on ImageNet-V2, -Sketch, -A and -R; the last two
have 200 of the 1,000 classes.

Legend: N samples, C classes of the head, K classes of the shifted set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_labels, checked_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftedAccuracy:
    """How a head does on a shifted set; fractions 0..1."""

    accuracy: float
    """The head chooses among the classes of the set, the protocol of ImageNet-A and -R."""
    accuracy_all: float
    """It chooses among all of its own classes; equal where the set has them all."""
    samples: int
    """N."""
    classes: int
    """Classes of the set that the head knows."""


def class_map(set_names: Sequence[str], head_names: Sequence[str]) -> np.ndarray:
    """int64 (K,) class of the head of each class of a set, by name; -1 where the head has none.

    Raises:
        AnalysisError: a name twice on a side, or no class in common.
    """
    for what, names in (("shifted set", set_names), ("head", head_names)):
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise AnalysisError(f"the {what} has the class {twice[0]!r} twice")
    numbers = {name: i for i, name in enumerate(head_names)}
    found = np.array([numbers.get(n, -1) for n in set_names], np.int64)
    if not (found >= 0).any():
        raise AnalysisError(
            f"none of the set's classes ({', '.join(set_names[:3])}, ...) is one of the head's "
            f"({', '.join(head_names[:3])}, ...); name them alike"
        )
    return found


def shifted_accuracy(
    logits_NC: np.ndarray,
    labels_N: np.ndarray,
    classes_K: np.ndarray | Mapping[int, int] | None = None,
) -> ShiftedAccuracy:
    """Accuracy of logits on a shifted set.

    Args:
        logits_NC: float (N, C) of the samples.
        labels_N: int (N,) class of each among those of the set, 0..K-1.
        classes_K: class of the head of each class of the set (``label_map`` of ImageNet-A and -R);
            -1: the head has no such class, and its samples are left out. None: the head's own.

    Raises:
        AnalysisError: shapes do not match, a logit that is not finite, two classes of the set that
            are one of the head, a class that is none of the head's, or nothing is left.
    """
    logits = checked_rows("logits", logits_NC)
    classes = logits.shape[1]
    if isinstance(classes_K, Mapping):
        given = [classes_K.get(k, -1) for k in range(max(classes_K, default=-1) + 1)]
        classes_K = np.array(given, np.int64)
    mapping = np.arange(classes) if classes_K is None else np.asarray(classes_K)
    known = mapping[mapping >= 0]
    if len(np.unique(known)) != len(known) or (known >= classes).any():
        raise AnalysisError(
            f"a class map names each of the head's {classes} classes at most once, got "
            f"{known[:5].tolist()}..."
        )
    labels = mapping[checked_labels("shifted set", labels_N, len(logits), len(mapping))]
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise AnalysisError("no sample of the shifted set is of a class that the head knows")
    return ShiftedAccuracy(
        accuracy=float((known[logits[:, known].argmax(1)] == labels).mean()),
        accuracy_all=float((logits.argmax(1) == labels).mean()),
        samples=len(labels),
        classes=len(known),
    )
