"""How the C library handles memory that is freed."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Their numbers in malloc.h."""
_LARGEST_KEPT = (1 << 30, 1 << 25)
"""Bytes of the largest buffer that is kept; older glibc refuse more than the second."""


def keep_freed_memory() -> bool:
    """Keep freed buffers in the process instead of giving them back; True where that is so.

    A training step on a CPU frees its large buffers and asks for the same ones again in the next
    step. glibc returns them to the system in between, so that each comes back as pages that fault
    and are cleared one by one: 17,000 in a step of a ViT-Ti on 2,656 rows, a quarter of its time
    (docs/log.md). Without glibc, or where the environment sets its thresholds, nothing is changed.
    """
    asked = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in asked):
        return False
    library = ctypes.CDLL(None)
    kept = any(library.mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_KEPT)
    return bool(kept and library.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
