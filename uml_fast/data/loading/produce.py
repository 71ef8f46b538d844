"""Threads that read the samples of sources which are not in memory, ahead of the step.

They are shared by all such sources. Each takes a part of the oldest pack that is not complete from
the native loader and reads its samples straight into the slot. Reading libraries release the
interpreter lock while they work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from uml_fast.data.loading.reading import Reading, my_reading
from uml_fast.data.source import DataError, Samples
from uml_fast.runtime.trace import Trace

logger = logging.getLogger("uml_fast")

_POLL_S = 0.1
"""Seconds between looks at the end of the loader."""
_CLOSE_S = 5.0
"""Seconds that a read under way has to end when the loader closes; then its thread is left."""


class Producers:
    """Feeds a native loader from sources without rows. Threads start with the object.

    Args:
        loader: the extension's loader.
        sources: all sources of the loader, in the order of its streams.
        readers: number of threads.
        trace: takes an event for each part that was read.
    """

    def __init__(
        self, loader: Any, sources: Sequence[Samples], readers: int, trace: Trace | None = None
    ) -> None:
        self._loader, self._sources, self._trace = loader, sources, trace
        self._closed = threading.Event()
        self.error: BaseException | None = None
        """What stopped a source; the loader then fails too."""
        self._readings: dict[str, Reading] = {}
        self._threads = [
            threading.Thread(target=self._work, name=f"uml-read-{i}", daemon=True)
            for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        name = threading.current_thread().name
        reading = self._readings[name] = my_reading()
        try:
            while not self._closed.is_set():
                self._feed(reading)
        except BaseException as error:  # the pack it had in hand would never be complete
            self._fail("reading", error)

    def _feed(self, reading: Reading) -> None:
        """Read one part of a pack, if there is one to be read."""
        taken = self._loader.take(_POLL_S)
        if taken is None:
            return
        job, stream, samples, epochs, row_bytes = taken
        source = self._sources[stream]
        rejected: list[int] = []
        reading.begin(source, samples)
        try:
            rows = row_bytes.view(source.row_dtype).reshape(-1, source.row_elems)
            rejected = source.read(samples, rows, epochs)
        except BaseException as error:  # whatever it is, the consumer must hear of it
            self._fail(source.name, error)
        finally:
            begin, spent = reading.end()
            self._loader.finish(job, rejected)
        if self._trace is not None:
            for stage, ns in spent.items():
                if ns:
                    self._trace.add(
                        source.name, stage, stage, begin, begin + ns,
                        pack=job.pack, slot=job.slot, samples=len(samples),
                    )  # fmt: skip
                    begin += ns

    def _fail(self, what: str, error: BaseException) -> None:
        """Hand the first error to the consumer; one that only ends a thread becomes an error."""
        if not isinstance(error, Exception):
            error = DataError(
                f"{what}: thread {threading.current_thread().name} was ended from outside "
                f"({type(error).__name__}); the same command continues from the last checkpoint"
            )
        self.error = self.error or error
        self._loader.fail(f"{what}: {error}")

    def spent_s(self) -> dict[tuple[str, str], float]:
        """Seconds of thread time per modality and stage (read, decode)."""
        out: dict[tuple[str, str], float] = {}
        for reading in list(self._readings.values()):
            for key, ns in list(reading.spent_ns.items()):
                out[key] = out.get(key, 0.0) + ns * 1e-9
        return out

    def __str__(self) -> str:
        """What each reader has in hand, a line each."""
        found = [(name, str(reading)) for name, reading in list(self._readings.items())]
        lines = [f"  reader {name} has {what}" for name, what in found if what]
        alive = sum(t.is_alive() for t in self._threads)
        return "\n".join(lines) or f"  {alive} of {len(self._threads)} readers are alive, all idle"

    def close(self) -> None:
        """Stop the threads. Reads under way have a few seconds; a thread that hangs is named."""
        self._closed.set()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(t.is_alive() for t in self._threads):
            logger.warning("reads that do not end are left behind:\n%s", self)
