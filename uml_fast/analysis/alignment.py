"""Whether head rows point at their classes' texts (paper figure 47, "aligned in the weights").

Legend: C classes, E width of the head's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_rows

PERMUTATIONS = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """The heat map in numbers; its diagonal against the rest."""

    diagonal: float
    """Mean inner product of a head row with its own class's text."""
    off_diagonal: float
    """Mean inner product with other classes' texts."""
    contrast: float
    """Their difference in standard deviations of all inner products; 0 without any spread."""
    top1: float
    """Part of the texts (0..1) that the head gives to their own class."""
    p_value: float
    """Part of random assignments of texts to classes with as large a diagonal."""
    classes: int
    """Classes compared."""


def alignment_matrix(head_CE: np.ndarray, means_CE: np.ndarray) -> np.ndarray:
    """float64 (C, C): inner product of head row i with the mean text embedding of class j.

    Raises:
        AnalysisError: shapes that differ, or values that are not finite.
    """
    head, means = checked_rows("head", head_CE, 2), checked_rows("class means of texts", means_CE)
    if head.shape != means.shape:
        raise AnalysisError(
            f"the head is {list(head.shape)}, class means of texts are {list(means.shape)}"
        )
    return np.asarray(head @ means.T)


def alignment(matrix_CC: np.ndarray, seed: int = 0) -> Alignment:
    """Numbers of a heat map, against the same map with texts assigned to classes at random.

    Args:
        matrix_CC: float (C, C): rows are those of the head, columns are the texts.
        seed: of the random assignments.

    Raises:
        AnalysisError: not square, fewer than two classes, or values that are not finite.
    """
    m = checked_rows("alignment", matrix_CC, 2)
    classes = len(m)
    if m.shape != (classes, classes):
        raise AnalysisError(f"alignment: the matrix is {list(m.shape)}; it must be square")
    diagonal = float(np.trace(m)) / classes
    off = float(m.sum() - np.trace(m)) / (classes * (classes - 1))
    spread = float(m.std())
    rng = np.random.default_rng(seed)
    columns = np.arange(classes)
    drawn = [m[rng.permutation(classes), columns].mean() for _ in range(PERMUTATIONS)]
    return Alignment(
        diagonal=diagonal,
        off_diagonal=off,
        contrast=(diagonal - off) / spread if spread > 0 else 0.0,
        top1=float((m.argmax(0) == columns).mean()),
        p_value=(1 + int((np.array(drawn) >= diagonal - 1e-12).sum())) / (1 + PERMUTATIONS),
        classes=classes,
    )
