"""What each reader thread is doing: summed for statistics, named when a source stalls."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Literal

import numpy as np

from uml_fast.data.source import Samples

_NAMED = 3
"""Samples in hand that are named."""

Stage = Literal["read", "decode"]


class Reading:
    """One thread's work. Only that thread writes; any thread may look."""

    def __init__(self) -> None:
        self.spent_ns: defaultdict[tuple[str, Stage], int] = defaultdict(int)
        """Time per modality and stage since the thread began."""
        self._source: Samples | None = None
        self._samples = np.empty(0, np.int64)
        self._place = 0
        self._stage: Stage = "read"
        self._since = self._begun = 0
        self._part: dict[Stage, int] = {}

    def begin(self, source: Samples, samples: np.ndarray) -> None:
        """A part of a pack is in hand; until ``enter`` says more, it is being read."""
        self._begun = self._since = time.perf_counter_ns()
        self._samples, self._place, self._stage = samples, 0, "read"
        self._part = {"read": 0, "decode": 0}
        self._source = source

    def enter(self, stage: Stage, place: int) -> None:
        """Said by a source: from now on it reads or decodes the sample at ``place``."""
        now = time.perf_counter_ns()
        if self._source is not None:
            self._part[self._stage] += now - self._since
        self._stage, self._place, self._since = stage, place, now

    def end(self) -> tuple[int, dict[Stage, int]]:
        """The part is done: when it began, and the nanoseconds of each stage."""
        self.enter("read", 0)
        assert self._source is not None
        for stage, ns in self._part.items():
            self.spent_ns[self._source.name, stage] += ns
        self._source = None
        return self._begun, self._part

    def __str__(self) -> str:
        source, place, samples = self._source, self._place, self._samples
        if source is None:
            return ""
        now = time.perf_counter_ns()
        names = [source.key(int(i)) for i in samples[place : place + _NAMED]]
        rest = len(samples) - place - len(names)
        more = f" and {rest} more" if rest > 0 else ""
        return (
            f"{source.name}: in {self._stage} for {(now - self._since) / 1e9:.1f} s, with these "
            f"samples in hand for {(now - self._begun) / 1e9:.1f} s: {', '.join(names)}{more}"
        )


class _Mine(threading.local):
    def __init__(self) -> None:
        self.reading = Reading()


_MINE = _Mine()


def my_reading() -> Reading:
    """The calling thread's."""
    return _MINE.reading
