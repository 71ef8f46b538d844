"""CPU kernel of dropout (csrc/cpu/elementwise.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library, mask_arguments


def fwd(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    """Dropout of a contiguous tensor; of a gradient it is the backward pass."""
    out = torch.empty_like(input)
    cols = input.shape[-1] if input.ndim else 1
    library().dropout(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), out.data_ptr(),
        input.numel() // max(cols, 1), cols, *mask_arguments(p, rng_key, site),
    )  # fmt: skip
    return out


bwd = fwd
