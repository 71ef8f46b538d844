"""CPU kernels of next_embedding_loss (csrc/cpu/linear_loss.cpp)."""

from __future__ import annotations

from torch import Tensor

from uml_fast.kernels.linear_loss import Outputs
from uml_fast.kernels.native.library import CODES, library
from uml_fast.kernels.native.linear_loss import run


def fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """Loss, scale and the gradients without scale."""
    features = len(weight)
    row_bytes = features * target.element_size()
    return run(
        library().squared_error,
        lambda row: (CODES[target.dtype], target.data_ptr() + row * row_bytes),
        1 / max(features, 1), hidden, weight, bias, predicts, shift, needs_hidden, needs_weight,
    )  # fmt: skip
