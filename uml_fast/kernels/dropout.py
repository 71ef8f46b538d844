"""Dropout from a counter: ``out = input * keep / (1 - p)``.

keep is a function of (rng_key, site, row, column), rng.py. Input and output in the working dtype,
one read and one write of it forward and backward; nothing but the key is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, has_kernel
from uml_fast.kernels.checks import check_contiguous, check_floating
from uml_fast.kernels.native.library import CODES, library, mask_arguments
from uml_fast.kernels.rng import check_dropout, keep_mask_like, keep_scale

NAME = "dropout"


def dropout_reference(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    return input * keep_mask_like(input, rng_key, site, p) * keep_scale(p)


def dropout_fwd(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    """Native dropout; of a gradient it is the backward pass."""
    out = torch.empty_like(input)
    cols = input.shape[-1] if input.ndim else 1
    library().dropout(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), out.data_ptr(),
        input.numel() // max(cols, 1), cols, *mask_arguments(p, rng_key, site),
    )  # fmt: skip
    return out


@torch.library.custom_op("uml_fast::dropout", mutates_args=())
def _op(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    if has_kernel(NAME, "auto", input):
        return dropout_fwd(input.contiguous(), p, rng_key, site)
    return dropout_reference(input, p, rng_key, site).contiguous()


@_op.register_fake
def _(input, p, rng_key, site):
    return input.new_empty(input.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, rng_key, ctx.site = inputs
    ctx.save_for_backward(rng_key)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op(grad, ctx.p, ctx.saved_tensors[0], ctx.site), None, None, None


_op.register_autograd(_backward, setup_context=_setup)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
        ctx.p, ctx.site = p, site
        ctx.save_for_backward(rng_key)
        return dropout_fwd(input, p, rng_key, site)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = dropout_fwd(grad.contiguous(), ctx.p, ctx.saved_tensors[0], ctx.site)
        return grad, None, None, None


def dropout(
    input: Tensor, p: float, rng_key: Tensor | None, site: int, *, backend: Backend = "auto"
) -> Tensor:
    """Dropout of ``input`` (..., n), contiguous, fp32 or bf16; p = 0 returns ``input`` itself.

    Raises:
        TypeError, ValueError: p outside [0, 1), no key int64 (1,), or an input that is not
        contiguous.
    """
    check_dropout(NAME, p, rng_key)
    check_floating(NAME, input=input)
    check_contiguous(NAME, input=input)
    if p == 0 or rng_key is None:
        return input
    if torch.compiler.is_compiling():
        out: Tensor = _op(input, p, rng_key, site)
    elif has_kernel(NAME, backend, input):
        out = _Dropout.apply(input, p, rng_key, site)
    else:
        out = dropout_reference(input, p, rng_key, site)
    return out
