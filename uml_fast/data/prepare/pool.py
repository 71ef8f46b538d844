"""Conversion on all cores, results in the order of the inputs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait

from uml_fast.data.prepare.items import Converter, Item, Result
from uml_fast.data.source import DataError

_CHUNK_ITEMS = 256
_CHUNK_BYTES = 8 << 20
_AHEAD = 3
"""Chunks per worker that are under way: enough that none waits, few enough to fit in memory."""


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def convert_all(
    items: Sequence[Item], converter: Converter, workers: int
) -> Generator[Result, None, None]:
    """``converter.result`` of every item, in order, whatever the number of workers.

    With one worker, or so few items that starting processes costs more, it runs in this process.

    Raises:
        DataError: a worker process died; the message names the files it may have died of.
    """
    chunks = list(_chunks(items))
    workers = min(workers, len(chunks))
    if workers <= 1:
        yield from map(converter.result, items)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        waiting = iter(chunks)
        running: deque[tuple[Sequence[Item], Future[list[Result]]]] = deque()
        while True:
            for chunk in islice(waiting, workers * _AHEAD - len(running)):
                running.append((chunk, pool.submit(_convert, converter, chunk)))
            if not running:
                return
            chunk, future = running.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool as e:
                raise DataError(
                    f"a worker process died, perhaps of a file between {chunk[0].name} and "
                    f"{chunk[-1].name}, or for want of memory; --workers 1 shows which"
                ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    start = size = 0
    for i, item in enumerate(items):
        if i > start and (i - start >= _CHUNK_ITEMS or size + item.size > _CHUNK_BYTES):
            yield items[start:i]
            start, size = i, 0
        size += item.size
    if start < len(items):
        yield items[start:]


def _convert(converter: Converter, items: Sequence[Item]) -> list[Result]:
    return [converter.result(item) for item in items]


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
