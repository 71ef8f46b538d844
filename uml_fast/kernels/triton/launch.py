"""How every Triton kernel is launched: on its tensors' device, or as a check or a test wants it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import is_interpreted

Launcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
"""Takes kernel, grid, arguments and compile-time constants in place of a launch."""


class _Target:
    """The chip that kernels are built for when it is not the current device."""

    launcher: Launcher | None = None
    arch: int = 90
    processors: int = 132


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its tensors; a grid with a zero launches nothing.

    Triton itself takes the current device, which need not be theirs.

    Raises:
        RuntimeError: the tensors are on the CPU, and Triton's interpreter is off.
    """
    if 0 in grid:
        return
    if _Target.launcher is not None:
        _Target.launcher(kernel, grid, args, constants)
        return
    first = next(a for a in args if isinstance(a, Tensor))
    if not first.is_cuda and not is_interpreted():
        raise RuntimeError(
            f"Triton kernels take tensors on CUDA, not on {first.device}; TRITON_INTERPRET=1 runs "
            "them in its interpreter"
        )
    with torch.cuda.device_of(first):
        kernel[grid](*args, **constants)


@functools.cache
def _device_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _current() -> tuple[int, int]:
    if _Target.launcher is not None or is_interpreted():
        return _Target.arch, _Target.processors
    return _device_properties(torch.cuda.current_device())


def arch() -> int:
    """Compute capability of the chip, e.g. 90; the interpreter passes for a Hopper."""
    return _current()[0]


def processors() -> int:
    """Streaming multiprocessors of the chip."""
    return _current()[1]


@contextmanager
def launching(launcher: Launcher, arch: int, processors: int) -> Iterator[None]:
    """Hand launches to ``launcher`` and let launch configurations see another chip."""
    before = (_Target.launcher, _Target.arch, _Target.processors)
    _Target.launcher, _Target.arch, _Target.processors = launcher, arch, processors
    try:
        yield
    finally:
        _Target.launcher, _Target.arch, _Target.processors = before
