"""Triton launchers of image_stem; the kernels are those of all linear stems (linear_stem.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.linear_stem import Gradients
from uml_fast.kernels.triton import linear_stem
from uml_fast.kernels.triton.linear_stem import RawRows


def raw_rows(
    pixels: Tensor, mean: Tensor, deviation: Tensor, patch_height: int, patch_width: int
) -> RawRows:
    """Patches in reading order. Where they lie one after the other they are plain rows; else a
    line of a patch is contiguous, 48 bytes of a 16 pixel wide RGB patch: three loads of 16."""
    images, height, width, channels = pixels.shape
    down, across = height // patch_height, width // patch_width
    is_cut = width == patch_width
    image_line = width * channels
    return RawRows(
        pixels, mean, deviation, None, images * down * across,
        patch_height * patch_width * channels, down * across, across, height * image_line,
        patch_height * image_line, image_line, 0 if is_cut else patch_width * channels, channels,
    )  # fmt: skip


def fwd(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor, deviation: Tensor, patch_height: int,
    patch_width: int, dtype: torch.dtype, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D)."""
    raw = raw_rows(pixels, mean, deviation, patch_height, patch_width)
    return linear_stem.fwd(raw, weight, bias, position, position_index, dtype, out)


def bwd(
    grad: Tensor, pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor, deviation: Tensor, patch_height: int,
    patch_width: int,
) -> Gradients:  # fmt: skip
    """Gradients of weight, bias and position."""
    raw = raw_rows(pixels, mean, deviation, patch_height, patch_width)
    return linear_stem.bwd(grad, raw, weight, bias, position, position_index)
