"""Functional margins of a linear head (paper F.3, figure 44).

Legend: N samples, D features, C classes.
"""

from __future__ import annotations

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_labels, checked_rows, same_samples


def functional_margins(
    weight_CD: np.ndarray, rows_ND: np.ndarray, labels_N: np.ndarray
) -> np.ndarray:
    """Signed distance of each sample to the boundary with the best wrong class.

    ``g_i = (w_y' x_i - w_j' x_i) / |w_y - w_j|`` with j the wrong class of the largest logit; in
    the unit of the features, negative where the sample is misclassified, 0 where both rows of the
    head are equal.

    Args:
        weight_CD: float (C, D) head, projection and scale folded in, without bias.
        rows_ND: float (N, D) features.
        labels_N: int (N,) classes, 0..C-1.

    Returns:
        float64 (N,).

    Raises:
        AnalysisError: fewer than two classes, shapes that do not match, or values not finite.
    """
    weight = checked_rows("head", weight_CD, 2)
    rows = checked_rows("features", rows_ND)
    if weight.shape[1] != rows.shape[1]:
        raise AnalysisError(
            f"the head reads {weight.shape[1]} features, the samples have {rows.shape[1]}"
        )
    labels = checked_labels("features", labels_N, len(rows), len(weight))
    same_samples("features and labels", rows, labels)
    logits = rows @ weight.T
    at = np.arange(len(rows))
    own = logits[at, labels].copy()
    logits[at, labels] = -np.inf
    wrong = logits.argmax(1)
    distance = np.linalg.norm(weight[labels] - weight[wrong], axis=1)
    gap = own - logits[at, wrong]
    return np.divide(gap, distance, out=np.zeros_like(gap), where=distance > 0)
