"""Triton kernels of add_layer_norm and, without a bias, of add_rms_norm.

Both passes hold whole rows in registers. Backward is persistent: each program walks over its rows
and sums the gradients of weight and bias in registers; a second kernel adds the programs' partial
sums in order, so that the result does not depend on timing. No column sum goes through memory but
these few hundred rows of partial sums, which is where torch.compile loses half the bandwidth. The
rows to come are copied to shared memory while a row is worked on (``num_stages``), as a program
that waited for its own loads would leave memory idle during its row sums.

The number of columns is a constant: rows of 150 bf16 then load 4 bytes at a time, not 2, and those
of 384 load 16. Weight and bias are loaded once a row of the tile, not once a tile, so that they
have the tile's layout; another costs a trip of the whole tile through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.add_norm import has_one_gradient
from uml_fast.kernels.rng import keep_scale, threshold
from uml_fast.kernels.triton.launch import launch, processors
from uml_fast.kernels.triton.partial_sum import partial_sum
from uml_fast.kernels.triton.rng import keep_factors, site_key
from uml_fast.kernels.triton.rounding import store_rounded

MAX_COLS = 8192
"""Columns of a row that registers hold."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program."""

    block_rows: int
    block_cols: int
    num_warps: int
    programs_per_processor: int
    num_stages: int


