"""Triton kernels of text_stem.

Forward gathers whole rows, 16 bytes a thread. The gradient of the embedding table sorts the ids
(stable, so equal ids keep the order of their rows) and gives each tile of the table to one program,
which walks the runs of its ids and writes the tile once, zeros included: no atomics, no zero fill.
A frequent id would keep one program busy for thousands of rows, so a first kernel sums every chunk
of the sorted rows that holds one id alone, and the second adds a run's head, its chunks and its
tail, in this order. Chunks depend on the ids alone, so the bits do too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.triton.launch import launch
from uml_fast.kernels.triton.rounding import store_rounded

CHUNK = 128
"""Sorted rows of one partial sum: the longest walk is 2 CHUNK + C / CHUNK rows, so 128 is the best
for C = 16,384 rows and within 1.6 times of the best from 4,096 to 65,536."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program; four warps."""

    block_rows: int
    block_cols: int


def launch_config(cols: int, elements_per_thread: int) -> LaunchConfig:
    """At most 128 columns: 512 bytes of an fp32 row. 16 elements a thread forward; 8 backward,
    whose walks are unrolled, so that two rows of each entry are on their way at once."""
    block_cols = min(max(triton.next_power_of_2(cols), 16), 128)
    return LaunchConfig(128 * elements_per_thread // block_cols, block_cols)


@triton.jit
def _text_stem_fwd_kernel(
    ids_ptr, weight_ptr, position_ptr, position_index_ptr, out_ptr, C, V, P, D: tl.constexpr,
    HAS_POSITION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < C) & (col < D)
    id = tl.load(ids_ptr + row, mask=row < C, other=0).to(tl.int64)
    known = (id >= 0) & (id < V)
    x = tl.load(weight_ptr + id * D + col, mask=inside & known, other=0.0).to(tl.float32)
    x = tl.where(known, x, float("nan"))
    if HAS_POSITION:
        index = tl.load(position_index_ptr + row, mask=row < C, other=0)
        index = tl.minimum(tl.maximum(index, 0), P - 1).to(tl.int64)
        x += tl.load(position_ptr + index * D + col, mask=inside, other=0.0).to(tl.float32)
    store_rounded(out_ptr + row * D + col, x, inside)


@triton.jit
def _text_stem_bwd_kernel_chunks(
    grad_out_ptr, sorted_ptr, order_ptr, partial_ptr, C, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    last = first + CHUNK - 1
    # Two conditions: the ids may only be read where the first holds.
    if last < C:  # noqa: SIM102
        if tl.load(sorted_ptr + first) == tl.load(sorted_ptr + last):
            col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
            for start in range(0, CHUNK, BLOCK_C):
                row = tl.load(order_ptr + first + start + tl.arange(0, BLOCK_C))
                at = row[:, None] * D + col[None, :]
                grad = tl.load(grad_out_ptr + at, mask=(col < D)[None, :], other=0.0)
                total += grad.to(tl.float32)
            at = chunk.to(tl.int64) * D + col
            tl.store(partial_ptr + at, tl.sum(total, 0), mask=col < D)


@triton.jit
def _text_stem_bwd_kernel(
    grad_out_ptr, order_ptr, bounds_ptr, partial_ptr, grad_ptr, V, D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    id = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    begin = tl.load(bounds_ptr + id, mask=id < V, other=0)
    end = tl.load(bounds_ptr + id + 1, mask=id < V, other=0)
    # Chunks [chunk, chunk_end) lie within the run: the head ends where they begin.
    chunk = (begin + CHUNK - 1) // CHUNK
    chunk_end = tl.maximum(end // CHUNK, chunk)
    has_chunks = chunk_end > chunk
    head_end = tl.where(has_chunks, chunk * CHUNK, end)
    tail = tl.where(has_chunks, chunk_end * CHUNK, end)
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for step in tl.range(0, tl.max(head_end - begin, 0), loop_unroll_factor=2):
        here = begin + step < head_end
        row = tl.load(order_ptr + begin + step, mask=here, other=0)
        mask = here[:, None] & (col < D)
        total += tl.load(grad_out_ptr + row[:, None] * D + col, mask=mask, other=0.0).to(tl.float32)
    for step in range(0, tl.max(chunk_end - chunk, 0)):
        mask = (chunk + step < chunk_end)[:, None] & (col < D)
        at = (chunk + step).to(tl.int64)[:, None] * D + col
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    for step in tl.range(0, tl.max(end - tail, 0), loop_unroll_factor=2):
        here = tail + step < end
        row = tl.load(order_ptr + tail + step, mask=here, other=0)
        mask = here[:, None] & (col < D)
        total += tl.load(grad_out_ptr + row[:, None] * D + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_ptr + id[:, None] * D + col, total, mask=(id < V)[:, None] & (col < D))


def fwd(
    ids: Tensor, weight: Tensor, position: Tensor | None, position_index: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the tokens to ``out``; rows of ids outside the vocabulary are NaN."""
    C, D = out.shape
    c = launch_config(D, 16)
    grid = (triton.cdiv(C, c.block_rows), triton.cdiv(D, c.block_cols))
    launch(
        _text_stem_fwd_kernel, grid, ids, weight, position, position_index, out, C, len(weight),
        0 if position is None else len(position), D=D, HAS_POSITION=position is not None,
        BLOCK_C=c.block_rows, BLOCK_D=c.block_cols, num_warps=4,
    )  # fmt: skip


def bwd(grad_out: Tensor, ids: Tensor, size: int) -> Tensor:
    """Gradient of the embedding table fp32 (size, D)."""
    C, D = grad_out.shape
    grad = grad_out.new_empty(size, D, dtype=torch.float32)
    sorted_ids, order = ids.sort(stable=True)
    entries = torch.arange(size + 1, dtype=torch.int32, device=ids.device)
    bounds = torch.searchsorted(sorted_ids, entries, out_int32=True)
    partial = grad_out.new_empty(triton.cdiv(C, CHUNK), D, dtype=torch.float32)
    c = launch_config(D, 8)
    cols = triton.cdiv(D, c.block_cols)
    launch(
        _text_stem_bwd_kernel_chunks, (len(partial), cols), grad_out, sorted_ids, order, partial,
        C, D=D, CHUNK=CHUNK, BLOCK_C=c.block_rows, BLOCK_D=c.block_cols, num_warps=4,
    )  # fmt: skip
    launch(
        _text_stem_bwd_kernel, (triton.cdiv(size, c.block_rows), cols), grad_out, order, bounds,
        partial, grad, size, D=D, CHUNK=CHUNK, BLOCK_V=c.block_rows, BLOCK_D=c.block_cols,
        num_warps=4,
    )  # fmt: skip
    return grad
