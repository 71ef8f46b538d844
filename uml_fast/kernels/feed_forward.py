"""Feed-forward block: ``out = dropout(activation(input up^T + bias_up)) down^T + bias_down``.

Legend: T rows, K width of the stream, N hidden width. Products in the working dtype (torch: oneDNN,
AMX for bf16), bias, activation and dropout in fp32 inside one in-place pass over the (T, N)
product, rounded once. FLOPs 4 T K N forward, 8 T K N backward. Saved for backward: the hidden
tensor (relu: it also tells which elements were active and kept) or, for gelu, both the product and
the hidden tensor; the mask is drawn again. Parameters may have another dtype (fp32 masters): they
are cast once and their gradients come back in it.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend, has_kernel
from uml_fast.kernels.checks import check_contiguous, check_floating, check_shape
from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.native.library import CODES, library, mask_arguments
from uml_fast.kernels.rng import check_dropout

NAME = "feed_forward"
ACTIVATIONS = {"relu": 0, "gelu": 1}


def feed_forward_reference(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor, *,
    activation: str = "relu", dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> Tensor:  # fmt: skip
    """Plain torch definition; differentiable, any floating dtype."""
    dtype = input.dtype
    up = F.linear(input, weight_up.to(dtype), bias_up.to(dtype))
    hidden = F.relu(up) if activation == "relu" else F.gelu(up)
    if rng_key is not None and dropout_p > 0:
        hidden = dropout_reference(hidden, dropout_p, rng_key, site)
    return F.linear(hidden, weight_down.to(dtype), bias_down.to(dtype))


def column_sum(input: Tensor) -> Tensor:
    """Sum over the rows of (T, N), accumulated and returned in fp32 (N,)."""
    out = input.new_empty(input.shape[1], dtype=torch.float32)
    library().column_sum(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), out.data_ptr(), *input.shape
    )
    return out


def weight_gradient(grad_TN: Tensor, input_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T input as ``dtype`` (N, K), contiguous.

    oneDNN multiplies bf16 two to three times slower when the long dimension T is the strided one of
    the first operand (docs/numerics.md), so the narrower operand is copied transposed.
    """
    if grad_TN.shape[1] <= input_TK.shape[1]:
        return torch.mm(grad_TN.t().contiguous(), input_TK).to(dtype)
    product_KN = torch.mm(input_TK.t().contiguous(), grad_TN)
    return product_KN.t().to(dtype, memory_format=torch.contiguous_format)


