"""Residual addition and layer norm in one pass, for post-norm and pre-norm blocks.

    summed = residual + dropout(input);  normed = (summed - mean) / sqrt(var + eps) * weight + bias

Legend: T rows, K columns. ``normed`` has the dtype of ``input`` (it feeds the next product),
``summed`` that of ``residual`` (it is the next residual); arithmetic, statistics, weight and bias
are fp32, and the norm is taken of the sum before it is rounded. Traffic: one read of both inputs
and one write of each output; backward reads both inputs again and redraws the mask, so only mean
and rstd (T,) are saved.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.checks import check_contiguous, check_floating, check_same, check_shape
from uml_fast.kernels.cpu import CODES, Backend, has_kernel, library, mask_arguments
from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.rng import check_dropout

NAME = "add_layer_norm"


def add_layer_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch definition (normed, summed); differentiable, any floating dtypes."""
    wide = torch.float64 if torch.float64 in (input.dtype, residual.dtype) else torch.float32
    branch = input.to(wide)
    if rng_key is not None and dropout_p > 0:
        branch = dropout_reference(branch, dropout_p, rng_key, site)
    summed = residual.to(wide) + branch
    normed = F.layer_norm(summed, summed.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed.to(input.dtype), summed.to(residual.dtype)


def add_layer_norm_fwd(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Native (normed, summed, statistics fp32 (2, T)); without ``return_sum`` summed is empty."""
    T, K = input.shape
    normed = torch.empty_like(input)
    summed = torch.empty_like(residual) if return_sum else residual.new_empty(0)
    statistics = input.new_empty(2, T, dtype=torch.float32)
    wide_weight, wide_bias = weight.float(), bias.float()
    library().add_layer_norm_fwd(
        torch.get_num_threads(), T, K, CODES[input.dtype], CODES[residual.dtype], input.data_ptr(),
        residual.data_ptr(), wide_weight.data_ptr(), wide_bias.data_ptr(), eps, normed.data_ptr(),
        summed.data_ptr() if return_sum else 0, statistics.data_ptr(),
        statistics.data_ptr() + 4 * T, *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return normed, summed, statistics


def add_layer_norm_bwd(
    grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
    weight: Tensor, statistics: Tensor, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Native gradients of input, residual, weight (fp32) and bias (fp32)."""
    T, K = input.shape
    grad_input, grad_residual = torch.empty_like(input), torch.empty_like(residual)
    grad_affine = input.new_empty(2, K, dtype=torch.float32)
    wide_weight = weight.float()
    library().add_layer_norm_bwd(
        torch.get_num_threads(), T, K, CODES[input.dtype], CODES[residual.dtype],
        grad_normed.data_ptr(), 0 if grad_summed is None else grad_summed.data_ptr(),
        input.data_ptr(), residual.data_ptr(), wide_weight.data_ptr(), statistics.data_ptr(),
        statistics.data_ptr() + 4 * T, grad_input.data_ptr(), grad_residual.data_ptr(),
        grad_affine.data_ptr(), grad_affine.data_ptr() + 4 * K,
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return grad_input, grad_residual, grad_affine[0], grad_affine[1]


@torch.library.custom_op("uml_fast::add_layer_norm_fwd", mutates_args=())
def _fwd_op(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if has_kernel(NAME, "auto", input, residual):
        return add_layer_norm_fwd(
            input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum
        )
    normed, summed = add_layer_norm_reference(
        input, residual, weight, bias, eps, dropout_p=dropout_p, rng_key=rng_key, site=site
    )
    statistics = input.new_zeros(2, len(input), dtype=torch.float32)
    return normed, summed if return_sum else residual.new_empty(0), statistics


@_fwd_op.register_fake
def _(input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum):
    summed = residual.new_empty(residual.shape if return_sum else (0,))
    statistics = input.new_empty(2, input.shape[0], dtype=torch.float32)
    return input.new_empty(input.shape), summed, statistics


@torch.library.custom_op("uml_fast::add_layer_norm_bwd", mutates_args=())
def _bwd_op(
    grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
    weight: Tensor, bias: Tensor, statistics: Tensor, eps: float, dropout_p: float,
    rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if has_kernel(NAME, "auto", input, residual):
        summed = None if grad_summed is None else grad_summed.contiguous()
        a, b, c, d = add_layer_norm_bwd(
            grad_normed.contiguous(), summed, input, residual, weight, statistics, dropout_p,
            rng_key, site,
        )  # fmt: skip
        return a, b, c.to(weight.dtype, copy=True), d.to(bias.dtype, copy=True)
    reference = functools.partial(
        add_layer_norm_reference, eps=eps, dropout_p=dropout_p, rng_key=rng_key, site=site
    )
    pull = torch.func.vjp(reference, input, residual, weight, bias)[1]
    grads = (grad_normed, torch.zeros_like(residual) if grad_summed is None else grad_summed)
    a, b, c, d = pull(grads)
    return a, b.clone() if b is a else b, c, d


@_bwd_op.register_fake
def _(grad_normed, grad_summed, input, residual, weight, bias, *_):
    return tuple(t.new_empty(t.shape) for t in (input, residual, weight, bias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, bias, eps, dropout_p, rng_key, site, ctx.return_sum = inputs
    ctx.save_for_backward(input, residual, weight, bias, output[2], rng_key)
    ctx.options = (eps, dropout_p)
    ctx.site = site
    ctx.mark_non_differentiable(output[2])


def _backward(
    ctx: Any, grad_normed: Tensor, grad_summed: Tensor | None, _: Tensor
) -> tuple[Tensor | None, ...]:
    *saved, rng_key = ctx.saved_tensors
    grad_summed = grad_summed if ctx.return_sum else None
    grads = _bwd_op(grad_normed, grad_summed, *saved, *ctx.options, rng_key, ctx.site)
    return *grads, *[None] * 5


_fwd_op.register_autograd(_backward, setup_context=_setup)


class _AddLayerNorm(torch.autograd.Function):
    """The native kernels for eager mode, without the cost of the operator boundary."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
                dropout_p: float, rng_key: Tensor | None, site: int,
                return_sum: bool) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        normed, summed, statistics = add_layer_norm_fwd(
            input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum
        )
        ctx.save_for_backward(input, residual, weight, statistics, rng_key)
        ctx.options = (dropout_p, site)
        ctx.bias_dtype = bias.dtype
        ctx.set_materialize_grads(False)
        return (normed, summed) if return_sum else normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        input, residual, weight, statistics, rng_key = ctx.saved_tensors
        dropout_p, site = ctx.options
        if grad_normed is None:
            grad_normed = torch.zeros_like(input)
        a, b, c, d = add_layer_norm_bwd(
            grad_normed.contiguous(), None if grad_summed is None else grad_summed.contiguous(),
            input, residual, weight, statistics, dropout_p, rng_key, site,
        )  # fmt: skip
        return a, b, c.to(weight.dtype), d.to(ctx.bias_dtype), *[None] * 5


@overload
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    dropout_p: float = ..., rng_key: Tensor | None = ..., site: int = ...,
    return_sum: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...  # fmt: skip
@overload
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    dropout_p: float = ..., rng_key: Tensor | None = ..., site: int = ...,
    return_sum: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0, return_sum: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``LayerNorm(residual + dropout(input))`` over the last dimension.

    Post-norm blocks use the normed output alone; pre-norm blocks ask for the sum too
    (``return_sum=True``), which is the next residual.

    Args:
        input: (T, K) contiguous, the output of a branch, fp32 or bf16.
        residual: (T, K) contiguous, fp32 or bf16, not necessarily that of ``input``.
        weight, bias: (K,), any floating dtype; used in fp32.
        eps: added to the variance.
        dropout_p: probability of dropping an element of ``input``, with ``rng_key`` int64 (1,) and
            ``site``.
        return_sum: return (normed, summed) instead of normed.
        backend: for tests.

    Returns:
        normed (T, K) of the dtype of ``input``; summed (T, K) of the dtype of ``residual``.

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit.
    """
    check_dropout(NAME, dropout_p, rng_key)
    check_floating(NAME, input=input, residual=residual, weight=weight, bias=bias)
    if input.ndim != 2:
        raise ValueError(f"{NAME}: input is {list(input.shape)}; it must be [rows, columns]")
    check_same(NAME, "shape", input=input, residual=residual)
    check_same(NAME, "device", input=input, residual=residual, weight=weight)
    check_shape(NAME, "weight", weight, tuple(input.shape[1:]))
    check_shape(NAME, "bias", bias, tuple(input.shape[1:]))
    check_contiguous(NAME, input=input, residual=residual, weight=weight, bias=bias)
    options = (eps, dropout_p, rng_key, site, return_sum)
    if torch.compiler.is_compiling():
        normed, summed, _ = _fwd_op(input, residual, weight, bias, *options)
        return (normed, summed) if return_sum else normed
    if has_kernel(NAME, backend, input, residual):
        outputs: Tensor | tuple[Tensor, Tensor] = _AddLayerNorm.apply(
            input, residual, weight, bias, *options
        )
        return outputs
    normed, summed = add_layer_norm_reference(
        input, residual, weight, bias, eps, dropout_p=dropout_p, rng_key=rng_key, site=site
    )
    return (normed, summed) if return_sum else normed
