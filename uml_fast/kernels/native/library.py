"""The compiled CPU kernels, and what every launcher passes to them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.rng import threshold
from uml_fast.runtime import native

CODES = {torch.float32: 0, torch.bfloat16: 1}
"""Element types that the kernels take, and their numbers in csrc/cpu/kernels.h."""


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP library that PyTorch loaded, 0 where there is none.

    Kernels then run on PyTorch's own worker threads: those spin for milliseconds after each of its
    operators, and a second pool would compete with them for cores.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return 0
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    found = [f for f in sorted(files) if Path(f).name.startswith(names)]
    for file in sorted(found, key=lambda f: "torch" not in f):
        try:
            entry = ctypes.CDLL(file).GOMP_parallel
        except (AttributeError, OSError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0


@functools.cache
def library() -> Any:
    """The ``cpu`` part of the native extension, or None without the extension."""
    module = native.module()
    if module is None:
        return None
    module.cpu.use_openmp(_gomp_parallel())
    return module.cpu


def mask_arguments(p: float, rng_key: Tensor | None, site: int) -> tuple[int, int, int]:
    """Address of the key, site and threshold, the last arguments of kernels that drop."""
    if p == 0 or rng_key is None:
        return 0, 0, 0
    return rng_key.data_ptr(), site, threshold(p)
