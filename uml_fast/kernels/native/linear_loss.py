"""What the CPU launchers of linear losses share (csrc/cpu/linear_loss.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.linear_loss import Outputs, multiply_chunks
from uml_fast.kernels.native.library import CODES


def run(
    kernel: Callable[..., None], target_arguments: Callable[[int], tuple[Any, ...]],
    per_element: float, hidden: Tensor, weight: Tensor, bias: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """All outputs of a linear loss.

    Args:
        kernel: of csrc/cpu, called once a chunk.
        target_arguments: its last arguments, for a chunk whose first row has this target row.
        per_element: a factor of scale beside 1 / (rows that count).
    """
    wide_bias = bias.float()
    has_grad = needs_hidden or needs_weight
    grad_bias = hidden.new_zeros(len(weight) if has_grad else 0, dtype=torch.float32)
    totals = hidden.new_zeros(2, dtype=torch.float64)

    def error_pass(product: Tensor, first: int) -> None:
        kernel(
            torch.get_num_threads(), CODES[product.dtype], *product.shape, product.data_ptr(),
            predicts.data_ptr() + first, grad_bias.data_ptr() if has_grad else 0,
            totals.data_ptr(), wide_bias.data_ptr(), *target_arguments(first + shift),
        )  # fmt: skip

    grad_hidden, grad_weight = multiply_chunks(
        error_pass, hidden, weight, shift, needs_hidden, needs_weight
    )
    if not needs_weight:
        grad_bias = bias.new_empty(0)
    return outputs(totals, per_element, grad_hidden, grad_weight, grad_bias.to(bias.dtype))


def outputs(
    totals: Tensor, per_element: float, grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> Outputs:
    """All outputs, from the gradients and float64 (2,) of the sum of errors and the rows."""
    error, rows = totals.tolist()
    scale = per_element / max(rows, 1)
    loss = torch.tensor(error * scale, dtype=torch.float32)
    return loss, torch.tensor(scale, dtype=torch.float32), grad_hidden, grad_weight, grad_bias
