"""How every Triton kernel is launched, so that the ahead-of-time check sees the real launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from uml_fast.kernels.backend import is_interpreted

Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Called with kernel, arguments and compile-time constants instead of a launch."""


class _Target:
    """The chip that kernels are built for when it is not the current device."""

    recorder: Recorder | None = None
    arch: int = 90
    processors: int = 132


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel; a grid with a zero launches nothing."""
    if _Target.recorder is not None:
        _Target.recorder(kernel, args, constants)
    elif 0 not in grid:
        kernel[grid](*args, **constants)


@functools.cache
def _device_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _current() -> tuple[int, int]:
    if _Target.recorder is not None or is_interpreted():
        return _Target.arch, _Target.processors
    return _device_properties(torch.cuda.current_device())


def arch() -> int:
    """Compute capability of the chip, e.g. 90; the interpreter passes for a Hopper."""
    return _current()[0]


def processors() -> int:
    """Streaming multiprocessors of the chip."""
    return _current()[1]


@contextmanager
def recording(recorder: Recorder, arch: int, processors: int) -> Iterator[None]:
    """Hand launches to ``recorder`` and let launch configurations see another chip."""
    before = (_Target.recorder, _Target.arch, _Target.processors)
    _Target.recorder, _Target.arch, _Target.processors = recorder, arch, processors
    try:
        yield
    finally:
        _Target.recorder, _Target.arch, _Target.processors = before
