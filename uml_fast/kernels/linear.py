"""Linear layer with master weights of another dtype than the matrix products: ``out = input weight^T + bias``.

Legend: T rows, K inputs, N outputs. Weight and bias are cast to the input's dtype once per step, gradients come back
in theirs. oneDNN multiplies bf16 two to three times slower when the long dimension T is the strided one of the first
operand, so the weight gradient is computed as (input^T as its own (K, T) tensor) @ grad and transposed when it is cast;
bias gradients are summed in fp32. Numbers in docs/numerics.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.checks import check_contiguous, check_floating, check_shape
from uml_fast.kernels.cpu import CODES, Backend, has_kernel, library

NAME = "linear"


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    dtype = input.dtype
    return F.linear(input, weight.to(dtype), None if bias is None else bias.to(dtype))


def column_sum(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of (T, N), accumulated in fp32, as ``dtype`` (N,)."""
    out = input.new_empty(input.shape[1], dtype=torch.float32)
    library().column_sum(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), out.data_ptr(), *input.shape
    )
    return out.to(dtype)


def weight_gradient(grad_TN: Tensor, input_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T input as ``dtype`` (N, K), contiguous."""
    if grad_TN.shape[1] <= input_TK.shape[1]:
        return torch.mm(grad_TN.t().contiguous(), input_TK).to(dtype)
    grad_KN = torch.mm(input_TK.t().contiguous(), grad_TN)
    return grad_KN.t().to(dtype, memory_format=torch.contiguous_format)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = input.dtype
        cast = weight.to(dtype)
        ctx.save_for_backward(input, cast)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if bias is None:
            return torch.mm(input, cast.t())
        return torch.addmm(bias.to(dtype), input, cast.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, cast = ctx.saved_tensors
        grad = grad.contiguous()
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.mm(grad, cast) if needs_input else None,
            weight_gradient(grad, input, ctx.weight_dtype) if needs_weight else None,
            column_sum(grad, ctx.bias_dtype) if needs_bias else None,
        )


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """``input`` (T, K) contiguous, ``weight`` (N, K), ``bias`` (N,) or None; returns (T, N) of the input's dtype.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, an input that is not contiguous.
    """
    check_floating(NAME, input=input, weight=weight)
    check_contiguous(NAME, input=input)
    if input.ndim != 2 or weight.ndim != 2:
        raise ValueError(f"{NAME}: input {list(input.shape)} and weight {list(weight.shape)} must be 2-d")
    check_shape(NAME, "weight", weight, (weight.shape[0], input.shape[1]))
    if bias is not None:
        check_floating(NAME, bias=bias)
        check_shape(NAME, "bias", bias, (weight.shape[0],))
    if not torch.compiler.is_compiling() and has_kernel(NAME, backend, input):
        out: Tensor = _Linear.apply(input, weight, bias)
        return out
    return linear_reference(input, weight, bias)
