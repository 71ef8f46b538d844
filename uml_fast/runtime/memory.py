"""Memory of this process: how much there is, and what the C library does with what is freed."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Their numbers in malloc.h."""
_LARGEST_KEPT = (1 << 30, 1 << 25)
"""Bytes of the largest buffer that is kept; older glibc refuse more than the second."""


def memory_bytes(device: torch.device) -> float:
    """Memory that a rank can use: its GPU's, or its part of what the ranks here may take on a CPU.

    That is the machine's, or less where control groups (containers, Slurm jobs) set a limit.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = min([machine, *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    return allowed / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _group_limits(member: Path, root: Path) -> list[int]:
    """Bytes that the control group of a process may take, and those around it (cgroup v2).

    Args:
        member: the process' file ``cgroup``.
        root: where the groups are mounted.
    """
    try:
        lines = member.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    found = []
    for group in (root / own, *(root / parent for parent in Path(own).parents)):
        try:
            found.append(int((group / "memory.max").read_text()))
        except (OSError, ValueError):  # the outermost has no such file; no limit is "max"
            continue
    return found


def keep_freed_memory() -> bool:
    """Keep freed buffers in the process instead of giving them back; True where that is so.

    A step on a CPU frees its large buffers and asks for the same ones again in the next
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
