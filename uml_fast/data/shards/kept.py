"""Decoded samples kept in memory, so that what is small enough is decoded once and not each epoch.

Nothing is ever dropped for something else: orders are random, so any samples are as good to keep as
others, and a set that is a little too large would else lose each just before it comes again.
"""

from __future__ import annotations

import threading

import numpy as np


class Room:
    """Bytes that the sources of a run share for what they keep. Threads may ask together."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there is room for ``size`` more bytes, which are then taken."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True


class Kept:
    """Arrays of one source's samples. Threads may call it together."""

    def __init__(self, samples: int, room: Room) -> None:
        self._arrays: list[np.ndarray | None] = [None] * samples
        self._room = room

    def get(self, i: int) -> np.ndarray | None:
        """The array of sample ``i``, read-only, if it was kept."""
        return self._arrays[i]

    def offer(self, i: int, array: np.ndarray) -> None:
        """Keep the array of sample ``i`` if there is room; nobody may write to it from now on."""
        array.flags.writeable = False
        if self._arrays[i] is None and self._room.take(array.nbytes):
            self._arrays[i] = array
