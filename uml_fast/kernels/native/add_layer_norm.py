"""CPU kernels of add_layer_norm and, without a bias, of add_rms_norm (csrc/cpu/layer_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.add_norm import has_one_gradient
from uml_fast.kernels.native.library import CODES, library, mask_arguments


def fwd(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    dropout_p: float, rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, summed, statistics fp32 (2, T)); without ``return_sum`` summed is empty.

    Without ``bias`` the norm is the RMS norm, whose statistics are (1, T).
    """
    T, K = input.shape
    normed = torch.empty_like(input)
    summed = torch.empty_like(residual) if return_sum else residual.new_empty(0)
    statistics = input.new_empty(1 if bias is None else 2, T, dtype=torch.float32)
    wide_weight, wide_bias = weight.float(), weight if bias is None else bias.float()
    library().add_layer_norm_fwd(
        torch.get_num_threads(), T, K, CODES[input.dtype], CODES[residual.dtype], bias is None,
        input.data_ptr(), residual.data_ptr(), wide_weight.data_ptr(), wide_bias.data_ptr(), eps,
        normed.data_ptr(), summed.data_ptr() if return_sum else 0, statistics[0].data_ptr(),
        statistics[-1].data_ptr(), *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return normed, summed, statistics


def bwd(
    grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
    weight: Tensor, statistics: Tensor, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of input, residual, weight (fp32) and bias (fp32).

    That of input is None where it equals that of residual: one dtype and no dropout. That of bias
    is None for the RMS norm.
    """
    T, K = input.shape
    shared = has_one_gradient(input, residual, dropout_p)
    grad_input = None if shared else torch.empty_like(input)
    grad_residual = torch.empty_like(residual)
    grad_affine = input.new_empty(len(statistics), K, dtype=torch.float32)
    wide_weight = weight.float()
    library().add_layer_norm_bwd(
        torch.get_num_threads(), T, K, CODES[input.dtype], CODES[residual.dtype],
        len(statistics) == 1, grad_normed.data_ptr(),
        0 if grad_summed is None else grad_summed.data_ptr(), input.data_ptr(),
        residual.data_ptr(), wide_weight.data_ptr(), statistics[0].data_ptr(),
        statistics[-1].data_ptr(), 0 if grad_input is None else grad_input.data_ptr(),
        grad_residual.data_ptr(), grad_affine.data_ptr(), grad_affine[-1].data_ptr(),
        *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    grad_weight, *grad_bias = grad_affine
    return grad_input, grad_residual, grad_weight, grad_bias[0] if grad_bias else None
