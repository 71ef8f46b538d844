"""Files that threads read at any place, a limited number of them open at a time."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MOST = 1024 if _LIMIT < 0 else max(16, min(1024, _LIMIT // 8))
"""Files of a set that are open at a time: an eighth of what the process may, as a run has several
sets. A read costs 0.6 us, 2.5 us where its file was closed (warm pages, EPYC)."""


class _File:
    """A descriptor that is closed when the last thread lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class OpenFiles:
    """Reads files by their number; those read last stay open.

    Args:
        paths: the files.
        most: files that are open at a time; None: ``MOST``.
    """

    def __init__(self, paths: Sequence[Path], most: int | None = None) -> None:
        self._paths, self._most = paths, MOST if most is None else most
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def read(self, number: int, size: int, offset: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on, fewer where it ends. Any thread may.

        Raises:
            OSError: the file cannot be opened or read.
        """
        # holding the file keeps it open, whatever other threads close meanwhile
        file = self._file(number)
        return os.pread(file.descriptor, size, offset)

    def hold(self, numbers: np.ndarray) -> tuple[list[object], np.ndarray]:
        """The int32 descriptors of files, and what keeps them open while it lives. Any thread may.

        Raises:
            OSError: a file cannot be opened.
        """
        unique, inverse = np.unique(numbers, return_inverse=True)
        files = [self._file(int(number)) for number in unique]
        return [*files], np.array([f.descriptor for f in files], np.int32)[inverse]

    def close(self) -> None:
        """Close the files; a later ``read`` opens them again."""
        with self._lock:
            self._open.clear()

    def _file(self, number: int) -> _File:
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                self._open.move_to_end(number)
                return file
            try:
                file = _File(self._paths[number])
            except OSError as e:
                if e.errno != errno.EMFILE:
                    raise
                self._open.clear()  # other parts of the process need descriptors too
                file = _File(self._paths[number])
            self._open[number] = file
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return file
