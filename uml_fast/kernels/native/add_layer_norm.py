"""CPU kernels of add_layer_norm (csrc/cpu/layer_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library, mask_arguments


def fwd(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, summed, statistics fp32 (2, T)); without ``return_sum`` summed is empty."""
    T, K = input.shape
    normed = torch.empty_like(input)
    summed = torch.empty_like(residual) if return_sum else residual.new_empty(0)
    statistics = input.new_empty(2, T, dtype=torch.float32)
    wide_weight, wide_bias = weight.float(), bias.float()
    library().add_layer_norm_fwd(
        torch.get_num_threads(), T, K, CODES[input.dtype], CODES[residual.dtype], input.data_ptr(),
        residual.data_ptr(), wide_weight.data_ptr(), wide_bias.data_ptr(), eps, normed.data_ptr(),
        summed.data_ptr() if return_sum else 0, statistics.data_ptr(),
        statistics.data_ptr() + 4 * T, *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return normed, summed, statistics


def bwd(
    grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
    weight: Tensor, statistics: Tensor, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, residual, weight (fp32) and bias (fp32)."""
    T, K = input.shape
    grad_input, grad_residual = torch.empty_like(input), torch.empty_like(residual)
    grad_affine = input.new_empty(2, K, dtype=torch.float32)
    wide_weight = weight.float()
    library().add_layer_norm_bwd(
        torch.get_num_threads(), T, K, CODES[input.dtype], CODES[residual.dtype],
        grad_normed.data_ptr(), 0 if grad_summed is None else grad_summed.data_ptr(),
        input.data_ptr(), residual.data_ptr(), wide_weight.data_ptr(), statistics.data_ptr(),
        statistics.data_ptr() + 4 * T, grad_input.data_ptr(), grad_residual.data_ptr(),
        grad_affine.data_ptr(), grad_affine.data_ptr() + 4 * K,
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return grad_input, grad_residual, grad_affine[0], grad_affine[1]
