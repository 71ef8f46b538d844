"""Triton kernels of the stems: raw rows to tokens in one product.

Raw rows (uint8 patches or fp32 features) are loaded as they are, become features in registers and
go into the product in the working dtype: they cross memory once, as bytes. Backward makes them
again as the right-hand side of grad^T features, split over rows into parts that are added in order.
Widths and features are constants, fixed for a model: rows of 300 floats then load 16 bytes a
thread, not 4. At ViT sizes both are bound by the tensor cores (2 C E D FLOPs against C E + 2 C D
bytes), below a width of about 200 by memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.linear_stem import Gradients
from uml_fast.kernels.triton.dot import dot
from uml_fast.kernels.triton.index_sum import fwd as index_sum
from uml_fast.kernels.triton.launch import launch, processors
from uml_fast.kernels.triton.partial_sum import partial_sum, split_count
from uml_fast.kernels.triton.rounding import round_to, store_rounded


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program: result rows and columns, steps of the sum."""

    block_rows: int
    block_cols: int
    block_depth: int
    num_warps: int
    num_stages: int


def _tile(size: int, widest: int) -> int:
    """128 columns, or 64 where that pads more than an eighth less."""
    if size <= 64:
        return max(triton.next_power_of_2(size), 16)
    wide, narrow = (triton.cdiv(size, b) * b for b in (128, 64))
    return min(128 if 8 * wide <= 9 * narrow else 64, widest)


def split_config(
    rows: int, cols: int, depth: int, dtype: torch.dtype, is_aligned: bool
) -> LaunchConfig:
    """Tiles of 128 x 128 x 64: 64 accumulators a thread leave room for the features on their way
    through registers. fp32 multiplies without tensor cores, where smaller tiles lose nothing:
    64 x 64 x 32. Half the depth where raw rows do not start at whole 16 bytes, as each element then
    has an address of its own; fp32 spills there with two stages."""
    widest, deepest, num_stages = (128, 64, 3)
    if dtype == torch.float32:
        widest, deepest, num_stages = 64, 32, 2 if is_aligned else 1
    if not is_aligned:
        deepest //= 2
    block_rows, block_cols = _tile(rows, widest), _tile(cols, widest)
    block_depth = min(max(triton.next_power_of_2(depth), 16), deepest)
    num_warps = 8 if block_rows * block_cols > (2048 if widest == 64 else 4096) else 4
    return LaunchConfig(block_rows, block_cols, block_depth, num_warps, num_stages)


def launch_config(raw: RawRows, cols: int, dtype: torch.dtype) -> LaunchConfig:
    """As where the sum is split, but rows are many, and 64 of them make a tile where 128 would
    leave processors idle. fp32 spills at a depth of 32 pixels, or of 16 with two stages."""
    c = split_config(max(raw.rows, 1), cols, raw.features, dtype, raw.is_aligned)
    if dtype == torch.float32:
        return replace(c, block_depth=16, num_stages=1) if raw.channels else c
    if raw.rows <= 64:
        return c
    wide = triton.cdiv(raw.rows, 128) * triton.cdiv(cols, c.block_cols)
    if wide < processors():
        return replace(c, block_rows=64, num_warps=4)
    return replace(c, block_rows=128, num_warps=8)


