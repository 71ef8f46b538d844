"""Positions of rows: fixed sinusoids, rotations of queries and keys, tables for other image sizes.

Legend: T rows, H heads, K features of a head, P positions, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def sinusoids(positions: int, width: int) -> Tensor:
    """Fixed positions (positions, width): sines in the first half, cosines in the second."""
    frequency = torch.exp(-torch.arange((width + 1) // 2) * (2 * math.log(10000.0) / width))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), 1)[:, :width]


def rotations(position_T: Tensor, head_width: int, base: float) -> Tensor:
    """Cosines and sines fp32 (2, T, 1, K / 2) of the angles ``position * base ** (-2 i / K)``."""
    exponent = torch.arange(0, head_width, 2, device=position_T.device) / head_width
    angle = position_T[:, None].float() * base**-exponent
    return torch.stack((angle.cos(), angle.sin()))[:, :, None]


def rotate(x_THK: Tensor, rotation: Tensor) -> Tensor:
    """Rotate features i and i + K / 2 of every head by the angles of its row, in fp32."""
    a, b = x_THK.float().chunk(2, 2)
    cos, sin = rotation
    return torch.cat((a * cos - b * sin, b * cos + a * sin), 2).to(x_THK.dtype)


def resample_positions(
    position_PD: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool
) -> Tensor:
    """A table of old rows x columns for a grid of other size, by bicubic interpolation in fp32.

    ``antialias``: as timm does it; without, as transformers does.
    """
    if old == new:
        return position_PD
    grid = position_PD.float().unflatten(0, old).permute(2, 0, 1)[None]
    sized = F.interpolate(grid, new, mode="bicubic", align_corners=False, antialias=antialias)
    return sized[0].flatten(1).t().contiguous().to(position_PD.dtype)
