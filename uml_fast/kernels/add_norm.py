"""What add_layer_norm and add_rms_norm share: a residual sum and its norm in one pass.

    summed = residual + dropout(input);  normed = norm(summed)

Legend: T rows, K columns. ``normed`` has the dtype of ``input`` (it feeds the next product),
``summed`` that of ``residual`` (it is the next residual); arithmetic, statistics, weight and bias
are fp32, and the norm is taken of the sum before it is rounded. Traffic: one read of both inputs
and one write of each output; backward reads both inputs again and redraws the mask, so only the
statistics of the rows are saved. Where nothing drops and the dtypes agree both inputs have one
gradient, which is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating, check_same, check_shape
from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.rng import check_dropout
from uml_fast.kernels.spec import Shape


def sum_and_norm(
    norm: Callable[[Tensor], Tensor], input: Tensor, residual: Tensor, dropout_p: float,
    rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch definition (normed, summed); differentiable, any floating dtypes."""
    wide = torch.float64 if torch.float64 in (input.dtype, residual.dtype) else torch.float32
    branch = input.to(wide)
    if rng_key is not None and dropout_p > 0:
        branch = dropout_reference(branch, dropout_p, rng_key, site)
    summed = residual.to(wide) + branch
    return norm(summed).to(input.dtype), summed.to(residual.dtype)


def has_one_gradient(input: Tensor, residual: Tensor, dropout_p: float) -> bool:
    """Whether the gradients of both are the same."""
    return dropout_p == 0 and input.dtype == residual.dtype


def _check(
    name: str, input: Tensor, residual: Tensor, affine: dict[str, Tensor], dropout_p: float,
    rng_key: Tensor | None,
) -> None:  # fmt: skip
    check_dropout(name, dropout_p, rng_key)
    check_floating(name, input=input, residual=residual, **affine)
    if input.ndim != 2:
        raise ValueError(f"{name}: input is {list(input.shape)}; it must be [rows, columns]")
    check_same(name, "shape", input=input, residual=residual)
    check_same(name, "device", input=input, residual=residual, **affine)
    for parameter, t in affine.items():
        check_shape(name, parameter, t, tuple(input.shape[1:]))
    check_contiguous(name, input=input, residual=residual, **affine)


