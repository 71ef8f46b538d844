"""Dropout from a counter: ``out = input * keep / (1 - p)``.

keep is a function of (rng_key, site, row, column), rng.py. Input and output in the working dtype,
arithmetic in fp32; one read and one write of it forward and backward, and nothing but the key is
saved. The backward pass is the forward pass of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.rng import check_dropout, keep_mask_like, keep_scale
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "dropout"


def dropout_reference(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    return input * keep_mask_like(input, rng_key, site, p) * keep_scale(p)


def _fwd(choice: Choice, input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    if choice == "reference":
        return dropout_reference(input, p, rng_key, site)
    out: Tensor = implementation(NAME, choice).fwd(input, p, rng_key, site)
    return out


@torch.library.custom_op("uml_fast::dropout", mutates_args=())
def _op(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    return _fwd(choose(NAME, "auto", input), input.contiguous(), p, rng_key, site)


@_op.register_fake
def _(input, p, rng_key, site):
    return input.new_empty(input.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, rng_key, ctx.site = inputs
    ctx.save_for_backward(rng_key)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments: tuple[Any, ...] = (grad.contiguous(), ctx.p, ctx.saved_tensors[0], ctx.site)
    return _fwd(ctx.choice, *arguments) if ctx.choice else _op(*arguments), None, None, None


_apply = differentiable("Dropout", _fwd, _op, _setup, _backward)


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
    elif (choice := choose(NAME, backend, input)) != "reference":
        out = _apply(choice, input, p, rng_key, site)
    else:
        out = dropout_reference(input, p, rng_key, site)
    return out


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input": torch.randn(shape["T"], shape["K"], generator=generator).to(dtype),
        "p": shape["p"],
        "rng_key": torch.tensor([0x1234_5678_9ABC_DEF0]),
        "site": 3,
    }


SPEC = KernelSpec(
    name=NAME,
    function=dropout,
    inputs=_inputs,
    gradients=("input",),
    tests={
        "no rows": {"T": 0, "K": 8, "p": 0.1},
        "no columns": {"T": 3, "K": 0, "p": 0.1},
        "one element": {"T": 1, "K": 1, "p": 0.5},
        "odd columns: each row starts with a new pair": {"T": 5, "K": 37, "p": 0.1},
        "one block exactly in bf16": {"T": 2, "K": 2048, "p": 0.3},
        "one pair more than a block in bf16": {"T": 241, "K": 34, "p": 0.3},
    },
    benches={
        "multibench d 150": {"T": 4864, "K": 150, "p": 0.1},
        "ViT-S": {"T": 65536, "K": 384, "p": 0.1},
    },
    aot={"even": {"T": 8, "K": 150, "p": 0.1}, "odd": {"T": 8, "K": 151, "p": 0.1}},
    flops=lambda s: (float(s["T"] * s["K"]), float(s["T"] * s["K"])),
    bytes=lambda s, size: (2.0 * size * s["T"] * s["K"], 2.0 * size * s["T"] * s["K"]),
)