def feed_forward_fwd(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor,
    activation: str, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Native (out, hidden, product), the last empty for relu; weights of the input's dtype."""
    product = torch.mm(input, weight_up.t())
    is_relu = activation == "relu"
    hidden = product if is_relu else torch.empty_like(product)
    bias = bias_up.float()
    library().activation_fwd(
        torch.get_num_threads(), CODES[input.dtype], ACTIVATIONS[activation], product.data_ptr(),
        bias.data_ptr(), hidden.data_ptr(), *product.shape,
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    out = torch.addmm(bias_down.to(input.dtype), hidden, weight_down.t())
    return out, hidden, input.new_empty(0) if is_relu else product


def activation_bwd(
    grad: Tensor, hidden: Tensor, product: Tensor, bias_up: Tensor, activation: str,
    dropout_p: float, rng_key: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """Turn ``grad`` of the hidden tensor into that of the product in place; its column sums."""
    saved = hidden if activation == "relu" else product
    bias = bias_up.float()
    bias_grad = grad.new_empty(grad.shape[1], dtype=torch.float32)
    library().activation_bwd(
        torch.get_num_threads(), CODES[grad.dtype], ACTIVATIONS[activation], saved.data_ptr(),
        bias.data_ptr(), grad.data_ptr(), bias_grad.data_ptr(), *grad.shape,
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return bias_grad


def feed_forward_bwd(
    grad_out: Tensor, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
    hidden: Tensor, product: Tensor, activation: str, dropout_p: float, rng_key: Tensor | None,
    site: int, weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Native gradients of input, weight_up, bias_up (fp32), weight_down and bias_down (fp32)."""
    grad_down = weight_gradient(grad_out, hidden, weight_dtype)
    grad = torch.mm(grad_out, weight_down)
    grad_bias = activation_bwd(grad, hidden, product, bias_up, activation, dropout_p, rng_key, site)
    grad_up = weight_gradient(grad, input, weight_dtype)
    grad_input = torch.mm(grad, weight_up)
    return grad_input, grad_up, grad_bias, grad_down, column_sum(grad_out)


@torch.library.custom_op("uml_fast::feed_forward_fwd", mutates_args=())
def _fwd_op(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor,
    activation: str, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if has_kernel(NAME, "auto", input):
        return feed_forward_fwd(
            input, weight_up, bias_up, weight_down, bias_down, activation, dropout_p, rng_key, site
        )
    out = feed_forward_reference(
        input, weight_up, bias_up, weight_down, bias_down, activation=activation,
        dropout_p=dropout_p, rng_key=rng_key, site=site,
    )  # fmt: skip
    hidden = input.new_zeros(len(input), len(weight_up))
    return out, hidden, torch.zeros_like(hidden) if activation == "gelu" else input.new_zeros(0)


@_fwd_op.register_fake
def _(input, weight_up, bias_up, weight_down, bias_down, activation, dropout_p, rng_key, site):
    hidden = input.new_empty(input.shape[0], weight_up.shape[0])
    product = torch.empty_like(hidden) if activation == "gelu" else input.new_empty(0)
    return input.new_empty(input.shape[0], weight_down.shape[0]), hidden, product


@torch.library.custom_op("uml_fast::feed_forward_bwd", mutates_args=())
def _bwd_op(
    grad_out: Tensor, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
    bias_down: Tensor, hidden: Tensor, product: Tensor, activation: str, dropout_p: float,
    rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if has_kernel(NAME, "auto", input):
        grads = feed_forward_bwd(
            grad_out.contiguous(), input, weight_up, bias_up, weight_down, hidden, product,
            activation, dropout_p, rng_key, site, weight_up.dtype,
        )  # fmt: skip
        biases = (grads[2].to(bias_up.dtype), grads[4].to(bias_down.dtype))
        return grads[0], grads[1], biases[0], grads[3], biases[1]
    reference = functools.partial(
        feed_forward_reference, activation=activation, dropout_p=dropout_p, rng_key=rng_key,
        site=site,
    )  # fmt: skip
    pull = torch.func.vjp(reference, input, weight_up, bias_up, weight_down, bias_down)[1]
    a, b, c, d, e = pull(grad_out)
    return a, b, c, d, e


@_bwd_op.register_fake
def _(grad_out, input, weight_up, bias_up, weight_down, bias_down, *_):
    tensors = (input, weight_up, bias_up, weight_down, bias_down)
    return tuple(t.new_empty(t.shape) for t in tensors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, activation, dropout_p, rng_key, site = inputs
    ctx.save_for_backward(*tensors, output[1], output[2], rng_key)
    ctx.options = (activation, dropout_p)
    ctx.site = site
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, rng_key = ctx.saved_tensors
    return *_bwd_op(grad_out, *saved, *ctx.options, rng_key, ctx.site), *[None] * 4


_fwd_op.register_autograd(_backward, setup_context=_setup)


class _FeedForward(torch.autograd.Function):
    """The native path for eager mode; keeps the cast weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
                bias_down: Tensor, activation: str, dropout_p: float, rng_key: Tensor | None,
                site: int) -> Tensor:  # fmt: skip
        up, down = weight_up.to(input.dtype), weight_down.to(input.dtype)
        out, hidden, product = feed_forward_fwd(
            input, up, bias_up, down, bias_down, activation, dropout_p, rng_key, site
        )
        ctx.save_for_backward(input, up, bias_up, down, hidden, product, rng_key)
        ctx.options = (activation, dropout_p)
        ctx.site = site
        ctx.dtypes = (weight_up.dtype, bias_up.dtype, bias_down.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        input, up, bias_up, down, hidden, product, rng_key = ctx.saved_tensors
        weight_dtype, up_dtype, down_dtype = ctx.dtypes
        activation, dropout_p = ctx.options
        grad_input, grad_up, grad_bias_up, grad_down, grad_bias_down = feed_forward_bwd(
            grad_out.contiguous(), input, up, bias_up, down, hidden, product, activation, dropout_p,
            rng_key, ctx.site, weight_dtype,
        )  # fmt: skip
        return (
            grad_input, grad_up, grad_bias_up.to(up_dtype), grad_down,
            grad_bias_down.to(down_dtype), *[None] * 4,
        )  # fmt: skip


def feed_forward(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor, *,
    activation: Literal["relu", "gelu"] = "relu", dropout_p: float = 0.0,
    rng_key: Tensor | None = None, site: int = 0, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """The feed-forward block of a transformer.

    Args:
        input: (T, K) contiguous, fp32 or bf16; its dtype is that of the products and of the output.
        weight_up, bias_up: (N, K) and (N,), any floating dtype.
        weight_down, bias_down: (K', N) and (K',), any floating dtype (that of weight_up).
        activation: relu, or gelu in its exact form.
        dropout_p: probability of dropping an element of the hidden tensor, with ``rng_key`` int64
            (1,) and
            ``site``.
        backend: for tests.

    Returns:
        (T, K').

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit, an unknown activation.
    """
    check_dropout(NAME, dropout_p, rng_key)
    parameters = {"weight_up": weight_up, "bias_up": bias_up, "weight_down": weight_down,
                  "bias_down": bias_down}  # fmt: skip
    check_floating(NAME, input=input, **parameters)
    check_contiguous(NAME, input=input, **parameters)
    if input.ndim != 2 or weight_up.ndim != 2 or weight_down.ndim != 2:
        raise ValueError(f"{NAME}: input, weight_up and weight_down must have two dimensions")
    hidden = weight_up.shape[0]
    check_shape(NAME, "weight_up", weight_up, (hidden, input.shape[1]))
    check_shape(NAME, "bias_up", bias_up, (hidden,))
    check_shape(NAME, "weight_down", weight_down, (weight_down.shape[0], hidden))
    check_shape(NAME, "bias_down", bias_down, (weight_down.shape[0],))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation {activation!r} is not one of {list(ACTIVATIONS)}")
    if torch.compiler.is_compiling():
        up, down = weight_up.to(input.dtype), weight_down.to(input.dtype)
        out: Tensor = _fwd_op(
            input, up, bias_up, down, bias_down, activation, dropout_p, rng_key, site
        )[0]
    elif has_kernel(NAME, backend, input):
        out = _FeedForward.apply(
            input, weight_up, bias_up, weight_down, bias_down, activation, dropout_p, rng_key, site
        )
    else:
        out = feed_forward_reference(
            input, weight_up, bias_up, weight_down, bias_down, activation=activation,
            dropout_p=dropout_p, rng_key=rng_key, site=site,
        )  # fmt: skip
    return out
