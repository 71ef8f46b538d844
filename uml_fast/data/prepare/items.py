"""What goes through the preparation: inputs, samples made of them, problems with the rest."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """An input that became no sample."""

    file: str
    """What it is called: a path inside the source, or a file and its row."""
    problem: str
    """Kind of problem; the manifest counts by it."""
    detail: str
    """What was seen, and what to do about it."""


class BadSample(Exception):
    """Raised while one input is converted; it becomes a Problem."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(problem, detail)
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Item:
    """An input: bytes of a file (of a tar file), or a value that the listing has read already."""

    name: str
    """Path inside the source, or file and row: unique."""
    label: str | None
    """Name of its class; None: it has none."""
    split: str | None
    """Split that the source gives it; None: its hash decides."""
    place: Path | None = None
    """File that holds it."""
    offset: int = 0
    """First byte in the file."""
    size: int = 0
    """Bytes; of a value: about."""
    changed_ns: int = 0
    """Time of the file's last change."""
    value: Any = None
    """Text or array where there is no file."""
    group: str = ""
    """Inputs of one group fall into the same split; empty: the name."""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            BadSample: the file cannot be read.
        """
        assert self.place is not None
        try:
            with self.place.open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        except OSError as e:
            raise BadSample("unreadable file", e.strerror or str(e)) from e


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviation of values, per channel or feature (Chan et al.)."""

    count: int
    mean: np.ndarray
    """float64 (C,)."""
    squares: np.ndarray
    """float64 (C,) sum of squared deviations from the mean."""
    peak: float
    """Largest magnitude."""

    @staticmethod
    def of(values: np.ndarray) -> Moments:
        """Those of (n, C) values, n >= 1."""
        x = values.astype(np.float64)
        mean = x.mean(0)
        return Moments(len(x), mean, ((x - mean) ** 2).sum(0), float(np.abs(x).max()))

    def __add__(self, other: Moments) -> Moments:
        n = self.count + other.count
        step = other.mean - self.mean
        return Moments(
            n,
            self.mean + step * (other.count / n),
            self.squares + other.squares + step**2 * (self.count * other.count / n),
            max(self.peak, other.peak),
        )

    @property
    def std(self) -> np.ndarray:
        """float64 (C,) population standard deviation."""
        return np.sqrt(self.squares / self.count)

    def to_json(self) -> dict[str, Any]:
        """As JSON; floats come back bit for bit."""
        return {
            f.name: v.tolist() if isinstance(v := getattr(self, f.name), np.ndarray) else v
            for f in dataclasses.fields(self)
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Moments:
        """Inverse of ``to_json``."""
        mean, squares = np.array(value["mean"]), np.array(value["squares"])
        return Moments(value["count"], mean, squares, value["peak"])


@dataclass(frozen=True, slots=True)
class Sample:
    """What is stored of one input."""

    payload: bytes
    extension: str
    """What the payload is, without the dot."""
    length: tuple[int, ...]
    """Height and width; or samples, rows or bytes."""
    moments: Moments | None = None
    """Of its values, for the normalisation statistics."""
    notes: tuple[str, ...] = ()
    """What was done to it; the manifest counts by it."""


Result = Sample | Problem
"""What becomes of an item."""


class Converter:
    """Turns items into samples, in any process. Subclasses are picklable."""

    def convert(self, item: Item) -> Sample:
        """The sample of an item.

        Raises:
            BadSample: it cannot be used.
        """
        raise NotImplementedError

    def result(self, item: Item) -> Result:
        """The sample, or the problem."""
        try:
            return self.convert(item)
        except BadSample as e:
            return Problem(item.name, e.problem, e.detail)
