"""Triton kernel of next_embedding_loss: the error pass between the products.

Bound by memory: product and target are read once, the gradient is written once. Programs own a
block of columns and walk over row tiles, so the column sums (gradient of the bias) stay in
registers and leave as one row of partial sums a program; no atomics. Rows of the product are read
and written up to their stride, of whole 16 bytes: a mask at an odd number of columns would make
every access one element wide. So would a number of columns that is not a constant, for the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.linear_loss import Outputs
from uml_fast.kernels.triton.launch import launch, processors
from uml_fast.kernels.triton.linear_loss import run
from uml_fast.kernels.triton.rounding import store_rounded


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program and programs along the rows."""

    block_rows: int
    block_cols: int
    strips: int
    num_warps: int


def launch_config(rows: int, cols: int) -> LaunchConfig:
    """16 elements a thread in 4 warps, for two sums and three streams in 128 registers.

    64 columns are 128 bytes of bf16, a whole transaction; narrower layers get more rows. Four
    programs fit a processor at 128 registers and keep 48 kB of loads in flight on it, twice what
    4.3 TB/s at a latency of 700 ns ask of each of 132.
    """
    block_cols = min(max(triton.next_power_of_2(cols), 16), 64)
    block_rows = 2048 // block_cols
    blocks = triton.cdiv(cols, block_cols)
    strips = min(triton.cdiv(rows, block_rows), max(4 * processors() // blocks, 1))
    return LaunchConfig(block_rows, block_cols, strips, 4)


@triton.jit
def _next_embedding_loss_fwd_kernel(
    product_ptr, bias_ptr, target_ptr, predicts_ptr, error_ptr, column_ptr, rows, stride, first,
    shift, COLS: tl.constexpr, HAS_GRAD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    strips = tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    bias = tl.load(bias_ptr + col, mask=col < COLS, other=0.0).to(tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    columns = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for tile in range(strip, tl.cdiv(rows, BLOCK_R), strips):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
        counts = tl.load(predicts_ptr + first + row, mask=row < rows, other=0) != 0
        inside = counts & (col < COLS)
        at = row * stride + col
        product = tl.load(product_ptr + at, mask=counts & (col < stride), other=0.0).to(tl.float32)
        target = tl.load(
            target_ptr + (first + shift + row) * COLS + col, mask=inside, other=0.0
        ).to(tl.float32)
        error = tl.where(inside, product + bias - target, 0.0)
        squares += error * error
        if HAS_GRAD:
            grad = 2.0 * error
            columns += grad
            store_rounded(product_ptr + at, grad, (row < rows) & (col < stride))
    tl.store(error_ptr + strip * tl.num_programs(1) + tl.program_id(1), tl.sum(squares))
    if HAS_GRAD:
        out = strip * COLS + col
        tl.store(column_ptr + out, tl.sum(columns, 0, keep_dims=True), mask=col < COLS)


def fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """Loss, scale and the gradients without scale."""
    has_grad = needs_hidden or needs_weight
    counts = predicts.view(torch.uint8)

    def chunk_pass(product: Tensor, first: int) -> tuple[Tensor, Tensor]:
        rows, cols = product.shape
        c = launch_config(rows, cols)
        blocks = triton.cdiv(cols, c.block_cols)
        errors = bias.new_empty(c.strips, blocks, dtype=torch.float32)
        columns = bias.new_empty(c.strips if has_grad else 0, cols, dtype=torch.float32)
        launch(
            _next_embedding_loss_fwd_kernel, (c.strips, blocks), product, bias, target, counts,
            errors, columns, rows, product.stride(0), first, shift, COLS=cols, HAS_GRAD=has_grad,
            BLOCK_R=c.block_rows, BLOCK_F=c.block_cols, num_warps=c.num_warps,
        )  # fmt: skip
        return errors, columns

    return run(
        chunk_pass, 1 / max(len(weight), 1), hidden, weight, bias, predicts, shift, needs_hidden,
        needs_weight,
    )  # fmt: skip
