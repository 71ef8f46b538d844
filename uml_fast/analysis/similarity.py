"""How alike two representations of the same samples are: linear CKA and mutual nearest neighbours.

The paper reports neither; they complete its alignment analysis (figure 47) where two networks, or
two modalities over true pairs, are compared. CKA: Kornblith et al. 2019, debiased as in Song et al.
2012; mutual k-NN: Huh et al. 2024.

Legend: N samples, D and E widths of the two representations.
"""

from __future__ import annotations

import numpy as np

from uml_fast.analysis.inputs import AnalysisError, checked_rows, evenly, same_samples

MOST = 2_000
"""Samples that are compared at most, evenly spread (two N x N matrices in memory)."""


def linear_cka(a_ND: np.ndarray, b_NE: np.ndarray, *, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two representations.

    Args:
        a_ND: float (N, D) one representation of N samples.
        b_NE: float (N, E) another one of the same samples.
        debiased: with the unbiased estimate of HSIC, which is 0 on average for unrelated
            representations (and may be slightly negative) where the plain one grows with D / N.

    Returns:
        1 for representations that are equal up to rotation, scale and shift; 0 where one of them
        has no spread.

    Raises:
        AnalysisError: other numbers of samples, fewer than 4, or values that are not finite.
    """
    a, b = _compared(a_ND, b_NE, 4)
    gram_a, gram_b = a @ a.T, b @ b.T
    hsic = _hsic_unbiased if debiased else _hsic
    own = hsic(gram_a, gram_a), hsic(gram_b, gram_b)
    return float(hsic(gram_a, gram_b) / np.sqrt(own[0] * own[1])) if min(own) > 0 else 0.0


def mutual_knn(a_ND: np.ndarray, b_NE: np.ndarray, k: int = 10) -> float:
    """Mean part (0..1) of a sample's k nearest neighbours that both representations share.

    Neighbours by cosine of the centred rows; unrelated representations share ``k / (N - 1)``.

    Raises:
        AnalysisError: as ``linear_cka``, or k is not in 1..N-1.
    """
    a, b = _compared(a_ND, b_NE, 2)
    if not 1 <= k < len(a):
        raise AnalysisError(f"k is {k}; with {len(a)} samples it must be in 1..{len(a) - 1}")
    near_a, near_b = _nearest(a, k), _nearest(b, k)
    shared = [len(np.intersect1d(x, y)) for x, y in zip(near_a, near_b, strict=True)]
    return float(np.mean(shared)) / k


def _compared(a_ND: np.ndarray, b_NE: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = checked_rows("first", a_ND, least), checked_rows("second", b_NE, least)
    same_samples("representations", a, b)
    chosen = evenly(len(a), MOST)
    return _centred(a[chosen]), _centred(b[chosen])


def _centred(x: np.ndarray) -> np.ndarray:
    centred: np.ndarray = x - x.mean(0)
    # the mean of constant columns leaves rounding behind, which is no spread
    centred[:, np.abs(centred).max(0) <= 1e-12 * np.abs(x).max(0)] = 0.0
    return centred


def _hsic(gram_a: np.ndarray, gram_b: np.ndarray) -> float:
    return float((gram_a * gram_b).sum())


def _hsic_unbiased(gram_a: np.ndarray, gram_b: np.ndarray) -> float:
    n = len(gram_a)
    k, m = gram_a.copy(), gram_b.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    cross = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((cross - 2 / (n - 2) * (k.sum(0) @ m.sum(0))) / (n * (n - 3)))


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argpartition(-likeness, k - 1, axis=1)[:, :k]
