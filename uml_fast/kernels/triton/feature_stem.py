"""Triton launchers of feature_stem; the kernels are those of all linear stems (linear_stem.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_stem import Gradients
from uml_fast.kernels.triton import linear_stem
from uml_fast.kernels.triton.linear_stem import RawRows


def fwd(
    rows: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor | None, deviation: Tensor | None,
    valid: Tensor | None, dtype: torch.dtype, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D)."""
    raw = RawRows(rows, mean, deviation, valid, *rows.shape)
    return linear_stem.fwd(raw, weight, bias, position, position_index, dtype, out)


def bwd(
    grad: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor | None, deviation: Tensor | None,
    valid: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of weight, bias and position."""
    raw = RawRows(rows, mean, deviation, valid, *rows.shape)
    return linear_stem.bwd(grad, raw, weight, bias, position, position_index)
