"""Triton kernels of feed_forward: each product that makes a wide tensor, with what follows it.

Forward is ``input up^T`` with bias, activation and dropout in its epilogue, backward ``grad_out
down`` with the slope of the activation and the mask in its epilogue and the column sums of its rows
as partial sums of the bias gradient. The other products are cuBLAS's. So a wide tensor is written
once by the kernel that makes it.

Roofs of these two kernels on H200 in bf16, microseconds: bytes at 4.3 TB/s, FLOPs at 790 TFLOP/s
and, not measured, the operands of 128 x 128 tiles (K / 64 bytes for every byte of a product) at 7
TB/s of the second-level cache. The largest is what to expect.

    (T, K, N)                     forward: bytes FLOPs cache    backward: bytes FLOPs cache
    (1216, 40, 2048) relu                    1.2   0.3   0.4               2.4   0.3   0.4
    (4864, 150, 2048) relu                   5.1   3.8   6.7               9.8   3.8   6.7
    (4864, 300, 2048) relu                   5.6   7.6    13                10   7.6    13
    (65536, 384, 1536) gelu                  106    98   173               106    98   173
    (65536, 768, 3072) gelu                  212   391   690               213   391   690
    (65536, 1024, 4096) gelu                 283   696  1230               285   696  1230
    (65536, 1024, 2736) swiglu               284   930  1640               369   465  1230
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.rng import keep_scale, threshold
from uml_fast.kernels.triton.dot import dot
from uml_fast.kernels.triton.launch import arch, launch, processors
from uml_fast.kernels.triton.partial_sum import partial_sum
from uml_fast.kernels.triton.rng import keep_mask, site_key
from uml_fast.kernels.triton.rounding import store_rounded

ACTIVATIONS = {"relu": 0, "gelu": 1, "swiglu": 2}
RELU = tl.constexpr(0)
SWIGLU = tl.constexpr(2)
GROUP_ROWS = tl.constexpr(8)
"""Row blocks that walk over the columns together, so that their operands stay in the cache."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program, its steps along the inner dimension, and its pipeline."""

    block_rows: int
    block_cols: int
    block_inner: int
    num_warps: int
    num_stages: int


def launch_config(
    rows: int, cols: int, inner: int, dtype: torch.dtype, is_wide: bool = False
) -> LaunchConfig:
    """The tile of a (rows, inner) x (inner, cols) product with an epilogue.

    16-bit: 128 x 128 with 8 warps. Its 64 accumulators a thread, with an epilogue of part of them
    at a time, stay within 128 registers, so that two programs share a processor (Hopper and later)
    and the epilogue of one (an exponential and a hash an element, and all stores) runs under the
    products of the other. 128 x 256 would read three quarters of the operands, but alone on its
    processor, with nothing to hide an epilogue that at K = 768 takes about 4 us of 15 (counted, not
    measured): no gain up to K = 1024. The stages of both fit into shared memory: 3 of 64 columns
    take 96 KB on Hopper, 4 of 32 columns 64 KB on Ampere. Steps of 32 where 64 would pad the inner
    dimension by another 32. An epilogue with two outputs and two inputs (``is_wide``) takes half
    the columns. Fewer tiles than processors: a quarter of the tile.

    fp32 multiplies without tensor cores (C5: three TF32 products err more than twice plain fp32 on
    short inner dimensions), with what registers hold.
    """
    if dtype == torch.float32:
        return LaunchConfig(64, 64, 16 if inner <= 16 else 32, 4, 2)
    step = 16 if inner <= 16 else 32 if -inner % 64 >= 32 or arch() < 90 else 64
    stages = 3 if step == 64 else 4
    if triton.cdiv(rows, 128) * triton.cdiv(cols, 128) < processors():
        return LaunchConfig(64, 64, step, 4, stages)
    return LaunchConfig(128, 64 if is_wide else 128, step, 8, stages)


