"""A linear layer with fp32 masters: products in the dtype of the input.

On a CPU with matrix tiles, and for widths that they are used for, the gradients of the masters are
summed and written in fp32, so that nothing is rounded to bf16 and cast back; elsewhere this is
plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from uml_fast.kernels.backend import choose


class _CastLinear(torch.autograd.Function):
    """On (T, K) bf16 and masters, with the CPU kernels."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(input.dtype)
        ctx.save_for_backward(input, cast)
        return F.linear(input, cast, None if bias is None else bias.to(input.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from uml_fast.kernels.native.linear import column_sum, weight_gradient

        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            torch.mm(grad, weight) if needs_input else None,
            weight_gradient(grad, input) if needs_weight else None,
            column_sum(grad) if needs_bias else None,
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input weight^T + bias``.

    Args:
        input: (..., K), floating; its dtype is that of the product and of the output.
        weight, bias: (N, K) and (N,) or None, of any floating dtype.

    Returns:
        (..., N).
    """
    if _has_fp32_gradients(input, weight):
        out: Tensor = _CastLinear.apply(input, weight, bias)
        return out
    cast = None if bias is None else bias.to(input.dtype)
    return F.linear(input, weight.to(input.dtype), cast)


def _has_fp32_gradients(input: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if input.dtype != torch.bfloat16 or weight.dtype != torch.float32 or input.ndim != 2:
        return False
    if not input.is_contiguous() or choose("linear", "auto", input) != "native":
        return False
    from uml_fast.kernels.native.linear import has_tiles

    return has_tiles(input.dtype, *weight.shape)
