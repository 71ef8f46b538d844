"""Triton kernels of segment_mean.

The host does not know how long segments are, so the grid has a program for every *piece* of
``max_rows`` rows that there could be. Segment s owns the pieces from ``offsets[s] // max_rows + s``
on: enough for its rows, whatever the others' lengths, and never more than T // max_rows + S in all.
A program finds its segment by bisection (a dozen reads from the first-level cache). Pieces of
segments that are cut leave fp32 sums, which a second kernel adds in order: no atomics, the same
bits every time, and one read of the input whether there is one segment or thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.triton.launch import launch, processors
from uml_fast.kernels.triton.rounding import round_to, store_rounded


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program and the rows it walks over."""

    max_rows: int
    block_rows: int
    block_cols: int
    num_warps: int


def launch_config(rows: int, cols: int) -> LaunchConfig:
    """32 elements a thread: 8 KB in bf16 under way for each program, 48 KB for the six that a
    processor's registers hold, twice what its share of 4.3 TB/s needs.

    Pieces of 256 rows make the second kernel idle at lengths up to 256; where they would not fill
    the chip twice, 64.
    """
    block_cols = min(max(triton.next_power_of_2(cols), 16), 128)
    programs = rows // 256 * triton.cdiv(cols, block_cols)
    max_rows = 256 if programs >= 2 * processors() else 64
    return LaunchConfig(max_rows, min(4096 // block_cols, max_rows), block_cols, num_warps=4)


@triton.jit
def _piece(offsets_ptr, piece, S, steps, MAX_ROWS: tl.constexpr):
    """(segment, its first row, the row after its last, first row of the piece)."""
    low = 0
    high = S - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        here = tl.load(offsets_ptr + middle) // MAX_ROWS + middle <= piece
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    first = tl.load(offsets_ptr + low)
    last = tl.load(offsets_ptr + low + 1)
    return low, first, last, first + (piece - first // MAX_ROWS - low) * MAX_ROWS


@triton.jit
def _segment_mean_fwd_kernel(
    input_ptr, offsets_ptr, out_ptr, partial_ptr, S, steps, K: tl.constexpr,
    MAX_ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    segment, first, last, start = _piece(offsets_ptr, piece, S, steps, MAX_ROWS)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    stop = tl.minimum(start + MAX_ROWS, last)
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for block in range(start, stop, BLOCK_T):
        row = block + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        inside = (row < stop) & (col < K)
        total += tl.load(input_ptr + row * K + col, mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0, keep_dims=True)
    length = last - first
    if length <= MAX_ROWS:
        if start == first:
            mean = sums / tl.maximum(length, 1).to(tl.float32)
            at = segment.to(tl.int64) * K + col
            store_rounded(out_ptr + at, mean, col < K)
    elif start < last:
        tl.store(partial_ptr + piece.to(tl.int64) * K + col, sums, mask=col < K)


@triton.jit
def _segment_mean_fwd_kernel_pieces(
    partial_ptr, offsets_ptr, out_ptr, K: tl.constexpr, MAX_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    first = tl.load(offsets_ptr + segment)
    length = tl.load(offsets_ptr + segment + 1) - first
    if length > MAX_ROWS:
        col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        start = first // MAX_ROWS + segment
        stop = start + tl.cdiv(length, MAX_ROWS)
        total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
        for block in range(start, stop, BLOCK_P):
            piece = block + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
            inside = (piece < stop) & (col < K)
            total += tl.load(partial_ptr + piece * K + col, mask=inside, other=0.0)
        mean = tl.sum(total, 0, keep_dims=True) / length.to(tl.float32)
        at = segment.to(tl.int64) * K + col
        store_rounded(out_ptr + at, mean, col < K)


@triton.jit
def _segment_mean_bwd_kernel(
    grad_out_ptr, offsets_ptr, grad_input_ptr, S, steps, K: tl.constexpr, MAX_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    segment, first, last, start = _piece(offsets_ptr, piece, S, steps, MAX_ROWS)
    col = tl.broadcast_to(
        tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], (BLOCK_T, BLOCK_K)
    )
    stop = tl.minimum(start + MAX_ROWS, last)
    if start < stop:
        at = segment.to(tl.int64) * K + col
        grad = tl.load(grad_out_ptr + at, mask=col < K, other=0.0).to(tl.float32)
        grad = round_to(grad / (last - first).to(tl.float32), grad_input_ptr.dtype.element_ty)
        for block in range(start, stop, BLOCK_T):
            row = block + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
            tl.store(grad_input_ptr + row * K + col, grad, mask=(row < stop) & (col < K))


def fwd(input: Tensor, offsets: Tensor) -> Tensor:
    """Means (S, K)."""
    T, K = input.shape
    S = len(offsets) - 1
    c = launch_config(T, K)
    out = input.new_empty(S, K)
    pieces, blocks = T // c.max_rows + S, triton.cdiv(K, c.block_cols)
    partial = input.new_empty(pieces if c.max_rows < T else 0, K, dtype=torch.float32)
    launch(
        _segment_mean_fwd_kernel, (pieces, blocks), input, offsets, out, partial, S,
        (S - 1).bit_length(), K=K, MAX_ROWS=c.max_rows, BLOCK_T=c.block_rows, BLOCK_K=c.block_cols,
        num_warps=c.num_warps,
    )  # fmt: skip
    if c.max_rows < T:
        launch(
            _segment_mean_fwd_kernel_pieces, (S, blocks), partial, offsets, out, K=K,
            MAX_ROWS=c.max_rows, BLOCK_P=32, BLOCK_K=c.block_cols, num_warps=4,
        )  # fmt: skip
    return out


def bwd(grad_out: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Gradient of the input (T, K)."""
    S, K = grad_out.shape
    c = launch_config(rows, K)
    grad_input = grad_out.new_empty(rows, K)
    launch(
        _segment_mean_bwd_kernel, (rows // c.max_rows + S, triton.cdiv(K, c.block_cols)), grad_out,
        offsets, grad_input, S, (S - 1).bit_length(), K=K, MAX_ROWS=c.max_rows,
        BLOCK_T=c.block_rows, BLOCK_K=c.block_cols, num_warps=c.num_warps,
    )  # fmt: skip
    return grad_input
