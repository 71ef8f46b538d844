"""CPU kernels of image_stem (csrc/cpu/stem.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_stem import Gradients
from uml_fast.kernels.native import linear_stem
from uml_fast.kernels.native.library import CODES, library


def features(
    pixels: Tensor, mean: Tensor, deviation: Tensor, patch_height: int, patch_width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Normalised patches (C, columns) in ``dtype``, padded with zero columns."""
    images, height, width, channels = pixels.shape
    rows = images * (height // patch_height) * (width // patch_width)
    cols = linear_stem.feature_columns(patch_height * patch_width * channels, dtype)
    out = pixels.new_empty(rows, cols, dtype=dtype)
    mean, deviation = mean.float(), deviation.float()
    library().normalise_patches(
        torch.get_num_threads(), CODES[dtype], *pixels.shape, patch_height, patch_width,
        pixels.data_ptr(), mean.data_ptr(), deviation.data_ptr(), out.data_ptr(), cols,
    )  # fmt: skip
    return out


def fwd(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor, deviation: Tensor, patch_height: int,
    patch_width: int, dtype: torch.dtype, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D)."""
    x = features(pixels, mean, deviation, patch_height, patch_width, dtype)
    period = (pixels.shape[1] // patch_height) * (pixels.shape[2] // patch_width)
    return linear_stem.fwd(x, weight, bias, position, position_index, period, out)


def bwd(
    grad: Tensor, pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor, deviation: Tensor, patch_height: int,
    patch_width: int,
) -> Gradients:  # fmt: skip
    """Gradients of weight, bias and position."""
    x = features(pixels, mean, deviation, patch_height, patch_width, grad.dtype)
    period = (pixels.shape[1] // patch_height) * (pixels.shape[2] // patch_width)
    return linear_stem.bwd(grad, x, weight, bias, position, position_index, period)
