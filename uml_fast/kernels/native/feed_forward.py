"""CPU kernels of feed_forward: products by PyTorch (oneDNN), the rest by csrc/cpu/elementwise.cpp.

Bias, activation and dropout are one pass over the product, in place where the activation keeps the
number of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library, mask_arguments
from uml_fast.kernels.native.linear import column_sum, weight_gradient

ACTIVATIONS = {"relu": 0, "gelu": 1, "swiglu": 2}
"""Their numbers in csrc/cpu/kernels.h."""


def fwd(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor,
    activation: str, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, hidden, product without its bias or, for relu, nothing)."""
    product = torch.mm(input, weight_up.t())
    is_relu = activation == "relu"
    hidden = product if is_relu else input.new_empty(len(input), weight_down.shape[1])
    bias = bias_up.float()
    library().activation_fwd(
        torch.get_num_threads(), CODES[input.dtype], ACTIVATIONS[activation], product.data_ptr(),
        bias.data_ptr(), hidden.data_ptr(), *hidden.shape,
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    out = torch.addmm(bias_down.to(input.dtype), hidden, weight_down.t())
    return out, hidden, input.new_empty(0) if is_relu else product


def bwd(
    grad_out: Tensor, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
    hidden: Tensor, product: Tensor, activation: str, dropout_p: float, rng_key: Tensor | None,
    site: int, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight_up, bias_up (fp32), weight_down and bias_down (fp32).

    Those of weights are in fp32 or the working dtype, see ``weight_gradient``; those of frozen
    ones (``trains`` False) are empty.
    """
    grad = torch.mm(grad_out, weight_down)
    grad_pre = torch.empty_like(product) if activation == "swiglu" else grad
    saved = hidden if activation == "relu" else product
    bias = bias_up.float()
    grad_bias = torch.empty_like(bias)
    library().activation_bwd(
        torch.get_num_threads(), CODES[grad.dtype], ACTIVATIONS[activation], saved.data_ptr(),
        bias.data_ptr(), grad.data_ptr(), grad_pre.data_ptr(), grad_bias.data_ptr(), *grad.shape,
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    grad_input = torch.mm(grad_pre, weight_up)
    if not trains:
        none = [grad.new_empty(0) for _ in range(4)]
        return grad_input, none[0], none[1], none[2], none[3]
    grad_up = weight_gradient(grad_pre, input)
    grad_down = weight_gradient(grad_out, hidden)
    return grad_input, grad_up, grad_bias, grad_down, column_sum(grad_out)
