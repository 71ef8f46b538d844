"""Frozen features that heads are trained on, and the few shots that a cell sees of them.

Legend: n samples, D features of one, C classes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from uml_fast.config import require
from uml_fast.data.source import DataError
from uml_fast.grid.cells import Cell


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

    @property
    def width(self) -> int:
        """D."""
        return self.rows.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadData:
    """All samples of an experiment.

    Raises:
        DataError: fewer than two classes, an empty split, splits of different widths, a label that
            is no class, or a class that a modality has no training sample of (unless
            ``missing_classes`` is keep).
    """

    target: str
    """Modality that heads are validated and tested on."""
    train: Mapping[str, Features]
    """Training samples of every modality; shots are drawn from them."""
    validation: Features
    """Target samples for early stopping and choosing; at most 4 a class where cells have shots."""
    test: Features
    """Target samples of the reported accuracy."""
    classes: int
    """C, of all modalities."""
    missing_classes: Literal["error", "keep"] = "error"
    """A class that a modality has no training sample of: error, or keep it, trained on the samples
    that the other modalities have of it."""

    def __post_init__(self) -> None:
        require(
            self.missing_classes in ("error", "keep"),
            f"missing_classes is {self.missing_classes}; it must be error or keep",
        )
        if self.classes < 2:
            raise DataError(
                f"{self.classes} class in common; a head tells two or more apart: say which "
                "classes mean the same, or add some"
            )
        if self.target not in self.train:
            raise DataError(
                f"there are no training samples of the target {self.target}; train has "
                f"{', '.join(self.train) or 'nothing'}"
            )
        splits = {f"train of {name}": split for name, split in self.train.items()}
        for name, split in {**splits, "validation": self.validation, "test": self.test}.items():
            if not len(split):
                raise DataError(f"{name} has no samples")
            lowest, highest = int(split.labels.min()), int(split.labels.max())
            if lowest < 0 or highest >= self.classes:
                raise DataError(
                    f"{name} has labels {lowest}..{highest}; there are {self.classes} classes"
                )
            if name in splits and self.missing_classes == "error":
                self._require_every_class(name, split)
        width = self.train[self.target].width
        for name, split in (("validation", self.validation), ("test", self.test)):
            if split.width != width:
                raise DataError(f"{name} has {split.width} features, train {width}")

    def _require_every_class(self, name: str, split: Features) -> None:
        missing = (torch.bincount(split.labels, minlength=self.classes) == 0).nonzero().ravel()
        if len(missing):
            shown = ", ".join(str(c) for c in missing[:5].tolist())
            raise DataError(
                f"{name} has no sample of {len(missing)} of {self.classes} classes ({shown}"
                f"{', ...' if len(missing) > 5 else ''}); take them out of every modality, or set "
                "missing_classes='keep' to train them on the other modalities alone"
            )

    def check(self, cell: Cell) -> None:
        """Whether a cell can be trained on these samples.

        Raises:
            DataError: it names a modality that is not here, another target, or modalities without
                projections whose widths differ.
        """
        if cell.modalities[0] != self.target:
            raise DataError(
                f"a cell has the target {cell.modalities[0]}; validation and test samples are of "
                f"{self.target}"
            )
        used = {*cell.modalities, *({cell.init} - {"random"})}
        if absent := sorted(used - set(self.train)):
            raise DataError(
                f"a cell names the modality {absent[0]}; there are training samples of "
                f"{', '.join(self.train)}"
            )
        widths = {name: self.train[name].width for name in sorted(used)}
        if not cell.project and len(set(widths.values())) > 1:
            shown = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise DataError(
                f"a cell has no projections, but the features of its modalities differ: {shown}; "
                "set project=True"
            )


def stream(*parts: int | str) -> np.random.Generator:
    """The random numbers of one purpose: every seed, purpose and modality has its own."""
    key = [zlib.crc32(p.encode()) if isinstance(p, str) else p for p in parts]
    return np.random.default_rng(key)


def few_shot(labels: Tensor, shots: int, seed: int, split: str) -> np.ndarray:
    """int32 samples: ``shots`` of each class, or all where it has fewer; 0: all samples.

    The samples of fewer shots are among those of more with the same seed; ``split`` names what is
    drawn from, so that every one has its own draws.
    """
    of = labels.numpy()
    if shots == 0:
        return np.arange(len(of), dtype=np.int32)
    order = np.lexsort((stream(seed, "shots", split).random(len(of)), of))
    ordered = of[order]
    place_in_class = np.arange(len(of)) - np.searchsorted(ordered, ordered)
    return np.sort(order[place_in_class < shots]).astype(np.int32)


@functools.lru_cache(maxsize=2048)
def _epoch(seed: int, modality: str, epoch: int, samples: int) -> np.ndarray:
    return stream(seed, "order", modality, epoch).permutation(samples).astype(np.int32)


@functools.lru_cache(maxsize=512)
def _positions(
    seed: int, modality: str, samples: int, batch: int, begin: int, end: int
) -> np.ndarray:
    first, last = begin * batch, end * batch
    epochs = range(first // samples, -(-last // samples))
    order = np.concatenate([_epoch(seed, modality, e, samples) for e in epochs])
    at = first - epochs[0] * samples
    return order[at : at + last - first].reshape(-1, batch)


def sample_order(
    chosen: np.ndarray, seed: int, modality: str, batch: int, begin: int, end: int
) -> np.ndarray:
    """int32 (end - begin, batch) samples of each step.

    One permutation of ``chosen`` after another; a batch may hold the end of one and the beginning
    of the next, so that every sample comes once an epoch whatever the batch.
    """
    if begin == end:
        return np.empty((0, batch), np.int32)
    return chosen[_positions(seed, modality, len(chosen), batch, begin, end)]
