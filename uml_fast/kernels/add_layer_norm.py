"""Residual addition and layer norm in one pass, for post-norm and pre-norm blocks.

    summed = residual + dropout(input);  normed = (summed - mean) / sqrt(var + eps) * weight + bias

Legend: T rows, K columns; dtypes, traffic and what is fused are in add_norm.py. Saved for backward:
mean and 1 / std (2, T).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.add_norm import add_norm, add_norm_bytes, sum_and_norm
from uml_fast.kernels.backend import Backend
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "add_layer_norm"


def add_layer_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch definition (normed, summed); differentiable, any floating dtypes."""

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)

    return sum_and_norm(norm, input, residual, dropout_p, rng_key, site)


_norm = add_norm(NAME, add_layer_norm_reference)


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
    normed, summed = _norm(
        backend, input, residual, weight, bias, eps, dropout_p, rng_key, site, return_sum
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
    bytes=add_norm_bytes,
)  # fmt: skip
