"""How well classes form clusters: silhouette and Davies-Bouldin (paper F.3, figures 45 and 46)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_labels, checked_rows, evenly

MOST = 5_000
"""Samples that are compared with each other at most, evenly spread (200 MB of distances)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterScores:
    """Both scores in one space."""

    silhouette: float
    """-1..1, higher is better."""
    davies_bouldin: float
    """>= 0, lower is better."""
    samples: int
    """Samples that were compared."""


def cluster_scores(rows_ND: np.ndarray, labels_N: np.ndarray) -> ClusterScores:
    """Silhouette and Davies-Bouldin scores of the classes as clusters, Euclidean.

    The paper does not say in which space it measures; callers name theirs (embeddings, logits).

    Args:
        rows_ND: float (N, D) samples.
        labels_N: int (N,) class of each.

    Raises:
        AnalysisError: one class alone, as many classes as samples, rows all equal, shapes that do
            not match, or values that are not finite.
    """
    from sklearn.metrics import davies_bouldin_score, silhouette_score

    rows = checked_rows("clusters", rows_ND, 3)
    labels = checked_labels("clusters", labels_N, len(rows), None)
    chosen = evenly(len(rows), MOST)
    rows, labels = rows[chosen], labels[chosen]
    classes = len(np.unique(labels))
    if not 2 <= classes < len(rows):
        raise AnalysisError(
            f"clusters: {classes} classes in {len(rows)} samples; needed are two or more, and "
            "fewer than samples"
        )
    if not np.ptp(rows, axis=0).any():
        raise AnalysisError("clusters: all samples are equal; the representation has collapsed")
    return ClusterScores(
        silhouette=float(silhouette_score(rows, labels)),
        davies_bouldin=float(davies_bouldin_score(rows, labels)),
        samples=len(rows),
    )
