"""Argument checks shared by the kernels; every backend raises the same errors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from uml_fast.kernels.native.library import library

FLOATING = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are floating tensors."""
    for name, t in tensors.items():
        if t.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} is {t.dtype}; it must be a floating tensor")


def check_same(op: str, attribute: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors agree in ``attribute`` (shape, dtype or device)."""
    values = {name: getattr(t, attribute) for name, t in tensors.items()}
    if len(set(values.values())) > 1:
        shown = {n: list(v) if attribute == "shape" else v for n, v in values.items()}
        listed = ", ".join(f"{n} {v}" for n, v in shown.items())
        raise ValueError(f"{op}: {attribute}s differ: {listed}")


def check_shape(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``t`` has this shape."""
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} is {list(t.shape)}; it must be {list(shape)}")


def check_contiguous(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are contiguous."""
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise ValueError(
                f"{op}: {name} has strides {list(t.stride())} for shape {list(t.shape)}; "
                "it must be contiguous"
            )


def check_offsets(op: str, offsets: Tensor, rows: int, max_len: int | None = None) -> None:
    """Raise unless ``offsets`` int32 (S + 1,) rise from 0 to ``rows`` in steps of 0 to ``max_len``.

    The values of offsets on other devices than the CPU, and while compiling, are not looked at.
    """
    if offsets.dtype != torch.int32:
        raise TypeError(f"{op}: offsets are {offsets.dtype}; they must be int32")
    if offsets.ndim != 1 or len(offsets) < 1 or not offsets.is_contiguous():
        raise ValueError(
            f"{op}: offsets are {list(offsets.shape)}; they must be contiguous [S + 1]"
        )
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    limit = rows if max_len is None else max_len
    cpu = library()
    if cpu and cpu.offsets_are_valid(offsets.data_ptr(), len(offsets) - 1, rows, limit):
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(
            f"{op}: offsets run from {bounds[0]} to {bounds[-1]}; they must run from 0 to {rows}, "
            "the number of rows"
        )
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"{op}: offsets decrease from {start} to {end} at segment {s}")
        if end - start > limit:
            raise ValueError(f"{op}: segment {s} has {end - start} rows; max_len is {limit}")