def add_norm(
    name: str, reference: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register the operator ``name``; returns the function behind its public one.

    Args:
        name: of the op, whose modules in native/ and triton/ have ``fwd`` and ``bwd`` of an
            optional bias.
        reference: ``reference(input, residual, weight, [bias,] eps, dropout_p=, rng_key=, site=)``.

    Returns:
        ``norm(backend, input, residual, weight, bias or None, eps, dropout_p, rng_key, site,
        return_sum)``, (normed, summed or empty).
    """

    def plain(
        dropout_p: float, rng_key: Tensor | None, site: int
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        return functools.partial(reference, dropout_p=dropout_p, rng_key=rng_key, site=site)

    def fwd(
        choice: Choice, input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
        eps: float, dropout_p: float, rng_key: Tensor | None, site: int, return_sum: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(normed, summed or empty, statistics fp32 (2, T): mean and 1 / std; RMS: 1 / rms)."""
        if choice != "reference":
            outputs: tuple[Tensor, Tensor, Tensor] = implementation(name, choice).fwd(
                input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum
            )
            return outputs
        affine = (weight,) if bias is None else (weight, bias)
        normed, summed = plain(dropout_p, rng_key, site)(input, residual, *affine, eps)
        statistics = input.new_zeros(len(affine), len(input), dtype=torch.float32)
        return normed, summed if return_sum else residual.new_empty(0), statistics

    def bwd(
        choice: Choice, grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor,
        residual: Tensor, weight: Tensor, bias: Tensor | None, statistics: Tensor, eps: float,
        dropout_p: float, rng_key: Tensor | None, site: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of input (empty where it is that of residual), residual, weight and bias
        (empty without one)."""
        shared = has_one_gradient(input, residual, dropout_p)
        no_input, no_bias = residual.new_empty(0), residual.new_empty(0)
        if choice != "reference":
            summed = None if grad_summed is None else grad_summed.contiguous()
            a, b, c, d = implementation(name, choice).bwd(
                grad_normed.contiguous(), summed, input, residual, weight, statistics, dropout_p,
                rng_key, site,
            )  # fmt: skip
            d = no_bias if bias is None else d.to(bias.dtype, copy=True)
            return no_input if shared else a, b, c.to(weight.dtype, copy=True), d
        affine = (weight,) if bias is None else (weight, bias)
        pull = torch.func.vjp(
            lambda *tensors: plain(dropout_p, rng_key, site)(*tensors, eps),
            input, residual, *affine,
        )[1]  # fmt: skip
        grads = (grad_normed, torch.zeros_like(residual) if grad_summed is None else grad_summed)
        a, b, c, *rest = pull(grads)
        return no_input if shared else a, b, c, rest[0] if rest else no_bias

    @torch.library.custom_op(f"uml_fast::{name}_fwd", mutates_args=())
    def fwd_op(
        input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
        dropout_p: float, rng_key: Tensor | None, site: int, return_sum: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        choice = choose(name, "auto", input, residual)
        return fwd(choice, input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum)

    @fwd_op.register_fake
    def _(input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum):
        summed = residual.new_empty(residual.shape if return_sum else (0,))
        rows = 1 if bias is None else 2
        statistics = input.new_empty(rows, input.shape[0], dtype=torch.float32)
        return input.new_empty(input.shape), summed, statistics

    @torch.library.custom_op(f"uml_fast::{name}_bwd", mutates_args=())
    def bwd_op(
        grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
        weight: Tensor, bias: Tensor | None, statistics: Tensor, eps: float, dropout_p: float,
        rng_key: Tensor | None, site: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return bwd(
            choose(name, "auto", input, residual), grad_normed, grad_summed, input, residual,
            weight, bias, statistics, eps, dropout_p, rng_key, site,
        )  # fmt: skip

    @bwd_op.register_fake
    def _(grad_normed, grad_summed, input, residual, weight, bias, statistics, eps, dropout_p, *_):
        shared = has_one_gradient(input, residual, dropout_p)
        return (
            residual.new_empty(0) if shared else input.new_empty(input.shape),
            residual.new_empty(residual.shape),
            weight.new_empty(weight.shape),
            residual.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, residual, weight, bias, eps, dropout_p, rng_key, site, ctx.return_sum = inputs
        ctx.save_for_backward(input, residual, weight, bias, output[2], rng_key)
        ctx.options = (eps, dropout_p)
        ctx.site = site
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def backward(
        ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *saved, rng_key = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(saved[0])
        summed = grad_summed if ctx.return_sum else None
        arguments: tuple[Any, ...] = (grad_normed, summed, *saved, *ctx.options, rng_key, ctx.site)
        a, b, c, d = bwd(ctx.choice, *arguments) if ctx.choice else bwd_op(*arguments)
        shared = has_one_gradient(saved[0], saved[1], ctx.options[1])
        return b if shared else a, b, c, None if saved[3] is None else d, *[None] * 5

    apply = differentiable(name, fwd, fwd_op, setup, backward)

    def norm(
        backend: Backend, input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
        eps: float, dropout_p: float, rng_key: Tensor | None, site: int, return_sum: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        affine = {"weight": weight} | ({} if bias is None else {"bias": bias})
        _check(name, input, residual, affine, dropout_p, rng_key)
        arguments = (
            input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum
        )  # fmt: skip
        if torch.compiler.is_compiling():
            normed, summed, _ = fwd_op(*arguments)
        elif (choice := choose(name, backend, input, residual)) != "reference":
            normed, summed, _ = apply(choice, *arguments)
        else:
            normed, summed = plain(dropout_p, rng_key, site)(input, residual, *affine.values(), eps)
        return normed, summed

    return norm


def add_norm_bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Two reads and two writes forward; backward reads two inputs and two gradients, and writes one
    gradient or two."""
    writes = 2 if shape.get("dropout_p") else 1
    return 4.0 * size * shape["T"] * shape["K"], (4.0 + writes) * size * shape["T"] * shape["K"]
