"""CPU kernel of index_sum (csrc/cpu/index_sum.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library


def fwd(input: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums fp32 (P, K)."""
    rows, cols = input.shape
    out = input.new_empty(size, cols, dtype=torch.float32)
    library().index_sum(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), index.data_ptr(), rows, cols,
        size, out.data_ptr(),
    )  # fmt: skip
    return out
