"""Triton kernel of dropout.

Bound by memory at 16-byte accesses: with an even number of columns pairs are numbered through the
whole tensor, so rows do not matter, and a thread loads 16 bytes and hashes once per two elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.rng import keep_scale, threshold
from uml_fast.kernels.triton.launch import launch
from uml_fast.kernels.triton.rng import keep_factors, keep_mask, site_key
from uml_fast.kernels.triton.rounding import store_rounded


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program."""

    block: int
    num_warps: int


def launch_config(element_size: int) -> LaunchConfig:
    """Four 16-byte loads a thread in flight: 8 KB a program, so 8 programs fill a processor's
    64 KB of latency at H200's bandwidth."""
    return LaunchConfig(block=4 * 128 * 16 // element_size, num_warps=4)


@triton.jit
def _dropout_fwd_kernel(
    input_ptr, out_ptr, rng_key_ptr, count, site, threshold, COLS: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    key = site_key(rng_key_ptr, site)
    x = tl.load(input_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    if COLS == 2:
        pair = start // 2 + tl.arange(0, BLOCK // 2)
        factor = keep_factors(key, tl.full((), 0, tl.int64), pair, COLS, threshold, SCALE)
    else:
        kept = keep_mask(key, at // COLS, (at % COLS).to(tl.int32), COLS, threshold)
        factor = tl.where(kept, SCALE, 0.0)
    store_rounded(out_ptr + at, x * factor, at < count)


def fwd(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    """Dropout of a contiguous tensor; of a gradient it is the backward pass."""
    out = torch.empty_like(input)
    count = input.numel()
    cols = input.shape[-1] if input.ndim else 1
    # Below 2**32 pairs the high half of a pair's number is zero, and rows of even length are then
    # the same as rows of two columns.
    if cols % 2 == 0 and count < 1 << 33:
        cols = 2
    c = launch_config(input.element_size())
    launch(
        _dropout_fwd_kernel, (triton.cdiv(count, c.block),), input, out, rng_key, count, site,
        threshold(p), COLS=cols, SCALE=keep_scale(p), BLOCK=c.block, num_warps=c.num_warps,
    )  # fmt: skip
    return out


bwd = fwd
