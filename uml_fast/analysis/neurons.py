"""Multimodal neurons: units that answer to one thing in two modalities (paper 4.5 and F.1).

True pairs of samples are used for measuring alone; training never saw them.

Legend: N true pairs, E units (features of the embedding).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_labels, checked_rows, same_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronCorrelations:
    """Pearson correlation of each unit between two modalities."""

    overall: np.ndarray
    """float64 (E,) over all pairs."""
    by_label: dict[int, np.ndarray]
    """The same within each label that has three pairs or more."""
    pairs: int
    """N."""

    @property
    def strongest(self) -> float:
        """The largest absolute correlation of any unit."""
        return float(np.abs(self.overall).max())

    def multimodal(self, baseline: float) -> np.ndarray:
        """int64 units with an absolute correlation above ``baseline``, the strongest first.

        The paper's baseline is ``strongest`` of the untrained network.
        """
        size = np.abs(self.overall)
        order = np.argsort(-size, kind="stable")
        return order[size[order] > baseline]


def pearson(a_NE: np.ndarray, b_NE: np.ndarray) -> np.ndarray:
    """float64 (E,) correlation of each unit over pairs; 0 where it is undefined (a constant unit).

    Raises:
        AnalysisError: shapes that differ, fewer than two pairs, or values that are not finite.
    """
    a, b = checked_rows("first modality", a_NE, 2), checked_rows("second modality", b_NE, 2)
    same_samples("pairs", a, b)
    if a.shape != b.shape:
        raise AnalysisError(f"units differ: {a.shape[1]} and {b.shape[1]}; both are of one network")
    a_0, b_0 = a - a.mean(0), b - b.mean(0)
    # the mean of a constant column leaves rounding behind, which is no variation
    varies = [np.abs(d).max(0) > 1e-12 * np.abs(x).max(0) for d, x in ((a_0, a), (b_0, b))]
    size = np.sqrt((a_0**2).sum(0)) * np.sqrt((b_0**2).sum(0))
    r = np.zeros(a.shape[1])
    np.divide((a_0 * b_0).sum(0), size, out=r, where=varies[0] & varies[1] & (size > 0))
    return np.clip(r, -1.0, 1.0)


def neuron_correlations(
    a_NE: np.ndarray, b_NE: np.ndarray, labels_N: np.ndarray | None = None
) -> NeuronCorrelations:
    """Correlations of every unit over true pairs, and within each label.

    Args:
        a_NE: float (N, E) activations of one modality's samples.
        b_NE: float (N, E) those of their partners.
        labels_N: int (N,) label of each pair; None: not conditioned. Negative: no label.

    Raises:
        AnalysisError: as ``pearson``; or labels of another number.
    """
    overall = pearson(a_NE, b_NE)
    by_label: dict[int, np.ndarray] = {}
    if labels_N is not None:
        labels = np.asarray(labels_N)
        checked_labels("pairs", np.maximum(labels, 0), len(a_NE), None)
        for c in np.unique(labels[labels >= 0]).tolist():
            if (labels == c).sum() >= 3:
                by_label[c] = pearson(a_NE[labels == c], b_NE[labels == c])
    return NeuronCorrelations(overall=overall, by_label=by_label, pairs=len(a_NE))
