from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.rng import check_dropout


def add_layer_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch definition (normed, summed); differentiable, any floating dtypes."""
    wide = torch.float64 if torch.float64 in (input.dtype, residual.dtype) else torch.float32
    branch = input.to(wide)
    if dropout_p > 0:
        branch = dropout_reference(branch, dropout_p, rng_key, site)
    summed = residual.to(wide) + branch
    normed = F.layer_norm(summed, summed.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed.to(input.dtype), summed.to(residual.dtype)


@overload
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    dropout_p: float = ..., rng_key: Tensor | None = ..., site: int = ..., return_sum: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    dropout_p: float = ..., rng_key: Tensor | None = ..., site: int = ..., return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0, return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``LayerNorm(residual + dropout(input))`` over the last dimension.

    Post-norm blocks use the normed output alone; pre-norm blocks ask for the sum too (``return_sum=True``), which is
    the next residual. ``normed`` has the dtype of ``input``, ``summed`` that of ``residual``.
    """
    check_dropout("add_layer_norm", dropout_p, rng_key)
    normed, summed = add_layer_norm_reference(
        input, residual, weight, bias, eps, dropout_p=dropout_p, rng_key=rng_key, site=site
    )
    return (normed, summed) if return_sum else normed
