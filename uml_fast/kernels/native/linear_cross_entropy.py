"""CPU kernels of linear_cross_entropy (csrc/cpu/linear_loss.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_cross_entropy import check_classes
from uml_fast.kernels.linear_loss import Outputs
from uml_fast.kernels.native.library import library
from uml_fast.kernels.native.linear_loss import run


def fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """Loss, scale and the gradients without scale.

    Raises:
        ValueError: a row that counts is scored against an id that is no class.
    """
    check_classes(target, predicts, shift, len(weight))
    return run(
        library().cross_entropy,
        lambda row: (
            target.dtype == torch.int64, target.data_ptr() + row * target.element_size()
        ),
        1.0, hidden, weight, bias, predicts, shift, needs_hidden, needs_weight,
    )  # fmt: skip