@dataclass(frozen=True, slots=True)
class RawRows:
    """Where the elements of raw rows lie and how they are normalised.

    Rows are contiguous, or patches of ``line`` bytes in images: then row r starts at
    ``r // period * image + r % period // across * band + r % period % across * line`` and element e
    lies ``e // line * line_stride + e % line`` behind it.
    """

    raw: Tensor
    mean: Tensor | None
    deviation: Tensor | None
    valid: Tensor | None
    rows: int
    features: int
    period: int = 1
    across: int = 1
    image: int = 0
    band: int = 0
    line_stride: int = 0
    line: int = 0
    """0: rows are contiguous."""
    channels: int = 0
    """Of pixels; 0: features."""

    @property
    def is_aligned(self) -> bool:
        """Whether 16 elements that follow each other can be loaded at once."""
        return (self.line or self.features) % 16 == 0

    def arguments(self, affine: Tensor | None) -> tuple[Any, ...]:
        """What the kernels take first."""
        return (
            self.raw, affine, self.valid, self.rows, self.period, self.across, self.image,
            self.band, self.line_stride,
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        return {
            "FEATURES": self.features,
            "LINE": self.line,
            "CHANNELS": self.channels,
            "HAS_MEAN": self.mean is not None,
            "HAS_VALID": self.valid is not None,
        }


@triton.jit
def _row_starts(row, period, across, image, band, FEATURES: tl.constexpr, LINE: tl.constexpr):
    if LINE == 0:
        return row.to(tl.int64) * FEATURES
    place = row % period
    start = place // across * band + place % across * LINE
    return (row // period).to(tl.int64) * image + start


@triton.jit
def _feature_tile(raw_ptr, affine_ptr, start, keep, col, cols, line_stride,
                  FEATURES: tl.constexpr, LINE: tl.constexpr, CHANNELS: tl.constexpr,
                  HAS_MEAN: tl.constexpr, HAS_VALID: tl.constexpr):  # fmt: skip
    """fp32 features of rows that begin at ``start``; zero in rows that are not valid, something
    finite in rows and columns beyond the last, which meet zeros in the product."""
    offset = col if LINE == 0 else col // LINE * line_stride + col % LINE
    inside = keep[:, None] & (col < FEATURES)[None, :]
    x = tl.load(raw_ptr + start[:, None] + offset[None, :], mask=inside, other=0).to(tl.float32)
    if HAS_MEAN:
        scale = tl.load(affine_ptr + col)[None, :]
        shift = tl.load(affine_ptr + cols + col)[None, :]
        x = x * scale + shift if CHANNELS > 0 else (x - shift) * scale
    if HAS_VALID:
        x = tl.where(keep[:, None], x, 0.0)
    return x


@triton.jit
def _prepare_kernel(weight_ptr, mean_ptr, deviation_ptr, cast_ptr, affine_ptr, cols,
                    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, HAS_MEAN: tl.constexpr,
                    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = col < FEATURES
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row.to(tl.int64) * FEATURES + col, mask=here, other=0.0)
        at = row.to(tl.int64) * cols + col
        store_rounded(cast_ptr + at, weight.to(tl.float32), col < cols)
    if HAS_MEAN and row == 0:
        place = col % CHANNELS if CHANNELS > 0 else col
        shift = tl.load(mean_ptr + place, mask=here, other=0.0).to(tl.float32)
        scale = 1.0 / tl.load(deviation_ptr + place, mask=here, other=1.0).to(tl.float32)
        if CHANNELS > 0:
            shift = -shift * scale
            scale = scale / 255.0
        tl.store(affine_ptr + col, scale, mask=col < cols)
        tl.store(affine_ptr + cols + col, shift, mask=col < cols)


@triton.jit
def _kept_rows(row, rows, valid_ptr, HAS_VALID: tl.constexpr):
    keep = row < rows
    if HAS_VALID:
        keep = keep & (tl.load(valid_ptr + row, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _linear_stem_fwd_kernel(
    raw_ptr, affine_ptr, valid_ptr, rows, period, across, image, band, line_stride,
    weight_ptr, bias_ptr, position_ptr, index_ptr, out_ptr, cols, P, D: tl.constexpr,
    FEATURES: tl.constexpr, LINE: tl.constexpr, CHANNELS: tl.constexpr, HAS_MEAN: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Programs of the same rows follow each other, so that the raw rows stay in the L2 cache.
    across_D = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // across_D * BLOCK_C + tl.arange(0, BLOCK_C)
    out_col = tl.program_id(0) % across_D * BLOCK_D + tl.arange(0, BLOCK_D)
    keep = _kept_rows(row, rows, valid_ptr, HAS_VALID)
    start = _row_starts(row, period, across, image, band, FEATURES, LINE)
    inside = (row < rows)[:, None] & (out_col < D)[None, :]
    # The sum starts from bias and position: added at its end, their addresses and the sums would
    # need twice the registers.
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    total += tl.load(bias_ptr + out_col, mask=out_col < D, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        place = tl.load(index_ptr + row, mask=row < rows, other=0) if HAS_INDEX else row % period
        place = tl.minimum(tl.maximum(place, 0), P - 1)
        entry = place[:, None].to(tl.int64) * D + out_col[None, :]
        total += tl.load(position_ptr + entry, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, FEATURES, BLOCK_E):
        col = first + tl.arange(0, BLOCK_E)
        x = _feature_tile(raw_ptr, affine_ptr, start, keep, col, cols, line_stride, FEATURES, LINE,
                          CHANNELS, HAS_MEAN, HAS_VALID)  # fmt: skip
        # 32 bits do: no weight has 2**31 elements.
        at = out_col[None, :] * cols + col[:, None]
        weight = tl.load(weight_ptr + at, mask=(out_col < D)[None, :], other=0.0)
        total = dot(round_to(x, weight.dtype), weight, total)
    at = row[:, None].to(tl.int64) * D + out_col[None, :]
    store_rounded(out_ptr + at, total, inside)


@triton.jit
def _linear_stem_bwd_kernel(
    raw_ptr, affine_ptr, valid_ptr, rows, period, across, image, band, line_stride,
    grad_ptr, partial_ptr, cols, blocks_per_split, D: tl.constexpr, FEATURES: tl.constexpr,
    LINE: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Programs of the same part follow each other, so that its rows stay in the L2 cache.
    across_E = tl.cdiv(FEATURES, BLOCK_E)
    col = tl.program_id(0) % across_E * BLOCK_E + tl.arange(0, BLOCK_E)
    grad_col = tl.program_id(0) // across_E * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    for block in range(blocks_per_split):
        row = (split * blocks_per_split + block) * BLOCK_C + tl.arange(0, BLOCK_C)
        keep = _kept_rows(row, rows, valid_ptr, HAS_VALID)
        start = _row_starts(row, period, across, image, band, FEATURES, LINE)
        x = _feature_tile(raw_ptr, affine_ptr, start, keep, col, cols, line_stride, FEATURES, LINE,
                          CHANNELS, HAS_MEAN, HAS_VALID)  # fmt: skip
        at = row[:, None].to(tl.int64) * D + grad_col[None, :]
        inside = (row < rows)[:, None] & (grad_col < D)[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        total = dot(tl.trans(grad), round_to(x, grad.dtype), total)
    at = (split * D + grad_col[:, None]).to(tl.int64) * FEATURES + col[None, :]
    inside = (grad_col < D)[:, None] & (col < FEATURES)[None, :]
    tl.store(partial_ptr + at, total, mask=inside)


def _prepare(
    raw: RawRows, weight: Tensor | None, cols: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(weight in ``dtype``, scale and shift of each feature fp32 (2, cols)), zeros up to ``cols``
    columns; in one launch, so that the product neither divides nor masks its weight."""
    D = 1 if weight is None else len(weight)
    cast = None if weight is None else weight.new_empty(D, cols, dtype=dtype)
    affine = None
    if raw.mean is not None:
        affine = raw.mean.new_empty(2, cols, dtype=torch.float32)
    if cast is not None or affine is not None:
        launch(
            _prepare_kernel, (D, triton.cdiv(cols, 512)), weight, raw.mean, raw.deviation, cast,
            affine, cols, FEATURES=raw.features, CHANNELS=raw.channels, HAS_MEAN=affine is not None,
            HAS_WEIGHT=cast is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return cast, affine


def fwd(
    raw: RawRows, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, dtype: torch.dtype, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D), in ``out`` if given."""
    D = len(weight)
    if out is None:
        out = weight.new_empty(raw.rows, D, dtype=dtype)
    c = launch_config(raw, D, dtype)
    cols = triton.cdiv(raw.features, c.block_depth) * c.block_depth
    cast, affine = _prepare(raw, weight, cols, dtype)
    launch(
        _linear_stem_fwd_kernel,
        (triton.cdiv(raw.rows, c.block_rows) * triton.cdiv(D, c.block_cols),),
        *raw.arguments(affine), cast, bias, position, position_index, out, cols,
        0 if position is None else len(position), D=D, **raw.constants(),
        HAS_POSITION=position is not None, HAS_INDEX=position_index is not None,
        BLOCK_C=c.block_rows, BLOCK_D=c.block_cols, BLOCK_E=c.block_depth, num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    return out


def _weight_gradient(grad_CD: Tensor, raw: RawRows) -> Tensor:
    """grad^T features, fp32 (D, E)."""
    D = grad_CD.shape[1]
    c = split_config(D, raw.features, raw.rows, grad_CD.dtype, raw.is_aligned)
    tiles = triton.cdiv(D, c.block_rows) * triton.cdiv(raw.features, c.block_cols)
    blocks = triton.cdiv(raw.rows, c.block_depth)
    per_split = max(triton.cdiv(blocks, split_count(tiles, blocks)), 1)
    splits = max(triton.cdiv(blocks, per_split), 1)
    cols = triton.cdiv(raw.features, c.block_cols) * c.block_cols
    _, affine = _prepare(raw, None, cols, grad_CD.dtype)
    partial = grad_CD.new_empty(splits, D, raw.features, dtype=torch.float32)
    launch(
        _linear_stem_bwd_kernel, (tiles, splits), *raw.arguments(affine), grad_CD, partial, cols,
        per_split, D=D, **raw.constants(), BLOCK_D=c.block_rows, BLOCK_E=c.block_cols,
        BLOCK_C=c.block_depth, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return partial_sum(partial)


def bwd(
    grad: Tensor, raw: RawRows, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients in the parameters' dtypes; that of the bias is the sum of the position's."""
    grad_weight = _weight_gradient(grad, raw).to(weight.dtype)
    if position is None:
        grad_bias = grad.sum(0, dtype=torch.float32)
        return grad_weight, grad_bias.to(bias.dtype), weight.new_empty(0)
    if position_index is None:
        position_index = torch.arange(raw.rows, dtype=torch.int32, device=grad.device) % raw.period
    sums = index_sum(grad, position_index, len(position))
    return grad_weight, partial_sum(sums).to(bias.dtype, copy=True), sums.to(position.dtype)
