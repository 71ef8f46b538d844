"""Gradients of a linear layer's weight and bias on the CPU.

Legend: T rows, K inputs and N outputs of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library


def column_sum(input: Tensor) -> Tensor:
    """Sum over the rows of (T, N), accumulated and returned in fp32 (N,)."""
    out = input.new_empty(input.shape[1], dtype=torch.float32)
    library().column_sum(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), out.data_ptr(), *input.shape
    )
    return out


WHOLE = 64
"""Widths that csrc/cpu/weight_gradient.cpp is used for are multiples of it. At 40, 150 and 300 with
2,048 hidden units it is no faster than oneDNN, and whole steps were slower (docs/log.md)."""


def has_tiles(dtype: torch.dtype, N: int, K: int) -> bool:
    """Whether csrc/cpu/weight_gradient.cpp makes the gradient of an (N, K) weight here."""
    if N % WHOLE or K % WHOLE:
        return False
    return dtype == torch.bfloat16 and bool(library().has_weight_gradient())


def weight_gradient(grad_TN: Tensor, input_TK: Tensor) -> Tensor:
    """grad^T input (N, K) of contiguous operands: fp32 from matrix tiles, else in their dtype.

    oneDNN multiplies bf16 two to three times slower when the long dimension T is the strided one of
    the first operand (docs/numerics.md), so the narrower operand is copied transposed for it.
    """
    T, N = grad_TN.shape
    K = input_TK.shape[1]
    if has_tiles(grad_TN.dtype, N, K):
        out = grad_TN.new_empty(N, K, dtype=torch.float32)
        library().weight_gradient(
            torch.get_num_threads(), grad_TN.data_ptr(), input_TK.data_ptr(), T, N, K,
            out.data_ptr(),
        )  # fmt: skip
        return out
    if N <= K:
        return torch.mm(grad_TN.t().contiguous(), input_TK)
    return torch.mm(input_TK.t().contiguous(), grad_TN).t().contiguous()
