"""What analyses are given, checked: rows of numbers and their classes."""

from __future__ import annotations

import numpy as np


class AnalysisError(ValueError):
    """Rows or labels that an analysis cannot use; the message names the row, class or shape."""


def checked_rows(name: str, rows: np.ndarray, least: int = 1) -> np.ndarray:
    """Rows (n, D) as float64.

    Raises:
        AnalysisError: another shape, fewer than ``least`` rows, or a value that is not finite.
    """
    x = np.asarray(rows, np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise AnalysisError(f"{name}: shape {list(x.shape)}; needed is (samples, features)")
    if len(x) < least:
        raise AnalysisError(f"{name}: {len(x)} samples; at least {least} are needed")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise AnalysisError(
            f"{name}: {len(bad)} of {len(x)} rows hold NaN or infinity, the first is row {bad[0]}"
        )
    return x


def checked_labels(name: str, labels: np.ndarray, samples: int, classes: int | None) -> np.ndarray:
    """Labels (n,) as int64.

    Raises:
        AnalysisError: not one integer for each of ``samples``, or one outside 0..classes - 1
            (``classes`` None: any that is not negative).
    """
    y = np.asarray(labels)
    if y.shape != (samples,) or y.dtype.kind not in "iu":
        raise AnalysisError(
            f"{name}: labels {y.dtype} {list(y.shape)}; needed is one integer for each of "
            f"{samples} samples"
        )
    wrong = np.flatnonzero((y < 0) | (y >= (np.inf if classes is None else classes)))
    if len(wrong):
        most = "" if classes is None else f"..{classes - 1}"
        raise AnalysisError(f"{name}: sample {wrong[0]} has label {y[wrong[0]]}; they are 0{most}")
    return y.astype(np.int64)


def same_samples(name: str, a: np.ndarray, b: np.ndarray) -> None:
    """Raise AnalysisError unless both hold the same number of samples."""
    if len(a) != len(b):
        raise AnalysisError(
            f"{name}: {len(a)} and {len(b)} samples; they must be the same samples in one order"
        )


def evenly(n: int, most: int) -> np.ndarray:
    """int64 indices of at most ``most`` of ``n`` samples, evenly spread, in their order."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)


def class_means(rows: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(C, D) float64 mean row of each class; NaN where a class has no sample."""
    sums = np.zeros((classes, rows.shape[1]))
    np.add.at(sums, labels, rows)
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    counts[counts == 0] = np.nan
    return sums / counts[:, None]
