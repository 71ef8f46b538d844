"""Column sums in a fixed order, the second half of every gradient summed over rows.

A kernel writes one row of partial sums a program; adding those rows here, and not with atomics,
keeps results independent of timing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.triton.launch import launch


@triton.jit
def _column_sum_kernel(
    input_ptr, out_ptr, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
        inside = (row < rows) & (col < cols)
        total += tl.load(input_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + col, tl.sum(total, 0, keep_dims=True), mask=col < cols)


def sum_partials(partial_PK: Tensor) -> Tensor:
    """Sum over the rows of fp32 (P, K) in a fixed order, fp32 (K,).

    The few hundred rows are in the second-level cache, so latency is what counts: narrow programs,
    for there are few columns, with many rows in flight each.
    """
    rows, cols = partial_PK.shape
    out = partial_PK.new_empty(cols)
    launch(_column_sum_kernel, (triton.cdiv(cols, 16),), partial_PK, out, rows, cols,
           BLOCK_ROWS=256, BLOCK_COLS=16, num_warps=8)  # fmt: skip
    return out
