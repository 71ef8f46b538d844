"""Validation and test samples where the data names none: a tenth of each class, always the same."""

from __future__ import annotations

import numpy as np

PART = 0.1
"""Part of each class that each held-out set takes."""


def hold_out(labels: np.ndarray, sets: int) -> tuple[np.ndarray, ...]:
    """Training samples, then ``sets`` held-out sets, as sorted int64 indices.

    Every set gets a tenth of each class, and one sample of a class that is smaller. Training keeps
    at least one of each; where too few are left, the last set gets them first.

    Args:
        labels: (n,) class of each sample; -1 counts as a class.
        sets: number of held-out sets.
    """
    rng = np.random.default_rng(0)
    parts: list[list[np.ndarray]] = [[] for _ in range(sets + 1)]
    for c in np.unique(labels):
        shuffled = rng.permutation(np.flatnonzero(labels == c))
        each = max(1, round(len(shuffled) * PART))
        for part in reversed(parts[1:]):
            taken = min(each, len(shuffled) - 1)
            part.append(shuffled[:taken])
            shuffled = shuffled[taken:]
        parts[0].append(shuffled)
    none = [np.empty(0, np.int64)]
    return tuple(np.sort(np.concatenate(part or none)) for part in parts)
