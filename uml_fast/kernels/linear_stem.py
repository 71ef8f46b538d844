"""What the stems share: ``tokens = features weight^T + bias + position[position_index]``.

Legend: C rows (patches, feature rows), E features of a row, D width of the tokens, P entries of the
position table. Features are made in fp32 and rounded once to the working dtype, the product sums in
fp32, bias and position are added in fp32. The features are not saved: backward makes them again
from the raw rows, which are smaller or as small and need no store.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.checks import (
    FLOATING,
    check_contiguous,
    check_floating,
    check_same,
    check_shape,
)
from uml_fast.kernels.index_sum import check_index

SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
"""The reciprocal of anything smaller may overflow."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of weight, bias and position, the last empty without a table."""


def tokens_reference(
    features: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Plain torch definition (C, D) in ``dtype``; differentiable, any floating dtypes."""
    tokens = F.linear(features.to(dtype), weight.to(dtype), bias.to(dtype))
    if position is None or position_index is None:
        return tokens
    index = position_index.clamp(0, len(position) - 1).long()
    return tokens + position[index].to(dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of features before they are rounded."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def into(out: Tensor | None, tokens: Tensor) -> Tensor:
    """``tokens``, or ``out`` with them written into it."""
    return tokens if out is None else out.copy_(tokens)


def empty_gradients(weight: Tensor, bias: Tensor, position: Tensor | None) -> Gradients:
    """Uninitialised gradients, for fake kernels."""
    table = weight.new_empty(0) if position is None else position.new_empty(position.shape)
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape), table


def check_parameters(
    op: str, rows: int, features: int, raw: Tensor, weight: Tensor, bias: Tensor,
    position: Tensor | None, position_index: Tensor | None, dtype: torch.dtype, out: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError unless parameters and ``out`` fit ``rows`` raw rows."""
    if dtype not in FLOATING:
        raise TypeError(f"{op}: dtype is {dtype}; it must be a floating dtype")
    check_floating(op, weight=weight, bias=bias)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight is {list(weight.shape)}; it must be [width, features]")
    check_shape(op, "weight", weight, (weight.shape[0], features))
    width = weight.shape[0]
    check_shape(op, "bias", bias, (width,))
    check_contiguous(op, weight=weight, bias=bias)
    tensors = {"raw": raw, "weight": weight, "bias": bias}
    if position is not None:
        check_floating(op, position=position)
        if position.ndim != 2 or not len(position):
            raise ValueError(
                f"{op}: position is {list(position.shape)}; it must be [positions >= 1, width]"
            )
        check_shape(op, "position", position, (len(position), width))
        check_contiguous(op, position=position)
        tensors["position"] = position
    if position_index is not None:
        if position is None:
            raise ValueError(f"{op}: position_index is given, but position is None")
        check_index(op, "position_index", position_index, rows)
        tensors["position_index"] = position_index
    if out is not None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{op}: out must be None inside a compiled graph")
        if out.dtype != dtype:
            raise TypeError(f"{op}: out is {out.dtype}; it must be {dtype}, the dtype asked for")
        check_shape(op, "out", out, (rows, width))
        check_contiguous(op, out=out)
        tensors["out"] = out
    check_same(op, "device", **tensors)


def check_deviation(op: str, deviation: Tensor, unit: str) -> None:
    """Raise ValueError where a CPU ``deviation`` has no reciprocal; ``unit`` names an element."""
    if deviation.device.type != "cpu" or not deviation.numel():
        return
    if not deviation.abs().min().item() >= SMALLEST_NORMAL:
        values = deviation.tolist()
        at, value = next((i, v) for i, v in enumerate(values) if not abs(v) >= SMALLEST_NORMAL)
        raise ValueError(
            f"{op}: deviation of {unit} {at} is {value}; rows are divided by it, so it must be at "
            f"least {SMALLEST_NORMAL:.3g}"
        )
