"""The second half of a reduction that is split over programs: their partial sums added in order.

Splitting by shape and adding in order keeps results the same bits every time, which atomics do not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.triton.launch import launch, processors


def split_count(tiles: int, blocks: int, waves: int = 2) -> int:
    """Parts of a reduction of ``blocks`` steps whose result has this many tiles.

    As many as keep ``waves`` programs on every processor without a rest; at most one per step.
    """
    return max(min(blocks, waves * processors() // max(tiles, 1)), 1)


@triton.jit
def _split_sum_kernel(partial_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + at, mask=at < size, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + at, total, mask=at < size)


def split_sum(partial_SX: Tensor) -> Tensor:
    """Sum over the first dimension of contiguous fp32 (S, ...), in order.

    Bound by memory: 4 elements (16 bytes) a thread, blocks small enough that tables of a few
    thousand elements still use many processors.
    """
    splits, *shape = partial_SX.shape
    if splits == 1:
        return partial_SX[0]
    out = partial_SX.new_empty(shape)
    size = out.numel()
    launch(_split_sum_kernel, (triton.cdiv(size, 512),), partial_SX, out, splits, size,
           BLOCK=512, num_warps=4)  # fmt: skip
    return out
