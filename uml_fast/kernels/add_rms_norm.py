"""Residual addition and RMS norm in one pass, the norm of most language models.

    summed = residual + dropout(input);  normed = summed / sqrt(mean(summed ** 2) + eps) * weight

Legend: T rows, K columns; dtypes, traffic and what is fused are in add_norm.py. Saved for backward:
1 / rms (1, T).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.add_layer_norm import SPEC as LAYER_NORM_SPEC
from uml_fast.kernels.add_norm import add_norm, add_norm_bytes, sum_and_norm
from uml_fast.kernels.backend import Backend
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "add_rms_norm"


def add_rms_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, dropout_p: float = 0.0,
    rng_key: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch definition (normed, summed); differentiable, any floating dtypes."""

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)

    return sum_and_norm(norm, input, residual, dropout_p, rng_key, site)


_norm = add_norm(NAME, add_rms_norm_reference)


@overload
def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = ..., *, dropout_p: float = ...,
    rng_key: Tensor | None = ..., site: int = ..., return_sum: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...  # fmt: skip
@overload
def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = ..., *, dropout_p: float = ...,
    rng_key: Tensor | None = ..., site: int = ..., return_sum: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, dropout_p: float = 0.0,
    rng_key: Tensor | None = None, site: int = 0, return_sum: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``RMSNorm(residual + dropout(input))`` over the last dimension.

    Args:
        input: (T, K) contiguous, the output of a branch, fp32 or bf16.
        residual: (T, K) contiguous, fp32 or bf16, not necessarily that of ``input``.
        weight: (K,), any floating dtype; used in fp32.
        eps: added to the mean square.
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
        backend, input, residual, weight, None, eps, dropout_p, rng_key, site, return_sum
    )
    return (normed, summed) if return_sum else normed


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    inputs = LAYER_NORM_SPEC.inputs(shape, dtype, generator)
    del inputs["bias"]
    return inputs


SPEC = KernelSpec(
    name=NAME,
    function=add_rms_norm,
    inputs=_inputs,
    gradients=("input", "residual", "weight"),
    tests=LAYER_NORM_SPEC.tests,
    benches={
        "ViT-L": {"T": 65536, "K": 1024},
        "ViT-L, fp32 residual": {"T": 65536, "K": 1024, "residual": torch.float32},
    },
    aot={
        "multibench d 150": {"T": 64, "K": 150, "dropout_p": 0.1},
        "ViT-L": {"T": 64, "K": 1024},
        "widest row": {"T": 64, "K": 8192, "dropout_p": 0.1},
    },
    flops=lambda s: (5.0 * s["T"] * s["K"], 11.0 * s["T"] * s["K"]),
    bytes=add_norm_bytes,
)
