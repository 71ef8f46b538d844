"""CPU kernels of feature_stem (csrc/cpu/stem.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_stem import Gradients
from uml_fast.kernels.native import linear_stem
from uml_fast.kernels.native.library import CODES, library


def standardise(
    rows: Tensor, mean: Tensor | None, deviation: Tensor | None, valid: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Features (C, columns) in ``dtype``, padded with zero columns; the rows themselves where
    nothing changes them."""
    cols = linear_stem.feature_columns(rows.shape[1], dtype)
    if mean is None and valid is None and dtype == rows.dtype and cols == rows.shape[1]:
        return rows
    out = rows.new_empty(len(rows), cols, dtype=dtype)
    wide = [None if t is None else t.float() for t in (mean, deviation)]
    addresses = [0 if t is None else t.data_ptr() for t in (*wide, valid)]
    library().standardise_rows(
        torch.get_num_threads(), CODES[dtype], rows.data_ptr(), *addresses, *rows.shape,
        out.data_ptr(), cols,
    )  # fmt: skip
    return out


def fwd(
    rows: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor | None, deviation: Tensor | None,
    valid: Tensor | None, dtype: torch.dtype, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D)."""
    features = standardise(rows, mean, deviation, valid, dtype)
    return linear_stem.fwd(features, weight, bias, position, position_index, 1, out)


def bwd(
    grad: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor | None, deviation: Tensor | None,
    valid: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of weight, bias and position."""
    features = standardise(rows, mean, deviation, valid, grad.dtype)
    return linear_stem.bwd(grad, features, weight, bias, position, position_index, 1)
