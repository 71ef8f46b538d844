"""What the stems share: ``tokens = features weight^T + bias + position[position_index]``.

Legend: C rows (patches, feature rows), E features of a row, D width of the tokens, P entries of the
position table. Features are made in fp32 and rounded once to the working dtype, the product sums in
fp32, bias and position are added in fp32. The features are not saved: backward makes them again
from the raw rows, which are smaller or as small and need no store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import (
    FLOATING,
    check_contiguous,
    check_floating,
    check_same,
    check_shape,
)
from uml_fast.kernels.index_sum import check_index
from uml_fast.kernels.op import differentiable

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


def check_statistics(op: str, raw: Tensor, mean: Tensor, deviation: Tensor, size: int) -> None:
    """Raise TypeError or ValueError unless mean and deviation are (size,)."""
    check_floating(op, mean=mean, deviation=deviation)
    check_shape(op, "mean", mean, (size,))
    check_shape(op, "deviation", deviation, (size,))
    check_contiguous(op, mean=mean, deviation=deviation)
    check_same(op, "device", raw=raw, mean=mean, deviation=deviation)


def _check_deviation(op: str, deviation: Tensor | None, unit: str) -> None:
    """Raise ValueError where a CPU ``deviation`` has no reciprocal; ``unit`` names an element."""
    if deviation is None or deviation.device.type != "cpu" or not deviation.numel():
        return
    if not deviation.abs().min().item() >= SMALLEST_NORMAL:
        values = deviation.tolist()
        at, value = next((i, v) for i, v in enumerate(values) if not abs(v) >= SMALLEST_NORMAL)
        raise ValueError(
            f"{op}: deviation of {unit} {at} is {value}; rows are divided by it, so it must be at "
            f"least {SMALLEST_NORMAL:.3g}"
        )


def linear_stem(
    name: str, unit: str, options: str, reference: Callable[..., Tensor], rows: Callable[..., int]
) -> Callable[..., Tensor]:
    """Register the operator ``name``; returns the function behind its public one.

    Args:
        name: of the op, whose modules in native/ and triton/ have ``fwd(raw, weight, bias,
            position, position_index, mean, deviation, *options, dtype, out)`` and ``bwd(grad,
            ..., *options)``.
        unit: what a mean and a deviation are of, for errors.
        options: what the op takes behind the deviation, as a schema says it: "Tensor? valid".
        reference: ``reference(raw, ..., deviation, *options, dtype)``.
        rows: tokens of ``raw``, ``rows(raw, *options)``.

    Returns:
        ``stem(backend, raw, ..., deviation, *options, dtype, out)`` of checked arguments.
    """
    inputs = (
        "Tensor raw, Tensor weight, Tensor bias, Tensor? position, Tensor? position_index, "
        f"Tensor? mean, Tensor? deviation, {options}"
    )

    def chosen(backend: Backend, weight: Tensor, dtype: torch.dtype) -> Choice:
        return choose(name, backend, weight.new_empty(0, dtype=dtype))

    def fwd(choice: Choice, *arguments: Any) -> Tensor:
        """Tokens (C, D), in ``out``, the last argument, if given."""
        out: Tensor | None = arguments[-1]
        tokens: Tensor
        if choice == "reference":
            tokens = reference(*arguments[:-1])
            return tokens if out is None else out.copy_(tokens)
        if out is not None:
            torch.autograd.graph.increment_version(out)
        tokens = implementation(name, choice).fwd(*arguments)
        return tokens

    def bwd(choice: Choice, grad: Tensor, *arguments: Any) -> Gradients:
        """Gradients of weight, bias and position (empty without one)."""
        if choice != "reference":
            grads: Gradients = implementation(name, choice).bwd(grad.contiguous(), *arguments)
            return grads
        raw, weight, bias, position, *rest = arguments

        def tokens(weight: Tensor, bias: Tensor, *table: Tensor) -> Tensor:
            return reference(raw, weight, bias, table[0] if table else None, *rest, grad.dtype)

        pull = torch.func.vjp(tokens, weight, bias, *(() if position is None else (position,)))[1]
        a, b, *c = pull(grad)
        return a, b, c[0] if c else weight.new_empty(0)

    @torch.library.custom_op(
        f"uml_fast::{name}_fwd", mutates_args=(), schema=f"({inputs}, ScalarType dtype) -> Tensor"
    )
    def fwd_op(*arguments: Any) -> Tensor:
        _check_deviation(name, arguments[6], unit)
        return fwd(chosen("auto", arguments[1], arguments[-1]), *arguments, None)

    @fwd_op.register_fake
    def _(raw, weight, *rest):
        *_, dtype = rest
        return raw.new_empty(rows(raw, *rest[5:-1]), weight.shape[0], dtype=dtype)

    @torch.library.custom_op(
        f"uml_fast::{name}_bwd", mutates_args=(),
        schema=f"(Tensor grad, {inputs}) -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    def bwd_op(*arguments: Any) -> Gradients:
        grad, _, weight, *_ = arguments
        return bwd(chosen("auto", weight, grad.dtype), *arguments)

    @bwd_op.register_fake
    def _(grad, raw, weight, bias, position, *_):
        table = weight.new_empty(0) if position is None else position.new_empty(position.shape)
        return weight.new_empty(weight.shape), bias.new_empty(bias.shape), table

    count = inputs.count(",") + 1

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        arguments = inputs[:count]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in arguments))
        ctx.plain = tuple(None if isinstance(a, Tensor) else a for a in arguments)
        ctx.more = len(inputs) - 4

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.plain, strict=True)
        arguments = [plain if t is None else t for t, plain in saved]
        weight, bias, table = (
            bwd(ctx.choice, grad, *arguments) if ctx.choice else bwd_op(grad, *arguments)
        )
        return None, weight, bias, None if arguments[3] is None else table, *[None] * ctx.more

    apply = differentiable(name, fwd, fwd_op, setup, backward)

    def stem(backend: Backend, *arguments: Any) -> Tensor:
        *tensors, dtype, out = arguments
        if torch.compiler.is_compiling():
            compiled: Tensor = fwd_op(*tensors, dtype)
            return compiled
        _check_deviation(name, tensors[6], unit)
        choice = chosen(backend, tensors[1], dtype)
        if choice == "reference" and out is None:
            return reference(*tensors, dtype)
        tokens: Tensor = apply(choice, *arguments)
        return tokens

    return stem
