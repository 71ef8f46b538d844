"""Dropout masks from a counter, the bits of ``uml_fast/kernels/rng.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def site_key(rng_key_ptr, site):
    """uint64 key of a dropout site (splitmix64 of the step's key)."""
    x = tl.load(rng_key_ptr).to(tl.uint64, bitcast=True)
    x += (tl.full((), site, tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _pair_hash(key, first, pair):
    """uint32 hashes of pairs of columns; first uint64 is the number of the row's first pair."""
    x = (first.to(tl.uint32) + pair.to(tl.uint32)) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    high = (first >> 32).to(tl.uint32) * 0x9E3779B9
    x = x ^ (x >> 15) ^ (key >> 32).to(tl.uint32) ^ high
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_mask(key, row, col, cols, threshold):
    """True where an element is kept; any rows and columns.

    key is a ``site_key``; row and col broadcast against each other, row int64, col int32; cols is
    the number of columns of the mask; elements whose 16-bit lane is below threshold are dropped.
    """
    x = _pair_hash(key, row.to(tl.uint64) * ((cols + 1) // 2), col // 2)
    lane = (x >> (16 * (col % 2)).to(tl.uint32)) & 0xFFFF
    return lane >= threshold


@triton.jit
def keep_factors(key, row, pair, cols, threshold, SCALE: tl.constexpr):
    """SCALE where an element is kept, else 0.0, of the columns 2 * pair and 2 * pair + 1.

    One hash serves two columns, half the work of ``keep_mask``: for tiles of neighbouring columns.
    The last dimension of row and pair, broadcast against each other, doubles.
    """
    x = _pair_hash(key, row.to(tl.uint64) * ((cols + 1) // 2), pair)
    even = tl.where((x & 0xFFFF) >= threshold, SCALE, 0.0)
    odd = tl.where((x >> 16) >= threshold, SCALE, 0.0)
    return tl.interleave(even, odd)
