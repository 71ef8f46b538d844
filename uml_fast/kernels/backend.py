"""Which implementation of an op runs on given tensors, and where it is.

Every op has a module of its name here with the reference and the public function, and for each of
the other backends one in ``native`` (CPU) and ``triton`` (CUDA) with ``fwd`` and ``bwd``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from uml_fast.kernels.native import library

Backend = Literal["auto", "native", "triton", "reference"]
"""auto: the kernel for the tensors' device where there is one, else the reference. The others are
for tests."""

Choice = Literal["native", "triton", "reference"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating types that the Triton kernels take."""

_LOG = logging.getLogger("uml_fast")


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; the first call logs a warning where a CUDA device misses it."""
    found = importlib.util.find_spec("triton") is not None
    if not found and torch.cuda.is_available():
        _LOG.warning(
            "Triton is not installed, so CUDA runs the slower reference path: pip install triton"
        )
    return found


def choose(op: str, backend: Backend, *tensors: Tensor) -> Choice:
    """The implementation of ``op`` that runs on these tensors (floating ones).

    Raises:
        ValueError: ``backend`` is none of those there are.
        RuntimeError: ``backend`` names one that cannot.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op}: backend is {backend!r}; it is one of {get_args(Backend)}")
    if backend == "reference":
        return "reference"
    devices = {t.device.type for t in tensors}
    dtypes = {t.dtype for t in tensors}
    if backend != "triton" and devices == {"cpu"} and dtypes <= library.CODES.keys():
        if library.library() is not None:
            return "native"
    elif backend != "native" and dtypes <= set(TRITON_DTYPES):
        from_here = devices == {"cuda"} or (backend == "triton" and devices == {"cpu"})
        if from_here and has_triton():
            return "triton"
    if backend == "auto":
        return "reference"
    given = [f"{t.dtype} on {t.device}" for t in tensors]
    raise RuntimeError(f"{op}: no {backend} kernel for {given}")


@functools.cache
def implementation(op: str, choice: Choice) -> ModuleType:
    """The module with ``fwd`` and ``bwd`` of ``op``."""
    return importlib.import_module(f"uml_fast.kernels.{choice}.{op}")