@triton.jit
def _tile(row_blocks, col_blocks):
    """Row block and column block of this program, in grouped order."""
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * col_blocks)
    rows = tl.minimum(row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    inside = program % (GROUP_ROWS * col_blocks)
    return group * GROUP_ROWS + inside % rows, inside // rows


@triton.jit
def _product(
    a_ptr, rows, b_ptr, b_at, b_inside, INNER: tl.constexpr, INNER_STRIDE: tl.constexpr,
    EVEN_COLS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 (BLOCK_T, BLOCK_N): rows of a (rows, INNER) times columns of b that start at b_at.

    Rows beyond the last repeat it, which spares their mask; columns outside are zero.
    """
    row = tl.minimum(tl.arange(0, BLOCK_T), rows - 1)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (row[:, None] * INNER + k[None, :])
    b_ptrs = b_ptr + (k[:, None] * INNER_STRIDE + b_at[None, :])
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        if INNER % BLOCK_K == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=k[None, :] < INNER - start, other=0.0)
        if INNER % BLOCK_K == 0 and EVEN_COLS:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(k[:, None] < INNER - start) & b_inside[None, :], other=0.0)
        total = dot(a, b, total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * INNER_STRIDE
    return total


@triton.jit
def _normal(x):
    """Distribution function and density of the standard normal, absolute error below 2e-7.

    Abramowitz, Stegun 7.1.26, as on the CPU: half the instructions of an error function.
    """
    z = 0.707106781 * tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * z)
    e = tl.exp(-z * z)
    p = 1.061405429 * t - 1.453152027
    p = p * t + 1.421413741
    p = p * t - 0.284496736
    p = p * t + 0.254829592
    tail = 0.5 * p * t * e
    return tl.where(x < 0.0, tail, 1.0 - tail), 0.398942280 * e


@triton.jit
def _keep(x, row, col, N, key, threshold, SCALE: tl.constexpr, DROP: tl.constexpr):
    """dropout(x)"""
    if DROP:
        x *= tl.where(keep_mask(key, row, col, N, threshold), SCALE, 0.0)
    return x


@triton.jit
def _halves(x):
    """Left and right columns of a tile; an epilogue of part of a tile needs fewer registers."""
    return tl.split(tl.permute(x.reshape(x.shape[0], 2, x.shape[1] // 2), (0, 2, 1)))


@triton.jit
def _activate(
    pre, first_row, rows, first_unit, bias_ptr, hidden_ptr, product_ptr, key, threshold,
    N: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Writes hidden, and the product with its bias where it is saved, from ``first_unit`` on.

    Pointers are those of ``first_row``.
    """
    TURNS: tl.constexpr = 2 if ACTIVATION == SWIGLU else 1
    UNITS: tl.constexpr = pre.shape[1] // TURNS
    n = tl.arange(0, pre.shape[1])
    unit = first_unit + n // TURNS
    bias = tl.load(bias_ptr + unit + n % TURNS * N, mask=unit < N, other=0.0).to(tl.float32)
    pre += bias[None, :]
    row = tl.arange(0, pre.shape[0])[:, None]
    col = first_unit + tl.arange(0, UNITS)[None, :]
    inside = (row < rows) & (col < N)
    if ACTIVATION == RELU:
        hidden = tl.where(pre < 0.0, 0.0, pre)
    elif ACTIVATION == SWIGLU:
        gate, value = tl.split(pre.reshape(pre.shape[0], UNITS, 2))
        at = row * (2 * N) + col
        store_rounded(product_ptr + at, gate, inside)
        store_rounded(product_ptr + (at + N), value, inside)
        hidden = gate * tl.sigmoid(gate) * value
    else:
        store_rounded(product_ptr + (row * N + col), pre, inside)
        hidden = pre * _normal(pre)[0]
    hidden = _keep(hidden, first_row + row, col, N, key, threshold, SCALE, DROP)
    store_rounded(hidden_ptr + (row * N + col), hidden, inside)


@triton.jit
def _feed_forward_fwd_kernel(
    input_ptr, weight_ptr, bias_ptr, hidden_ptr, product_ptr, rng_key_ptr, T, site, threshold,
    K: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr,
    DROP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A gated tile computes gates and values of its units in turn, so that both end up in one
    # thread.
    TURNS: tl.constexpr = 2 if ACTIVATION == SWIGLU else 1
    UNITS: tl.constexpr = BLOCK_N // TURNS
    row_block, col_block = _tile(tl.cdiv(T, BLOCK_T), tl.cdiv(N, UNITS))
    first_row = row_block.to(tl.int64) * BLOCK_T
    rows = T - row_block * BLOCK_T
    first_unit = col_block * UNITS
    n = tl.arange(0, BLOCK_N)
    column = first_unit + n // TURNS
    pre = _product(
        input_ptr + first_row * K, rows, weight_ptr, (column + n % TURNS * N) * K, column < N, K, 1,
        N % UNITS == 0, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    hidden_ptr += first_row * N
    product_ptr += first_row * TURNS * N
    key = site_key(rng_key_ptr, site) if DROP else 0
    left, right = _halves(pre)
    for half in tl.static_range(2):
        a, b = _halves(left if half == 0 else right)
        unit = first_unit + half * (UNITS // 2)
        _activate(a, first_row, rows, unit, bias_ptr, hidden_ptr, product_ptr, key, threshold, N,
                  ACTIVATION, SCALE, DROP)  # fmt: skip
        _activate(b, first_row, rows, unit + UNITS // 4, bias_ptr, hidden_ptr, product_ptr, key,
                  threshold, N, ACTIVATION, SCALE, DROP)  # fmt: skip


@triton.jit
def _differentiate(
    grad, first_row, rows, first_unit, saved_ptr, grad_ptr, partial_ptr, key, threshold,
    N: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the product and its column sums, from ``first_unit`` on.

    Pointers are those of ``first_row`` and of its block's partial sums.
    """
    row = tl.arange(0, grad.shape[0])[:, None]
    unit = first_unit + tl.arange(0, grad.shape[1])
    col = unit[None, :]
    inside = (row < rows) & (col < N)
    at = row * N + col
    grad = tl.where(row < rows, grad, 0.0)
    if ACTIVATION == RELU:
        hidden = tl.load(saved_ptr + at, mask=inside, other=0.0)
        grad = tl.where(hidden > 0.0, grad * SCALE, 0.0)
    else:
        grad = _keep(grad, first_row + row, col, N, key, threshold, SCALE, DROP)
    if ACTIVATION == SWIGLU:
        at += row * N
        gate = tl.load(saved_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(saved_ptr + (at + N), mask=inside, other=0.0).to(tl.float32)
        slope = tl.sigmoid(gate)
        grad_value = grad * gate * slope
        store_rounded(grad_ptr + (at + N), grad_value, inside)
        tl.store(partial_ptr + (unit + N), tl.sum(grad_value, 0), mask=unit < N)
        grad *= value * slope * (1.0 + gate * (1.0 - slope))
    elif ACTIVATION != RELU:
        pre = tl.load(saved_ptr + at, mask=inside, other=0.0).to(tl.float32)
        cdf, density = _normal(pre)
        grad *= cdf + pre * density
    store_rounded(grad_ptr + at, grad, inside)
    tl.store(partial_ptr + unit, tl.sum(grad, 0), mask=unit < N)


@triton.jit
def _feed_forward_bwd_kernel(
    grad_out_ptr, weight_ptr, saved_ptr, grad_ptr, partial_ptr, rng_key_ptr, T, site, threshold,
    K: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr,
    DROP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PRODUCT_COLS: tl.constexpr = 2 * N if ACTIVATION == SWIGLU else N
    row_block, col_block = _tile(tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N))
    first_row = row_block.to(tl.int64) * BLOCK_T
    rows = T - row_block * BLOCK_T
    first_unit = col_block * BLOCK_N
    col = first_unit + tl.arange(0, BLOCK_N)
    grad = _product(
        grad_out_ptr + first_row * K, rows, weight_ptr, col, col < N, K, N, N % BLOCK_N == 0,
        BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    saved_ptr += first_row * PRODUCT_COLS
    grad_ptr += first_row * PRODUCT_COLS
    partial_ptr += row_block.to(tl.int64) * PRODUCT_COLS
    key = site_key(rng_key_ptr, site) if DROP else 0
    left, right = _halves(grad)
    for half in tl.static_range(2):
        a, b = _halves(left if half == 0 else right)
        unit = first_unit + half * (BLOCK_N // 2)
        _differentiate(a, first_row, rows, unit, saved_ptr, grad_ptr, partial_ptr, key, threshold,
                       N, ACTIVATION, SCALE, DROP)  # fmt: skip
        _differentiate(b, first_row, rows, unit + BLOCK_N // 4, saved_ptr, grad_ptr, partial_ptr,
                       key, threshold, N, ACTIVATION, SCALE, DROP)  # fmt: skip


def fwd(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor,
    activation: str, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, hidden, product with its bias or, for relu, nothing)."""
    T, K = input.shape
    P, N = len(weight_up), weight_down.shape[1]
    hidden = input.new_empty(T, N)
    product = input.new_empty(0) if activation == "relu" else input.new_empty(T, P)
    c = launch_config(T, P, K, input.dtype)
    tiles = triton.cdiv(T, c.block_rows) * triton.cdiv(P, c.block_cols)
    launch(
        _feed_forward_fwd_kernel, (tiles,), input, weight_up, bias_up, hidden, product, rng_key, T,
        site, threshold(dropout_p), K=K, N=N, ACTIVATION=ACTIVATIONS[activation],
        SCALE=keep_scale(dropout_p), DROP=dropout_p > 0, BLOCK_T=c.block_rows,
        BLOCK_N=c.block_cols, BLOCK_K=c.block_inner, num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    out = torch.addmm(bias_down.to(input.dtype), hidden, weight_down.t())
    return out, hidden, product


def bwd(
    grad_out: Tensor, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
    hidden: Tensor, product: Tensor, activation: str, dropout_p: float, rng_key: Tensor | None,
    site: int, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight_up, bias_up (fp32), weight_down and bias_down (fp32).

    Those of frozen weights (``trains`` False) are empty.
    """
    T, N = hidden.shape
    P = len(weight_up)
    c = launch_config(T, N, grad_out.shape[1], input.dtype, is_wide=activation == "swiglu")
    row_blocks = triton.cdiv(T, c.block_rows)
    grad = input.new_empty(T, P)
    partial = input.new_empty(row_blocks, P, dtype=torch.float32)
    launch(
        _feed_forward_bwd_kernel, (row_blocks * triton.cdiv(N, c.block_cols),), grad_out,
        weight_down, hidden if activation == "relu" else product, grad, partial, rng_key, T, site,
        threshold(dropout_p), K=grad_out.shape[1], N=N, ACTIVATION=ACTIVATIONS[activation],
        SCALE=keep_scale(dropout_p), DROP=dropout_p > 0, BLOCK_T=c.block_rows,
        BLOCK_N=c.block_cols, BLOCK_K=c.block_inner, num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    grad_input = torch.mm(grad, weight_up)
    if not trains:
        none = [grad.new_empty(0) for _ in range(4)]
        return grad_input, none[0], none[1], none[2], none[3]
    grad_up = torch.mm(grad.t(), input)
    grad_down = torch.mm(grad_out.t(), hidden)
    grad_bias_down = grad_out.sum(0, dtype=torch.float32)
    return grad_input, grad_up, partial_sum(partial), grad_down, grad_bias_down
