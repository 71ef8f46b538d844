"""The second half of a sum that is split over programs: their partial sums, added in a fixed order.

Splitting by shape and adding in order keeps results the same bits every time, which atomics do not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.triton.launch import launch, processors


def split_count(tiles: int, blocks: int, waves: int = 2) -> int:
    """Parts of a sum of ``blocks`` steps whose result has this many tiles.

    As many as keep ``waves`` programs on every processor without a rest; at most one per step.
    """
    return max(min(blocks, waves * processors() // max(tiles, 1)), 1)


@triton.jit
def _partial_sum_kernel(
    partial_ptr, out_ptr, parts, size, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr
):
    col = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_X), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
        inside = (part < parts) & (col < size)
        total += tl.load(partial_ptr + part * size + col, mask=inside, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, 0, keep_dims=True), mask=col < size)


def partial_sum(partial_PX: Tensor) -> Tensor:
    """Sum over the first dimension of contiguous fp32 (P, ...).

    All parts of a column are in flight at once, 16 elements a thread: the few parts of a large
    table are bound by memory, and of hundreds of parts of a few columns, which are in the
    second-level cache, latency is what counts.
    """
    parts, *shape = partial_PX.shape
    if parts == 1:
        return partial_PX[0]
    out = partial_PX.new_empty(shape)
    size = out.numel()
    block_parts = min(triton.next_power_of_2(max(parts, 2)), 256)
    block_cols = min(4096 // block_parts, 512)
    launch(
        _partial_sum_kernel, (triton.cdiv(size, block_cols),), partial_PX, out, parts, size,
        BLOCK_P=block_parts, BLOCK_X=block_cols, num_warps=block_parts * block_cols // 512,
    )  # fmt: skip
    return out
