"""Counter-based randomness of dropout: the mask is a function of (key, row, column) alone.

A step has one 64-bit ``rng_key``; every place that drops (a *site*) derives its own key from it. A
row of a mask has ``ceil(cols / 2)`` pairs of columns and starts at pair ``q = row * ceil(cols /
2)``. Each pair is hashed to 32 bits, whose low half decides the even column and whose high half the
odd one:

    x = (lo32(q) + col // 2) ^ lo32(key);                x = (x ^ x >> 16) * 0x7FEB352D
    x = x ^ x >> 15 ^ hi32(key) ^ hi32(q) * 0x9E3779B9;  x = x * 0x846CA68B;  hash = x ^ x >> 16
    keep iff lane >= round(p * 65536)

``csrc/cpu/simd.h`` computes the same bits. So backward passes and resumed runs draw masks again
instead of saving them, and results do not depend on threads or on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 1 << 16
"""Values of a lane; probabilities are rounded to multiples of 1 / LANES."""

_LOW = 0xFFFFFFFF


def _signed(value: int) -> int:
    """``value`` modulo 2**64 as a signed 64-bit integer, which is what int64 tensors hold."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def site_key(rng_key: Tensor, site: int) -> Tensor:
    """The int64 (1,) key of a dropout site from the step's ``rng_key`` int64 (1,) (splitmix64)."""
    x = rng_key + _signed((site + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def shift_sites(rng_key: Tensor, sites: int) -> Tensor:
    """The int64 (1,) key whose site ``s`` is site ``s + sites`` of ``rng_key``."""
    return rng_key + _signed(sites * 0x9E3779B97F4A7C15)


def threshold(p: float) -> int:
    """Lanes below this are dropped: round(p * 65536), at most 65535."""
    return min(round(p * LANES), LANES - 1)


def keep_scale(p: float) -> float:
    """Factor of kept elements, 1 / (1 - p') with p' the probability after rounding to lanes."""
    return LANES / (LANES - threshold(p))


def keep_mask(rng_key: Tensor, site: int, row: Tensor, col: Tensor, cols: int, p: float) -> Tensor:
    """bool mask, True where an element is kept.

    Args:
        rng_key: int64 (1,), the step's key.
        site: which dropout of the model this is.
        row, col: int64, broadcastable against each other; 0 <= col < cols.
        cols: columns of a row, which fixes the numbering of pairs.
        p: probability of dropping.
    """
    key = site_key(rng_key, site)
    first = row * ((cols + 1) // 2)
    x = ((first + col // 2) & _LOW) ^ (key & _LOW)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    high = ((first >> 32) * 0x9E3779B9) & _LOW
    x = x ^ (x >> 15) ^ _shift_right(key, 32) ^ high
    x = (x * 0x846CA68B) & _LOW
    x = x ^ (x >> 16)
    lane = (x >> (16 * (col % 2))) & (LANES - 1)
    return lane >= threshold(p)


def keep_mask_like(x: Tensor, rng_key: Tensor, site: int, p: float) -> Tensor:
    """``keep_mask`` of the shape of ``x``: its last dimension is columns, the others are rows."""
    cols = x.shape[-1]
    rows = x.numel() // max(cols, 1)
    row = torch.arange(rows, device=x.device).unsqueeze(1)
    col = torch.arange(cols, device=x.device)
    return keep_mask(rng_key, site, row, col, cols, p).view(x.shape)


def check_dropout(op: str, p: float, rng_key: Tensor | None) -> None:
    """Raise ValueError unless 0 <= p < 1 and, where p > 0, ``rng_key`` is int64 (1,)."""
    if not 0 <= p < 1:
        raise ValueError(f"{op}: the dropout probability is {p}; it must be in [0, 1)")
    if p > 0 and (rng_key is None or rng_key.dtype != torch.int64 or rng_key.shape != (1,)):
        got = "None" if rng_key is None else f"{rng_key.dtype}{list(rng_key.shape)}"
        raise ValueError(f"{op}: dropout needs rng_key int64[1], got {got}")
