"""Frozen features that heads are trained on, and the few shots that a cell sees of them.

Legend: n samples, D features of one, C classes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.source import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Frozen features of one split of one modality.

    Raises:
        DataError: shapes that do not match, or a value that is not finite.
    """

    rows: Tensor
    """float32 (n, D)."""
    labels: Tensor
    """int64 (n,) class of each."""

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.dtype != torch.float32:
            raise DataError(
                f"features are {self.rows.dtype} {list(self.rows.shape)}; they must be float32 "
                "(samples, features)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.rows.shape[:1]:
            raise DataError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}; they must be int64, "
                f"one for each of the {len(self.rows)} samples"
            )
        bad = (~torch.isfinite(self.rows).all(1)).nonzero()
        if len(bad):
            raise DataError(f"sample {int(bad[0])} has a feature that is NaN or infinite")

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class HeadData:
    """All samples of an experiment.

    Raises:
        DataError: an empty split, splits of different widths, or a label that is no class.
    """

    train: Features
    """Images that shots are drawn from."""
    validation: Features
    """Images for early stopping and choosing; at most 4 a class where cells have shots."""
    test: Features
    """Images of the reported accuracy."""
    text: Features
    """Texts of the classes: every prompt, some of them, or one mean each."""
    classes: int
    """C."""

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "text"):
            split: Features = getattr(self, name)
            if not len(split):
                raise DataError(f"{name} has no samples")
            lowest, highest = int(split.labels.min()), int(split.labels.max())
            if lowest < 0 or highest >= self.classes:
                raise DataError(
                    f"{name} has labels {lowest}..{highest}; there are {self.classes} classes"
                )
            if name != "text" and split.rows.shape[1] != self.train.rows.shape[1]:
                raise DataError(
                    f"{name} has {split.rows.shape[1]} features, train {self.train.rows.shape[1]}"
                )


def few_shot(labels: Tensor, shots: int, seed: int, classes: int) -> np.ndarray:
    """int32 samples: ``shots`` of each class, or all where it has fewer; 0: all samples.

    Raises:
        DataError: a class without samples.
    """
    of = labels.numpy()
    if shots == 0:
        return np.arange(len(of), dtype=np.int32)
    missing = np.setdiff1d(np.arange(classes), of)
    if len(missing):
        raise DataError(f"class {missing[0]} has no sample to draw {shots} shots from")
    rng = np.random.default_rng([seed, shots])
    chosen = [rng.permutation(np.flatnonzero(of == c))[:shots] for c in range(classes)]
    return np.sort(np.concatenate(chosen)).astype(np.int32)


@functools.lru_cache(maxsize=512)
def _epoch(seed: int, stream: int, epoch: int, samples: int) -> np.ndarray:
    order = np.random.default_rng([seed, stream, epoch]).permutation(samples)
    return order.astype(np.int32)


def sample_order(
    chosen: np.ndarray, seed: int, stream: int, batch: int, begin: int, end: int
) -> np.ndarray:
    """int32 (end - begin, batch) samples of each step.

    One permutation of ``chosen`` after another; a batch may hold the end of one and the beginning
    of the next, so that every sample comes once an epoch whatever the batch.
    """
    first, last, n = begin * batch, end * batch, len(chosen)
    epochs = range(first // n, -(-last // n))
    order = np.concatenate([_epoch(seed, stream, e, n) for e in epochs])
    at = first - epochs[0] * n
    return np.ascontiguousarray(chosen[order[at : at + last - first]].reshape(-1, batch))
