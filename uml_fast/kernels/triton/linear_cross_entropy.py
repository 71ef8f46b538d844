"""Triton kernel of linear_cross_entropy: a row of logits becomes its loss and its gradient.

Bound by memory. A program owns whole rows and passes over them twice: largest logit and sum of
exponentials online, then the gradient in place. The second read comes from the second-level cache,
so few rows are under way at once: two blocks of 32 warps a processor, 26 MB of 50 at 132 processors
and rows of 50k classes in bf16. Rows are read and written up to their stride, of whole 16 bytes (a
mask at an odd number of classes would make every access one element wide); the bias of what lies
behind the last class is minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.linear_loss import Outputs
from uml_fast.kernels.triton.launch import launch
from uml_fast.kernels.triton.linear_loss import ROW_ALIGN, run
from uml_fast.kernels.triton.rounding import store_rounded


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program."""

    block_rows: int
    block_cols: int
    num_warps: int


def launch_config(cols: int, element_bytes: int) -> LaunchConfig:
    """32 bytes a thread, at most 32 warps; rows of few classes share a program."""
    block_cols = min(max(triton.next_power_of_2(cols), 16), 32768 // element_bytes)
    block_rows = max(1024 // block_cols, 1)
    num_warps = block_rows * block_cols * element_bytes // 1024
    return LaunchConfig(block_rows, block_cols, num_warps)


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    logits_ptr, bias_ptr, target_ptr, predicts_ptr, error_ptr, rows, cols, stride, first, shift,
    HAS_GRAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    counts = tl.load(predicts_ptr + first + row, mask=row < rows, other=0) != 0
    label = tl.load(target_ptr + first + shift + row, mask=counts, other=0)
    is_class = (label >= 0) & (label < cols)
    most = tl.full((BLOCK_R, 1), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_R, 1), tl.float32)
    picked = tl.zeros((BLOCK_R, 1), tl.float32)
    for start in range(0, cols, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)[None, :]
        inside = counts & (col < stride)
        logit = tl.load(logits_ptr + row * stride + col, mask=inside, other=0.0).to(tl.float32)
        logit += tl.load(bias_ptr + col, mask=col < stride, other=float("-inf"))
        higher = tl.maximum(most, tl.max(logit, 1, keep_dims=True))
        # a block of classes may be shut off by biases of -inf
        centre = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(most - centre) + tl.sum(tl.exp(logit - centre), 1, keep_dims=True)
        picked += tl.sum(tl.where(col == label, logit, 0.0), 1, keep_dims=True)
        most = higher
    # the largest logit stays apart: it is exact, its sum with log(mass) would not be
    scale = tl.where(is_class, 1.0 / mass, float("nan"))
    error = tl.where(is_class, tl.log(mass) + (most - picked), float("nan"))
    tl.store(error_ptr + program, tl.sum(tl.where(counts, error, 0.0)))
    if HAS_GRAD:
        for start in range(0, cols, BLOCK_V):
            col = start + tl.arange(0, BLOCK_V)[None, :]
            at = row * stride + col
            logit = tl.load(logits_ptr + at, mask=counts & (col < stride), other=0.0).to(tl.float32)
            logit += tl.load(bias_ptr + col, mask=col < stride, other=0.0)
            grad = tl.exp(logit - most) * scale - tl.where(col == label, 1.0, 0.0)
            grad = tl.where(counts & (col < cols), grad, 0.0)
            store_rounded(logits_ptr + at, grad, (row < rows) & (col < stride))


def fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    needs_hidden: bool, needs_weight: bool,
) -> Outputs:  # fmt: skip
    """Loss, scale and the gradients without scale."""
    counts = predicts.view(torch.uint8)
    padding = -len(bias) % ROW_ALIGN
    padded = torch.nn.functional.pad(bias.float(), (0, padding), value=float("-inf"))

    def chunk_pass(product: Tensor, first: int) -> tuple[Tensor, Tensor]:
        rows, cols = product.shape
        c = launch_config(cols, product.element_size())
        programs = triton.cdiv(rows, c.block_rows)
        errors = bias.new_empty(programs, dtype=torch.float32)
        launch(
            _linear_cross_entropy_fwd_kernel, (programs,), product, padded, target, counts, errors,
            rows, cols, product.stride(0), first, shift, HAS_GRAD=needs_hidden or needs_weight,
            BLOCK_R=c.block_rows, BLOCK_V=c.block_cols, num_warps=c.num_warps,
        )  # fmt: skip
        return errors, product

    return run(
        chunk_pass, 1.0, hidden, weight, bias, predicts, shift, needs_hidden, needs_weight
    )  # fmt: skip
