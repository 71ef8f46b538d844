"""Threads that read the samples of sources which are not in memory, ahead of the step.

Each such source has lead threads of its own, which take its jobs (the rows of one region of one
pack) from the native loader; a pool shared by all of them reads the job's samples in parts, each
straight into the slot. Reading libraries release the interpreter lock while they work.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from uml_fast.data.source import Samples, Source

_POLL_S = 0.1
"""Seconds between looks at the end of the loader."""
_LEADS = 2
"""Jobs of a source that are read at a time, so that the pool has work while one ends."""
_PART_BYTES = 1 << 18
"""Bytes of rows that a pool thread reads in one go."""


class Producers:
    """Feeds a native loader from sources without rows.

    Args:
        loader: the extension's loader.
        sources: all sources of the loader; those in memory are left alone.
        workers: threads of the pool.
    """

    def __init__(self, loader: Any, sources: Sequence[Samples], workers: int) -> None:
        self._loader = loader
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(workers, "uml-read")
        self.error: BaseException | None = None
        """What stopped a source; the loader then fails too."""
        self._threads = [
            threading.Thread(
                target=self._lead, args=(i, source), name=f"uml-{source.name}", daemon=True
            )
            for i, source in enumerate(sources)
            if not isinstance(source, Source)
            for _ in range(_LEADS)
        ]
        for thread in self._threads:
            thread.start()

    def _lead(self, stream: int, source: Samples) -> None:
        while not self._closed.is_set():
            job = self._loader.take(stream, _POLL_S)
            if job is None:
                continue
            slot, region, generation, samples, epochs, region_bytes = job
            rows = region_bytes.view(source.row_dtype).reshape(-1, source.row_elems)
            rejected: list[int] = []
            try:
                rejected = self._read(source, samples, epochs, rows)
            except BaseException as error:
                self.error = self.error or error
                self._loader.fail(f"{source.name}: {error}")
            finally:
                self._loader.finish(slot, region, generation, rejected)

    def _read(
        self, source: Samples, samples: np.ndarray, epochs: np.ndarray, rows: np.ndarray
    ) -> list[int]:
        first = np.concatenate([[0], np.cumsum(source.lengths_of(samples))])
        step = max(1, _PART_BYTES // (rows.itemsize * source.row_elems))
        cuts = np.unique(np.searchsorted(first, np.arange(0, first[-1], step), "right") - 1)
        bounds = [*cuts.tolist(), len(samples)]
        parts = [
            self._pool.submit(source.read, samples[a:b], rows[first[a] : first[b]], epochs[a:b])
            for a, b in itertools.pairwise(bounds)
        ]
        wait(parts)  # also where one fails: nothing may write to the slot after the job's end
        return [a + i for a, part in zip(bounds, parts, strict=False) for i in part.result()]

    def close(self) -> None:
        """Stop the threads; jobs under way are finished first."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