def launch_config(cols: int, elements_per_thread: int, element_bytes: int = 0) -> LaunchConfig:
    """About this many elements a thread: forward 16, backward 8, as it keeps five rows alive.

    Backward reads ``element_bytes`` an element of the tile. 4.3 TB/s at a latency of 0.8 us are
    26 KB in flight on each of 132 processors; twice that is aimed at, by 16 warps a processor and
    two or three tiles under way for each program, as far as 160 KB of shared memory hold them.
    More programs would only make more partial sums.
    """
    block_cols = max(triton.next_power_of_2(cols), 16)
    num_warps = min(max(block_cols // (32 * elements_per_thread), 4), 16)
    block_rows = max(num_warps * 32 * elements_per_thread // block_cols, 1)
    programs = 16 // num_warps
    row_bytes = programs * block_rows * element_bytes
    wanted = 2 if row_bytes * cols > 26 * 1024 else 3
    under_way = max(min(wanted, 160 * 1024 // max(row_bytes * block_cols, 1)), 1)
    return LaunchConfig(block_rows, block_cols, num_warps, programs, 1 + under_way)


@triton.jit
def _branch(input_ptr, at, inside, row, K, key, threshold, SCALE: tl.constexpr, DROP: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """dropout(input) and the factors that made it."""
    x = tl.load(input_ptr + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full(x.shape, 1.0, tl.float32)
    if DROP:
        pair = tl.arange(0, BLOCK_K // 2)[None, :]
        factor = keep_factors(key, row, pair, K, threshold, SCALE)
    return x * factor, factor


@triton.jit
def _add_layer_norm_fwd_kernel(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, summed_ptr, statistics_ptr,
    rng_key_ptr, T, eps, site, threshold, K: tl.constexpr, IS_RMS: tl.constexpr,
    SCALE: tl.constexpr, DROP: tl.constexpr, HAS_SUM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    col = tl.broadcast_to(tl.arange(0, BLOCK_K)[None, :], (BLOCK_T, BLOCK_K))
    inside = (row < T) & (col < K)
    at = row * K + col
    key = site_key(rng_key_ptr, site) if DROP else 0
    branch, _ = _branch(input_ptr, at, inside, row, K, key, threshold, SCALE, DROP, BLOCK_K)
    x = branch + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centred = x
    if not IS_RMS:
        mean = tl.div_rn(tl.sum(x, 1, keep_dims=True), K * 1.0)  # a plain one is off by two units
        centred = tl.where(col < K, x - mean, 0.0)
        tl.store(statistics_ptr + row, mean, mask=row < T)
        statistics_ptr += T
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / K + eps)
    tl.store(statistics_ptr + row, rstd, mask=row < T)
    normed = centred * rstd * tl.load(weight_ptr + col, mask=col < K, other=0.0).to(tl.float32)
    if not IS_RMS:
        normed += tl.load(bias_ptr + col, mask=col < K, other=0.0).to(tl.float32)
    store_rounded(normed_ptr + at, normed, inside)
    if HAS_SUM:
        store_rounded(summed_ptr + at, x, inside)


@triton.jit
def _add_layer_norm_bwd_kernel(
    grad_normed_ptr, grad_summed_ptr, input_ptr, residual_ptr, weight_ptr, statistics_ptr,
    grad_input_ptr, grad_residual_ptr, partial_ptr, rng_key_ptr, T, site, threshold,
    K: tl.constexpr, IS_RMS: tl.constexpr, SCALE: tl.constexpr, DROP: tl.constexpr,
    HAS_SUM: tl.constexpr, SHARED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.broadcast_to(tl.arange(0, BLOCK_K)[None, :], (BLOCK_T, BLOCK_K))
    weight = tl.load(weight_ptr + col, mask=col < K, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    grad_bias = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    key = site_key(rng_key_ptr, site) if DROP else 0
    for block in tl.range(program, tl.cdiv(T, BLOCK_T), programs, num_stages=STAGES):
        row = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        inside = (row < T) & (col < K)
        at = row * K + col
        branch, factor = _branch(
            input_ptr, at, inside, row, K, key, threshold, SCALE, DROP, BLOCK_K
        )
        x = branch + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if IS_RMS:
            rstd = tl.load(statistics_ptr + row, mask=row < T, other=0.0)
            normal = x * rstd
        else:
            rstd = tl.load(statistics_ptr + T + row, mask=row < T, other=0.0)
            mean = tl.load(statistics_ptr + row, mask=row < T, other=0.0)
            normal = tl.where(col < K, (x - mean) * rstd, 0.0)
            grad_bias += grad
        grad_weight += grad * normal
        grad *= weight
        grad_x = grad - normal * (tl.sum(grad * normal, 1, keep_dims=True) / K)
        if not IS_RMS:
            grad_x -= tl.sum(grad, 1, keep_dims=True) / K
        grad_x *= rstd
        if HAS_SUM:
            grad_x += tl.load(grad_summed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        store_rounded(grad_residual_ptr + at, grad_x, inside)
        if not SHARED:
            store_rounded(grad_input_ptr + at, grad_x * factor, inside)
    here = tl.arange(0, BLOCK_K)
    if IS_RMS:
        tl.store(partial_ptr + program * K + here, tl.sum(grad_weight, 0), mask=here < K)
    else:
        partial_ptr += program * 2 * K
        tl.store(partial_ptr + here, tl.sum(grad_weight, 0), mask=here < K)
        tl.store(partial_ptr + K + here, tl.sum(grad_bias, 0), mask=here < K)


def fwd(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    dropout_p: float, rng_key: Tensor | None, site: int, return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, summed, statistics fp32 (2, T)); without ``return_sum`` summed is empty.

    Without ``bias`` the norm is the RMS norm, whose statistics are (1, T).

    Raises:
        ValueError: more columns than MAX_COLS.
    """
    T, K = input.shape
    if K > MAX_COLS:
        raise ValueError(f"add_layer_norm: {K} columns; at most {MAX_COLS} fit on CUDA")
    normed = torch.empty_like(input)
    summed = torch.empty_like(residual) if return_sum else residual.new_empty(0)
    statistics = input.new_empty(1 if bias is None else 2, T, dtype=torch.float32)
    c = launch_config(K, 16)
    launch(
        _add_layer_norm_fwd_kernel, (triton.cdiv(T, c.block_rows),), input, residual, weight, bias,
        normed, summed, statistics, rng_key, T, eps, site, threshold(dropout_p), K=K,
        IS_RMS=bias is None, SCALE=keep_scale(dropout_p), DROP=dropout_p > 0, HAS_SUM=return_sum,
        BLOCK_T=c.block_rows, BLOCK_K=c.block_cols, num_warps=c.num_warps,
    )  # fmt: skip
    return normed, summed, statistics


def bwd(
    grad_normed: Tensor, grad_summed: Tensor | None, input: Tensor, residual: Tensor,
    weight: Tensor, statistics: Tensor, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of input, residual, weight (fp32) and bias (fp32).

    That of input is None where it equals that of residual: one dtype and no dropout. That of bias
    is None for the RMS norm.
    """
    T, K = input.shape
    is_rms = len(statistics) == 1
    shared = has_one_gradient(input, residual, dropout_p)
    grad_input = None if shared else torch.empty_like(input)
    grad_residual = torch.empty_like(residual)
    read = [t for t in (grad_normed, grad_summed, input, residual) if t is not None]
    c = launch_config(K, 8, sum(t.element_size() for t in read))
    wanted = c.programs_per_processor * processors()
    programs = max(min(triton.cdiv(T, c.block_rows), wanted), 1)
    partial = input.new_empty(programs, K if is_rms else 2 * K, dtype=torch.float32)
    launch(
        _add_layer_norm_bwd_kernel, (programs,), grad_normed, grad_summed, input, residual, weight,
        statistics, grad_input, grad_residual, partial, rng_key, T, site, threshold(dropout_p),
        K=K, IS_RMS=is_rms, SCALE=keep_scale(dropout_p), DROP=dropout_p > 0,
        HAS_SUM=grad_summed is not None, SHARED=shared, BLOCK_T=c.block_rows,
        BLOCK_K=c.block_cols, STAGES=c.num_stages, num_warps=c.num_warps,
    )  # fmt: skip
    grad_affine = partial_sum(partial)
    return grad_input, grad_residual, grad_affine[:K], None if is_rms else grad_affine[K:]
