"""Samples read whole into memory: those that are evaluated, and those that statistics are taken of.

All modes and seeds of a run evaluate the same samples, and so do the check before a run and the
run: what a source that says its ``identity`` came to is kept, in ``_ROOM``, for the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from uml_fast.data.shards.kept import Room
from uml_fast.data.source import DataError, Samples, Source, say_once
from uml_fast.runtime.device import reader_count
from uml_fast.runtime.progress import LongWork

EVALUATED_SAMPLES = 20_000
"""Samples that are evaluated at most: the standard error of an accuracy is then below 0.4 %."""
EVALUATED_BYTES = 1 << 30
"""Bytes of their rows at most; they stay in memory during a run."""

_PART = 64
"""Samples that a thread reads at a time."""
_ROOM = Room(1 << 30)
_kept: dict[tuple[str, int | None], Source] = {}


def in_memory(source: Samples, most: int | None = None) -> Source:
    """A source as it is if its rows are in memory, else with its samples read into memory.

    Of a source with more than ``most`` samples, evenly spread ones. Those that cannot be read are
    left out.

    Raises:
        DataError: there are no samples, or none can be read.
    """
    if isinstance(source, Source):
        return source
    identity = getattr(source, "identity", "")
    n = len(source)
    key = identity, None if most is None or n <= most else most
    if identity and key in _kept:
        return _kept[key]
    chosen = np.arange(n)
    if key[1] is not None:
        chosen = np.linspace(0, n - 1, key[1]).astype(np.int64)
    lengths = source.lengths_of(chosen)
    ends = np.cumsum(lengths)
    rows = np.empty((int(lengths.sum()), source.row_elems), source.row_dtype)
    rejected = list(_read(source, chosen, rows, ends)) if n else []
    if n and len(rejected) == len(chosen):
        raise DataError(f"{source.name}: none of {n:,} samples can be read")
    if rejected:
        kept = np.ones(len(chosen), bool)
        kept[rejected] = False
        rows = rows[np.repeat(kept, lengths)]
        chosen, ends = chosen[kept], np.cumsum(lengths[kept])
    found = Source(
        source.name,
        rows,
        np.concatenate([[0], ends]).astype(np.int64),
        source.labels[chosen].astype(np.int32),
        tuple(source.key(int(i)) for i in chosen),
    )
    if identity and _ROOM.take(found.rows.nbytes):
        _kept[key] = found
    return found


def _read(source: Samples, chosen: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> Iterator[int]:
    """Read samples into ``rows`` on all cores; yields the places of those that cannot be read."""
    places = np.array_split(np.arange(len(chosen)), -(-len(chosen) // _PART))

    def read(part: np.ndarray) -> list[int]:
        begin = int(ends[part[0] - 1]) if part[0] else 0
        found = source.read(chosen[part], rows[begin : ends[part[-1]]])
        return [int(part[k]) for k in found]

    pool = ThreadPoolExecutor(reader_count(), thread_name_prefix="uml-read-whole")
    try:
        with LongWork(f"reading {source.name} samples", len(chosen)) as work:
            for part, rejected in zip(places, pool.map(read, places), strict=True):
                yield from rejected
                work.add(len(part))
    finally:
        pool.shutdown(cancel_futures=True)


def for_evaluation(source: Samples, what: str) -> Source:
    """A source in memory; of a large one evenly spread samples, which is said once.

    Args:
        source: samples on a disk or in memory; the latter are taken as they are.
        what: what is done with them, for the message.
    """
    if isinstance(source, Source):
        return source
    row_bytes = source.row_elems * np.dtype(source.row_dtype).itemsize
    fitting = EVALUATED_BYTES * len(source) // max(1, int(source.offsets[-1]) * row_bytes)
    most = max(1, min(EVALUATED_SAMPLES, fitting))
    if most < len(source):
        say_once(f"{source.name}: {most:,} of {len(source):,} samples, evenly spread, for {what}")
    return in_memory(source, most)
