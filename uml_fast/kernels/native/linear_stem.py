"""The product of a stem on the CPU: PyTorch's, between two passes of csrc/cpu/stem.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_stem import Gradients
from uml_fast.kernels.native.index_sum import fwd as index_sum
from uml_fast.kernels.native.library import CODES, library
from uml_fast.kernels.native.linear import column_sum

BF16_DEPTH = 32
"""Elements of a row that one bf16 tile product takes: padding features to a multiple of it makes
both products 20 to 30 % faster (371 and 300 features, width 150, AMX)."""


def feature_columns(features: int, dtype: torch.dtype) -> int:
    """Columns of the feature matrix, those beyond ``features`` zero."""
    return -(-features // BF16_DEPTH) * BF16_DEPTH if dtype == torch.bfloat16 else features


def cast_weight(weight_DE: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype`` with zeros up to ``cols`` columns."""
    width, features = weight_DE.shape
    if cols == features:
        return weight_DE.to(dtype)
    out = weight_DE.new_empty(width, cols, dtype=dtype)
    out[:, :features] = weight_DE
    out[:, features:] = 0
    return out


def fwd(
    features: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, period: int, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D) of features (C, columns); a row's position is its number modulo ``period``
    where there is no index."""
    dtype = features.dtype
    cast = cast_weight(weight, features.shape[1], dtype).t()
    if position is None:
        return torch.addmm(bias.to(dtype), features, cast, out=out)
    tokens = torch.mm(features, cast, out=out)
    wide_bias, wide_position = bias.float(), position.float()
    library().add_position(
        torch.get_num_threads(), CODES[dtype], tokens.data_ptr(), wide_bias.data_ptr(),
        wide_position.data_ptr(), 0 if position_index is None else position_index.data_ptr(),
        period, len(position), *tokens.shape,
    )  # fmt: skip
    return tokens


def transpose_sum(input: Tensor) -> tuple[Tensor, Tensor]:
    """(N, T) copy of (T, N) and its column sums fp32 (N,), in one pass.

    Rows of the copy lie a cache line further apart than they are long: at the powers of two that T
    often is, they would share a set of the cache (T 4096, N 384: copy 550 -> 380 us, the product
    that reads it 2.4 -> 2.1 ms). The kernel fills the first of the elements between with zeros:
    oneDNN reads one of them where T is odd.
    """
    rows, cols = input.shape
    stride = -(-rows // 32) * 32 + 32
    out, sums = input.new_empty(cols, stride), input.new_empty(cols, dtype=torch.float32)
    library().transpose_sum(
        torch.get_num_threads(), CODES[input.dtype], input.data_ptr(), rows, cols, out.data_ptr(),
        stride, sums.data_ptr(),
    )  # fmt: skip
    return out[:, :rows], sums


def bwd(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, period: int,
) -> Gradients:  # fmt: skip
    """Gradients in the parameters' dtypes.

    A bf16 gradient is copied transposed, as products whose long dimension is the strided one of
    the first operand are slow (docs/numerics.md); its column sums come with the copy.
    """
    if grad.dtype == torch.bfloat16:
        grad_DC, grad_bias = transpose_sum(grad)
    else:
        grad_DC, grad_bias = grad.t(), column_sum(grad)
    product = torch.mm(grad_DC, features)
    grad_weight = product[:, : weight.shape[1]].to(weight.dtype).contiguous()
    if position is None:
        return grad_weight, grad_bias.to(bias.dtype), weight.new_empty(0)
    if position_index is None:
        position_index = torch.arange(len(grad), dtype=torch.int32).remainder_(period)
    grad_position = index_sum(grad, position_index, len(position))
    return grad_weight, grad_bias.to(bias.dtype), grad_position.to(position.dtype)
