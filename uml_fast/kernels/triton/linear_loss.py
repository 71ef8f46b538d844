"""What the CUDA launchers of linear losses share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uml_fast.kernels.linear_loss import Outputs, counted, multiply_chunks

ROW_ALIGN = 16
"""Elements: rows of the scratch start at a multiple of 16 bytes whatever the features, as the
products and the error pass want them."""

Pass = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""``pass(product_RF, first_row)``: partial sums of the error (N,) and of the gradient's columns
(P, F), both fp32; the product becomes the gradient."""


def run(
    chunk_pass: Pass, per_element: float, hidden: Tensor, weight: Tensor, bias: Tensor,
    predicts: Tensor, shift: int, needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """All outputs of a linear loss; nothing waits for the device.

    ``per_element``: a factor of scale beside 1 / (rows that count).
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    grad_bias = hidden.new_zeros(len(weight) if needs_weight else 0, dtype=torch.float32)

    def error_pass(product: Tensor, first: int) -> None:
        errors, columns = chunk_pass(product, first)
        total.add_(errors.sum())
        if needs_weight:
            grad_bias.add_(columns.sum(0, dtype=torch.float32))

    grad_hidden, grad_weight = multiply_chunks(
        error_pass, hidden, weight, shift, needs_hidden, needs_weight, ROW_ALIGN
    )
    scale = per_element / counted(predicts, shift).sum().clamp(min=1).float()
    return total * scale, scale, grad_hidden, grad_weight, grad_bias.to(bias.dtype, copy=True)
