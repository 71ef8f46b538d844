"""The plane in which a boundary between two classes is drawn (paper F.2).

Legend: N samples, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_labels, checked_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryView:
    """Samples of two classes in the plane of the paper's pictures."""

    axis_1: np.ndarray
    """float64 (D,) unit vector along w_a - w_b; the boundary is where it is 0."""
    axis_2: np.ndarray
    """float64 (D,) unit vector along the difference of the class means, without its axis 1."""
    points_M2: np.ndarray
    """float64 (M, 2) samples of both classes, by dot products with the axes."""
    is_a_M: np.ndarray
    """bool (M,) whether each is of class a (right of the boundary where the head is right)."""


def boundary_view(
    weight_CD: np.ndarray, rows_ND: np.ndarray, labels_N: np.ndarray, a: int, b: int
) -> BoundaryView:
    """Project samples of the classes ``a`` and ``b`` as the paper does.

    Axis 1 is ``(w_a - w_b) / |w_a - w_b|``: the head prefers a where it is positive. Axis 2 is
    ``mean_a - mean_b`` less its part along axis 1, normalised.

    Args:
        weight_CD: float (C, D) head, without bias.
        rows_ND: float (N, D) features of all classes.
        labels_N: int (N,) classes.
        a: one class.
        b: another one.

    Raises:
        AnalysisError: the same class twice, a class without samples, equal rows of the head, means
            that differ along axis 1 alone, shapes that do not match, or values not finite.
    """
    weight, rows = checked_rows("head", weight_CD, 2), checked_rows("features", rows_ND)
    labels = checked_labels("features", labels_N, len(rows), len(weight))
    if weight.shape[1] != rows.shape[1]:
        raise AnalysisError(
            f"the head reads {weight.shape[1]} features, the samples have {rows.shape[1]}"
        )
    for c in (a, b):
        if not (labels == c).any():
            raise AnalysisError(f"decision boundary: class {c} has no sample")
    normal = weight[a] - weight[b]
    length = float(np.linalg.norm(normal))
    if a == b or length == 0:
        raise AnalysisError(f"decision boundary: the head does not tell classes {a} and {b} apart")
    axis_1 = normal / length
    between = rows[labels == a].mean(0) - rows[labels == b].mean(0)
    rest = between - (between @ axis_1) * axis_1
    size = float(np.linalg.norm(rest))
    if size <= 1e-9 * max(float(np.linalg.norm(between)), 1e-300):
        raise AnalysisError(
            f"decision boundary: the means of {a} and {b} differ along the head's normal alone"
        )
    shown = (labels == a) | (labels == b)
    axes = np.stack([axis_1, rest / size], 1)
    return BoundaryView(
        axis_1=axis_1, axis_2=rest / size, points_M2=rows[shown] @ axes, is_a_M=labels[shown] == a
    )


def most_confused(logits_NC: np.ndarray, labels_N: np.ndarray) -> tuple[int, int]:
    """The pair of classes whose samples are most often taken for each other.

    Of pairs that tie, as where nothing is confused, the one whose smallest gap of logits is least.

    Raises:
        AnalysisError: fewer than two classes among the samples, or values not finite.
    """
    logits = checked_rows("logits", logits_NC)
    labels = checked_labels("logits", labels_N, len(logits), logits.shape[1])
    present = np.unique(labels)
    if len(present) < 2:
        raise AnalysisError("decision boundary: the samples are of one class alone")
    classes = logits.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    absent = np.setdiff1d(np.arange(classes), present)
    both = (counts + counts.T).astype(np.float64)
    both[absent, :] = both[:, absent] = -1
    gap = np.full((classes, classes), np.inf)
    for c in present:
        own = logits[labels == c]
        gap[c] = (own[:, [c]] - own).min(0)
    gap = np.minimum(gap, gap.T)
    upper = np.triu_indices(classes, 1)
    best = np.lexsort((gap[upper], -both[upper]))[0]
    return int(upper[0][best]), int(upper[1][best])
