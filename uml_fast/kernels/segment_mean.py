"""Mean of the rows of each segment: ``out[s] = mean(input[offsets[s] : offsets[s + 1]])``.

Legend: T rows, S segments, K columns. Input and output in the working dtype, sums in fp32; empty
segments give zeros. One read of the input forward, one write of it backward; nothing but the
offsets is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, has_kernel
from uml_fast.kernels.checks import check_contiguous, check_floating, check_offsets
from uml_fast.kernels.native.library import CODES, library

NAME = "segment_mean"


def segment_mean_reference(input: Tensor, offsets: Tensor) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    offsets = offsets.long()
    length = offsets[1:] - offsets[:-1]
    rows = torch.arange(input.shape[0], device=input.device)
    segment = torch.searchsorted(offsets[1:], rows, right=True)
    zeros = input.new_zeros(length.shape[0], input.shape[1], dtype=wide)
    total = zeros.index_add(0, segment, input.to(wide))
    return (total / length.clamp(min=1).unsqueeze(1)).to(input.dtype)


def segment_mean_fwd(input: Tensor, offsets: Tensor) -> Tensor:
    """Native means (S, K)."""
    segments = len(offsets) - 1
    out = input.new_empty(segments, input.shape[1])
    library().segment_mean_fwd(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), offsets.data_ptr(), segments,
        input.shape[1], out.data_ptr(),
    )  # fmt: skip
    return out


def segment_mean_bwd(grad_out: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Native gradient of the input (T, K)."""
    segments, cols = grad_out.shape
    grad = grad_out.new_empty(rows, cols)
    library().segment_mean_bwd(
        torch.get_num_threads(), CODES[grad.dtype], grad_out.data_ptr(), offsets.data_ptr(),
        segments, cols, grad.data_ptr(),
    )  # fmt: skip
    return grad


@torch.library.custom_op("uml_fast::segment_mean_fwd", mutates_args=())
def _fwd_op(input: Tensor, offsets: Tensor) -> Tensor:
    check_offsets(NAME, offsets, len(input))
    if has_kernel(NAME, "auto", input):
        return segment_mean_fwd(input, offsets)
    return segment_mean_reference(input, offsets)


@_fwd_op.register_fake
def _(input, offsets):
    return input.new_empty(offsets.shape[0] - 1, input.shape[1])


@torch.library.custom_op("uml_fast::segment_mean_bwd", mutates_args=())
def _bwd_op(grad_out: Tensor, offsets: Tensor, rows: int) -> Tensor:
    if has_kernel(NAME, "auto", grad_out):
        return segment_mean_bwd(grad_out.contiguous(), offsets, rows)
    length = (offsets[1:] - offsets[:-1]).long()
    each = grad_out / length.clamp(min=1).unsqueeze(1)
    return each.repeat_interleave(length, 0, output_size=rows)


@_bwd_op.register_fake
def _(grad_out, offsets, rows):
    return grad_out.new_empty(rows, grad_out.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    input, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.rows = input.shape[0]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
    return _bwd_op(grad_out, ctx.saved_tensors[0], ctx.rows), None


_fwd_op.register_autograd(_backward, setup_context=_setup)


class _SegmentMean(torch.autograd.Function):
    """The native kernels for eager mode, without the cost of the operator boundary."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.rows = input.shape[0]
        return segment_mean_fwd(input, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        return segment_mean_bwd(grad_out.contiguous(), ctx.saved_tensors[0], ctx.rows), None


def segment_mean(input: Tensor, offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Mean of the rows of each segment.

    Args:
        input: (T, K) contiguous, fp32 or bf16.
        offsets: int32 (S + 1,), first row of each segment, then T; empty segments give zeros.
        backend: for tests.

    Returns:
        (S, K) of the dtype of ``input``.

    Raises:
        TypeError, ValueError: shapes, dtypes, strides or offsets that do not fit.
    """
    check_floating(NAME, input=input)
    if input.ndim != 2:
        raise ValueError(f"{NAME}: input is {list(input.shape)}; it must be [rows, columns]")
    check_contiguous(NAME, input=input)
    check_offsets(NAME, offsets, len(input))
    if torch.compiler.is_compiling():
        out: Tensor = _fwd_op(input, offsets)
    elif has_kernel(NAME, backend, input):
        out = _SegmentMean.apply(input, offsets)
    else:
        out = segment_mean_reference(input, offsets)
    return out
