"""CPU kernels of next_embedding_loss (csrc/cpu/linear_loss.cpp, narrow_loss.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_loss import Outputs
from uml_fast.kernels.native.library import CODES, library
from uml_fast.kernels.native.linear_loss import outputs, run

NARROW = {torch.float32: 4096, torch.bfloat16: 1 << 16}
"""Elements of the weight up to which one pass of our own multiplies. Forward with gradients, 4,864
rows, one thread: 40 -> 20 in bf16 0.31 -> 0.17 ms, in fp32 0.28 -> 0.34; 150 -> 300 in bf16 2.8 ->
2.1, in fp32 8.9 -> 9.8. Two threads on a busy machine, 40 -> 20 with backward: 0.96 -> 0.64 and
0.67 -> 0.50, as it is one parallel region instead of four."""


def fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """Loss, scale and the gradients without scale."""
    features = len(weight)
    if 0 < weight.numel() <= NARROW[hidden.dtype]:
        return _narrow(hidden, weight, bias, target, predicts, shift, needs_hidden, needs_weight)
    row_bytes = features * target.element_size()
    return run(
        library().squared_error,
        lambda row: (CODES[target.dtype], target.data_ptr() + row * row_bytes),
        1 / max(features, 1), hidden, weight, bias, predicts, shift, needs_hidden, needs_weight,
    )  # fmt: skip


def _narrow(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    (C, D), features = hidden.shape, len(weight)
    rows = max(C - shift, 0)
    narrow, wide_bias = weight.to(hidden.dtype), bias.float()
    grad_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32)
    grad_bias = bias.new_empty(features if needs_weight else 0, dtype=torch.float32)
    totals = hidden.new_zeros(2, dtype=torch.float64)
    library().narrow_squared_error(
        torch.get_num_threads(), CODES[hidden.dtype], CODES[target.dtype], rows, D, features,
        hidden.data_ptr(), narrow.data_ptr(), wide_bias.data_ptr(),
        target.data_ptr() + shift * features * target.element_size(), predicts.data_ptr(),
        grad_hidden.data_ptr() if needs_hidden else 0,
        grad_weight.data_ptr() if needs_weight else 0, grad_bias.data_ptr(), totals.data_ptr(),
    )  # fmt: skip
    if needs_hidden and rows < C:
        grad_hidden[rows:] = 0
    grads = (grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
    return outputs(totals, 1 / features, *grads)
