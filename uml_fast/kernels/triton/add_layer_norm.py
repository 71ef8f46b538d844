"""Triton kernels of add_layer_norm.

Both passes hold whole rows in registers. Backward is persistent: each program walks over its rows
and sums the gradients of weight and bias in registers; a second kernel adds the programs' partial
sums in order, so that the result does not depend on timing. No column sum goes through memory but
these few hundred rows of partial sums, which is where torch.compile loses half the bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.rng import keep_scale, threshold
from uml_fast.kernels.triton.column_sum import sum_partials
from uml_fast.kernels.triton.launch import launch, processors
from uml_fast.kernels.triton.rng import keep_mask, site_key

MAX_COLS = 8192
"""Columns of a row that registers hold."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program."""

    block_rows: int
    block_cols: int
    num_warps: int


def launch_config(cols: int, elements_per_thread: int) -> LaunchConfig:
    """About this many elements a thread: forward 16, backward 8, as it keeps five rows alive."""
    block_cols = max(triton.next_power_of_2(cols), 16)
    num_warps = min(max(block_cols // (32 * elements_per_thread), 4), 16)
    block_rows = max(num_warps * 32 * elements_per_thread // block_cols, 1)
    return LaunchConfig(block_rows, block_cols, num_warps)


@triton.jit
def _branch(input_ptr, at, inside, row, col, K, key, threshold, SCALE: tl.constexpr,
            DROP: tl.constexpr):  # fmt: skip
    """dropout(input) and the factors that made it."""
    x = tl.load(input_ptr + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full(x.shape, 1.0, tl.float32)
    if DROP:
        factor = tl.where(keep_mask(key, row, col, K, threshold), SCALE, 0.0)
    return x * factor, factor


@triton.jit
def _add_layer_norm_fwd_kernel(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, summed_ptr, statistics_ptr,
    rng_key_ptr, T, K, eps, site, threshold, SCALE: tl.constexpr, DROP: tl.constexpr,
    HAS_SUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    inside = (row < T) & (col < K)
    at = row * K + col
    key = site_key(rng_key_ptr, site) if DROP else 0
    branch, _ = _branch(input_ptr, at, inside, row, col, K, key, threshold, SCALE, DROP)
    x = branch + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1, keep_dims=True) / K
    centred = tl.where(col < K, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / K + eps)
    weight = tl.load(weight_ptr + col, mask=col < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < K, other=0.0).to(tl.float32)
    normed = centred * rstd * weight + bias
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    if HAS_SUM:
        tl.store(summed_ptr + at, x.to(summed_ptr.dtype.element_ty), mask=inside)
    tl.store(statistics_ptr + row, mean, mask=row < T)
    tl.store(statistics_ptr + T + row, rstd, mask=row < T)


@triton.jit
def _add_layer_norm_bwd_kernel(
    grad_normed_ptr, grad_summed_ptr, input_ptr, residual_ptr, weight_ptr, statistics_ptr,
    grad_input_ptr, grad_residual_ptr, partial_ptr, rng_key_ptr, T, K, site, threshold,
    SCALE: tl.constexpr, DROP: tl.constexpr, HAS_SUM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK_K)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < K, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    grad_bias = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    key = site_key(rng_key_ptr, site) if DROP else 0
    for block in range(program, tl.cdiv(T, BLOCK_T), programs):
        row = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        inside = (row < T) & (col < K)
        at = row * K + col
        branch, factor = _branch(input_ptr, at, inside, row, col, K, key, threshold, SCALE, DROP)
        x = branch + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(statistics_ptr + T + row, mask=row < T, other=0.0)
        normal = tl.where(inside, (x - mean) * rstd, 0.0)
        grad = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_weight += grad * normal
        grad_bias += grad
        grad *= weight
        along = tl.sum(grad * normal, 1, keep_dims=True) / K
        shift = tl.sum(grad, 1, keep_dims=True) / K
        grad_x = (grad - shift - normal * along) * rstd
        if HAS_SUM:
            grad_x += tl.load(grad_summed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_residual_ptr + at, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        tl.store(
            grad_input_ptr + at, (grad_x * factor).to(grad_input_ptr.dtype.element_ty), mask=inside
        )
    out = program * 2 * K + tl.arange(0, BLOCK_K)
    here = tl.arange(0, BLOCK_K) < K
    tl.store(partial_ptr + out, tl.sum(grad_weight, 0), mask=here)
    tl.store(partial_ptr + out + K, tl.sum(grad_bias, 0), mask=here)


def fwd(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, summed, statistics fp32 (2, T)); without ``return_sum`` summed is empty.

    Raises:
        ValueError: more columns than MAX_COLS.
    """
    T, K = input.shape
    if K > MAX_COLS:
        raise ValueError(f"add_layer_norm: {K} columns; at most {MAX_COLS} fit on CUDA")
    normed = torch.empty_like(input)
    summed = torch.empty_like(residual) if return_sum else residual.new_empty(0)
    statistics = input.new_empty(2, T, dtype=torch.float32)
    c = launch_config(K, 16)
    launch(
        _add_layer_norm_fwd_kernel, (triton.cdiv(T, c.block_rows),), input, residual, weight, bias,
        normed, summed, statistics, rng_key, T, K, eps, site, threshold(dropout_p),
        SCALE=keep_scale(dropout_p), DROP=dropout_p > 0, HAS_SUM=return_sum, BLOCK_T=c.block_rows,
        BLOCK_K=c.block_cols, num_warps=c.num_warps,
    )  # fmt: skip
    return normed, summed, statistics


def bwd(
    grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
    weight: Tensor, statistics: Tensor, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, residual, weight (fp32) and bias (fp32)."""
    T, K = input.shape
    grad_input, grad_residual = torch.empty_like(input), torch.empty_like(residual)
    c = launch_config(K, 8)
    programs = max(min(triton.cdiv(T, c.block_rows), 4 * processors()), 1)
    partial = input.new_empty(programs, 2 * K, dtype=torch.float32)
    launch(
        _add_layer_norm_bwd_kernel, (programs,), grad_normed, grad_summed, input, residual, weight,
        statistics, grad_input, grad_residual, partial, rng_key, T, K, site, threshold(dropout_p),
        SCALE=keep_scale(dropout_p), DROP=dropout_p > 0, HAS_SUM=grad_summed is not None,
        BLOCK_T=c.block_rows, BLOCK_K=c.block_cols, num_warps=c.num_warps,
    )  # fmt: skip
    grad_affine = sum_partials(partial)
    return grad_input, grad_residual, grad_affine[:K], grad_affine[K:]
