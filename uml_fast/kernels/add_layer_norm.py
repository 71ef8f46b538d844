"""Residual addition and layer norm in one pass, for post-norm and pre-norm blocks.

    summed = residual + dropout(input);  normed = (summed - mean) / sqrt(var + eps) * weight + bias

Legend: T rows, K columns. ``normed`` has the dtype of ``input`` (it feeds the next product),
``summed`` that of ``residual`` (it is the next residual); arithmetic, statistics, weight and bias
are fp32, and the norm is taken of the sum before it is rounded. Traffic: one read of both inputs
and one write of each output; backward reads both inputs again and redraws the mask, so only mean
and rstd (T,) are saved. Where nothing drops and the dtypes agree both inputs have one gradient,
which is written once.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating, check_same, check_shape
from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.rng import check_dropout
from uml_fast.kernels.spec import KernelSpec, Shape

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


def has_one_gradient(input: Tensor, residual: Tensor, dropout_p: float) -> bool:
    """Whether the gradients of both are the same."""
    return dropout_p == 0 and input.dtype == residual.dtype


def _fwd(
    choice: Choice, input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
    dropout_p: float, rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, summed or empty, statistics fp32 (2, T): mean and 1 / std)."""
    if choice != "reference":
        outputs: tuple[Tensor, Tensor, Tensor] = implementation(NAME, choice).fwd(
            input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum
        )
        return outputs
    normed, summed = add_layer_norm_reference(
        input, residual, weight, bias, eps, dropout_p=dropout_p, rng_key=rng_key, site=site
    )
    statistics = input.new_zeros(2, len(input), dtype=torch.float32)
    return normed, summed if return_sum else residual.new_empty(0), statistics


def _bwd(
    choice: Choice, grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor,
    residual: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float,
    dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input (empty where it is that of residual), residual, weight and bias."""
    if choice != "reference":
        summed = None if grad_summed is None else grad_summed.contiguous()
        a, b, c, d = implementation(NAME, choice).bwd(
            grad_normed.contiguous(), summed, input, residual, weight, statistics, dropout_p,
            rng_key, site,
        )  # fmt: skip
        a = residual.new_empty(0) if a is None else a
        return a, b, c.to(weight.dtype, copy=True), d.to(bias.dtype, copy=True)
    reference = functools.partial(
        add_layer_norm_reference, eps=eps, dropout_p=dropout_p, rng_key=rng_key, site=site
    )
    pull = torch.func.vjp(reference, input, residual, weight, bias)[1]
    grads = (grad_normed, torch.zeros_like(residual) if grad_summed is None else grad_summed)
    a, b, c, d = pull(grads)
    return residual.new_empty(0) if has_one_gradient(input, residual, dropout_p) else a, b, c, d


@torch.library.custom_op("uml_fast::add_layer_norm_fwd", mutates_args=())
def _fwd_op(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    choice = choose(NAME, "auto", input, residual)
    return _fwd(choice, input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum)


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
    return _bwd(
        choose(NAME, "auto", input, residual), grad_normed, grad_summed, input, residual, weight,
        bias, statistics, eps, dropout_p, rng_key, site,
    )  # fmt: skip


@_bwd_op.register_fake
def _(grad_normed, grad_summed, input, residual, weight, bias, statistics, eps, dropout_p, *_):
    shared = has_one_gradient(input, residual, dropout_p)
    grads = [t.new_empty(t.shape) for t in (input, residual, weight, bias)]
    return (residual.new_empty(0) if shared else grads[0], *grads[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, bias, eps, dropout_p, rng_key, site, ctx.return_sum = inputs
    ctx.save_for_backward(input, residual, weight, bias, output[2], rng_key)
    ctx.options = (eps, dropout_p)
    ctx.site = site
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *saved, rng_key = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(saved[0])
    summed = grad_summed if ctx.return_sum else None
    arguments: tuple[Any, ...] = (grad_normed, summed, *saved, *ctx.options, rng_key, ctx.site)
    a, b, c, d = _bwd(ctx.choice, *arguments) if ctx.choice else _bwd_op(*arguments)
    shared = has_one_gradient(saved[0], saved[1], ctx.options[1])
    return b if shared else a, b, c, d, *[None] * 5


_apply = differentiable("AddLayerNorm", _fwd, _fwd_op, _setup, _backward)


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
    elif (choice := choose(NAME, backend, input, residual)) != "reference":
        normed, summed, _ = _apply(choice, input, residual, weight, bias, *options)
    else:
        normed, summed = add_layer_norm_reference(
            input, residual, weight, bias, eps, dropout_p=dropout_p, rng_key=rng_key, site=site
        )
    return (normed, summed) if return_sum else normed


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    T, K = shape["T"], shape["K"]
    x = torch.randn(2, T, K, generator=generator)
    affine = torch.randn(2, K, generator=generator)
    return {
        "input": x[0].to(dtype),
        "residual": (x[1] + 1).to(shape.get("residual", dtype)),
        "weight": affine[0] + 1,
        "bias": affine[1],
        "dropout_p": shape.get("dropout_p", 0.0),
        "rng_key": torch.tensor([0x1234_5678_9ABC_DEF0]),
        "return_sum": shape.get("return_sum", True),
    }


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Two reads and two writes forward; backward reads two inputs and two gradients, and writes one
    gradient or two."""
    writes = 2 if shape.get("dropout_p") else 1
    return 4.0 * size * shape["T"] * shape["K"], (4.0 + writes) * size * shape["T"] * shape["K"]


SPEC = KernelSpec(
    name=NAME,
    function=add_layer_norm,
    inputs=_inputs,
    gradients=("input", "residual", "weight", "bias"),
    tests={
        "no rows": {"T": 0, "K": 8},
        "one column: variance zero": {"T": 2, "K": 1},
        "a prime, with dropout": {"T": 17, "K": 37, "dropout_p": 0.3},
        "one row, exactly one block of columns": {"T": 1, "K": 32},
        "one more column than a block, without the sum": {"T": 3, "K": 33, "return_sum": False},
        "the paper's width, fp32 residual": {"T": 5, "K": 300, "residual": torch.float32},
        "more rows than a chunk of partial sums": {"T": 50, "K": 64, "dropout_p": 0.1},
    },
    benches={
        "multibench d 150": {"T": 4864, "K": 150, "dropout_p": 0.1},
        "ViT-S": {"T": 65536, "K": 384},
        "ViT-L": {"T": 65536, "K": 1024},
    },
    aot={
        "multibench d 150": {"T": 64, "K": 150, "dropout_p": 0.1},
        "ViT-S": {"T": 64, "K": 384},
        "ViT-L": {"T": 64, "K": 1024},
        "widest row": {"T": 64, "K": 8192, "dropout_p": 0.1},
    },
    flops=lambda s: (8.0 * s["T"] * s["K"], 14.0 * s["T"] * s["K"]),
    bytes=_bytes,
)  # fmt: skip
