"""CPU kernels of segment_mean (csrc/cpu/segment_mean.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library


def fwd(input: Tensor, offsets: Tensor) -> Tensor:
    """Means (S, K)."""
    segments = len(offsets) - 1
    out = input.new_empty(segments, input.shape[1])
    library().segment_mean_fwd(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), offsets.data_ptr(), segments,
        input.shape[1], out.data_ptr(),
    )  # fmt: skip
    return out


def bwd(grad_out: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Gradient of the input (T, K)."""
    segments, cols = grad_out.shape
    grad = grad_out.new_empty(rows, cols)
    library().segment_mean_bwd(
        torch.get_num_threads(), CODES[grad.dtype], grad_out.data_ptr(), offsets.data_ptr(),
        segments, cols, grad.data_ptr(),
    )  # fmt: skip
    return grad
