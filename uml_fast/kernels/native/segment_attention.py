"""CPU kernels of segment_attention (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native.library import CODES, library, mask_arguments


def fwd(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, is_causal: bool,
    scale: float, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), log-sum-exp fp32 (T, H))."""
    T, H, D = query.shape
    out = query.new_empty(T, H, D)
    lse = query.new_empty(T, H, dtype=torch.float32)
    library().attention_fwd(
        torch.get_num_threads(), offsets.data_ptr(), len(offsets) - 1, H, D, max_len,
        query.stride(0), is_causal, scale, CODES[query.dtype], query.data_ptr(), key.data_ptr(),
        value.data_ptr(), out.data_ptr(), lse.data_ptr(), *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return out, lse


def bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, out: Tensor,
    lse: Tensor, max_len: int, is_causal: bool, scale: float, dropout_p: float,
    rng_key: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """Gradients of query, key and value, packed as (T, 3, H, D); ``out`` is not read."""
    T, H, D = query.shape
    grad = query.new_empty(T, 3, H, D)
    first = grad.data_ptr()
    step = H * D * grad.element_size()
    library().attention_bwd(
        torch.get_num_threads(), offsets.data_ptr(), len(offsets) - 1, H, D, max_len,
        query.stride(0), is_causal, scale, CODES[query.dtype], grad_out.data_ptr(),
        query.data_ptr(), key.data_ptr(), value.data_ptr(), lse.data_ptr(), first, first + step,
        first + 2 * step, grad.stride(0), *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return grad
