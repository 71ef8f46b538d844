"""Sources: the samples of one modality as ragged rows, in memory or read when they are needed.

Legend: n samples, R rows in total, E elements of a row.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class DataError(ValueError):
    """Samples that cannot be used; the message names the source, the sample and what is wrong."""


def reason(error: Exception) -> str:
    """What a library says about bytes it cannot read, without where they were in memory."""
    return re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))


class Samples(Protocol):
    """What the loader needs of a source. Lengths and labels are known; rows may be anywhere."""

    @property
    def name(self) -> str:
        """Modality."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 (n + 1,) first row of each sample, then R."""

    @property
    def labels(self) -> np.ndarray:
        """int32 (n,) class of each sample, -1 where there is none."""

    @property
    def row_elems(self) -> int:
        """E."""

    @property
    def row_dtype(self) -> str:
        """numpy name of the elements."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 (n,) rows of each sample."""

    def lengths_of(self, samples: np.ndarray) -> np.ndarray:
        """int64 rows of some samples."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Name of sample ``i`` for messages."""

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        out: np.ndarray,
        epochs: Sequence[int] | np.ndarray | None = None,
    ) -> list[int]:
        """Write the rows of some samples, one after the other, to the start of ``out`` (rows, E).

        Returns the places in ``samples`` that could not be read; their rows are undefined. Called
        from several threads at a time.

        ``epochs`` are those that the samples are taken from: each epoch, a source that augments
        changes a sample in another way. None: no sample is changed (evaluation, probes).
        """


class Lengths:
    """Rows of samples, from ``offsets``."""

    __slots__ = ()
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 (n,) rows of each sample."""
        return np.diff(self.offsets)

    def lengths_of(self, samples: np.ndarray) -> np.ndarray:
        """int64 rows of some samples."""
        lengths: np.ndarray = self.offsets[samples + 1] - self.offsets[samples]
        return lengths


@dataclass(frozen=True, slots=True)
class Source(Lengths):
    """Samples of one modality. Checked once, here, so that nothing behind it has to.

    Raises:
        DataError: no samples, an empty sample, offsets that do not cover the rows, a row count
            that differs from the labels', or a value that is not finite.
    """

    name: str
    """Modality."""
    rows: np.ndarray
    """(R, E) uint8, int16, int32 or float32, C-contiguous."""
    offsets: np.ndarray
    """int64 (n + 1,) first row of each sample, then R."""
    labels: np.ndarray
    """int32 (n,) class of each sample, -1 where there is none."""
    keys: tuple[str, ...] = ()
    """Name of each sample for error messages; empty: the index."""

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise DataError(f"{self.name}: {what}")

        n = len(self.offsets) - 1
        check(n >= 1, "no samples; give this modality data or take it out of the run")
        check(
            self.rows.ndim == 2 and self.rows.flags.c_contiguous,
            "rows must be a contiguous 2-d array",
        )
        check(
            self.rows.dtype.name in ("uint8", "int16", "int32", "float32"),
            f"dtype {self.rows.dtype} is not a raw type",
        )
        check(
            self.offsets.dtype == np.int64 and self.offsets[0] == 0,
            "offsets must be int64 and start at 0",
        )
        check(
            self.offsets[-1] == len(self.rows),
            f"offsets end at {self.offsets[-1]}, there are {len(self.rows)} rows",
        )
        empty = np.flatnonzero(np.diff(self.offsets) < 1)
        check(len(empty) == 0, f"sample {self.key(empty[0]) if len(empty) else ''} has no rows")
        check(
            self.labels.dtype == np.int32 and len(self.labels) == n,
            f"{len(self.labels)} labels for {n} samples",
        )
        check(len(self.keys) in (0, n), f"{len(self.keys)} keys for {n} samples")
        if self.rows.dtype == np.float32:
            bad = np.flatnonzero(~np.isfinite(self.rows).all(1))
            if len(bad):
                i = int(np.searchsorted(self.offsets, bad[0], "right")) - 1
                check(
                    False,
                    f"sample {self.key(i)} holds NaN or infinity (row {bad[0] - self.offsets[i]})",
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def row_elems(self) -> int:
        """E."""
        return int(self.rows.shape[1])

    @property
    def row_dtype(self) -> str:
        """numpy name of the elements."""
        return self.rows.dtype.name

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        out: np.ndarray,
        epochs: Sequence[int] | np.ndarray | None = None,
    ) -> list[int]:
        """Copy the rows of some samples to the start of ``out``; none is rejected or changed."""
        at = 0
        for i in samples:
            rows = self.sample(int(i))
            out[at : at + len(rows)] = rows
            at += len(rows)
        return []

    def key(self, i: int) -> str:
        """Name of sample ``i``."""
        return self.keys[i] if self.keys else str(int(i))

    def sample(self, i: int) -> np.ndarray:
        """(rows, E) view of sample ``i``."""
        return self.rows[self.offsets[i] : self.offsets[i + 1]]

    @staticmethod
    def from_samples(
        name: str,
        samples: Sequence[np.ndarray],
        labels: Sequence[int] | None = None,
        keys: Sequence[str] = (),
    ) -> Source:
        """Build a source from a list of (rows, E) arrays of one dtype."""
        if not samples:
            raise DataError(
                f"{name}: no samples; give this modality data or take it out of the run"
            )
        widths = {(x.shape[1:], x.dtype) for x in samples}
        if len(widths) != 1:
            raise DataError(
                f"{name}: samples differ in row size or dtype: {sorted(map(str, widths))}"
            )
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in samples])]).astype(np.int64)
        filled = (
            np.full(len(samples), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        )
        return Source(
            name, np.ascontiguousarray(np.concatenate(samples)), offsets, filled, tuple(keys)
        )

    def select(self, indices: np.ndarray) -> Source:
        """The source of the given samples, in their order."""
        keys = tuple(self.key(i) for i in indices)
        return Source.from_samples(
            self.name, [self.sample(i) for i in indices], self.labels[indices], keys
        )


@functools.cache
def say_once(text: str) -> None:
    """Tell the user something about the data, once in a process."""
    logging.getLogger("uml_fast").warning(text)


@dataclass(frozen=True, slots=True)
class Task:
    """The samples of one trial."""

    train: tuple[Samples, ...]
    """Training samples per modality, in the order of the configuration's modalities."""
    validation: Source
    """Samples of the target modality for choosing and early stopping."""
    test: Source
    """Samples of the target modality for the reported numbers."""
    class_names: tuple[str, ...] = ()
    """Name of each class."""
    baselines: tuple[tuple[str, float], ...] = ()
    """Strong simple methods on the same target data: (name, value of the run's metric)."""
    aligned: tuple[tuple[Source, Source], ...] = ()
    """Validation and test samples of each modality in the order of ``train``, where sample i of a
    split is the same thing in all of them, the training samples included; they are measured
    together (paper 1.2). Empty: the target alone is evaluated."""

    def source(self, name: str) -> Samples:
        """The training samples of one modality."""
        return next(s for s in self.train if s.name == name)
