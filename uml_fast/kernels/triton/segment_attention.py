"""Triton kernels of segment_attention: which of them run, with which tiles.

Segments that fit one tile (ViT and text) go through segment_attention_tile, longer ones through
segment_attention_long. Nothing is read back by the host: S, T and ``max_len`` fix every grid. Row
strides and heads are compile-time constants, fixed for a model: addresses become immediates, which
took the backward tile of 256 keys from spilling to 249 registers and the forward walk from 138 to
123 (two blocks of 8 warps an SM instead of one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from uml_fast.kernels.rng import keep_scale, threshold
from uml_fast.kernels.triton.launch import arch, launch
from uml_fast.kernels.triton.segment_attention_long import (
    _segment_attention_bwd_kernel_key,
    _segment_attention_bwd_kernel_query,
    _segment_attention_fwd_kernel_long,
)
from uml_fast.kernels.triton.segment_attention_tile import (
    _segment_attention_bwd_kernel_tile,
    _segment_attention_fwd_kernel_tile,
)

LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program: query rows, keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps,
                "num_stages": self.num_stages}  # fmt: skip


def _block_d(query: Tensor) -> int:
    """Columns of a tile: the head dimension padded to what tl.dot takes."""
    return max(triton.next_power_of_2(query.shape[2]), 16)


def tile_config(
    direction: Literal["fwd", "bwd"], max_len: int, query: Tensor, is_causal: bool
) -> LaunchConfig | None:
    """Tiles that hold whole segments, or None where those are too long.

    Forward keeps K and V in shared memory: 64 KiB at 256 keys of 64 columns in 16 bits, so that two
    blocks of 4 warps share an SM (three at 128 keys, four at 64). Backward keeps their gradients in
    registers: at most 128 KiB of the 256, with blocks of 32 queries there. Without wgmma (sm_80)
    operands need registers too, so half of that. Causal rows would see half of a tile of 256, of
    which the walk over smaller tiles skips the other half. fp32 needs three products for one and
    twice the room, so only small tiles.
    """
    block_d, block_n = _block_d(query), max(triton.next_power_of_2(max_len), 16)
    num_warps = min(block_n // 16, 4)
    if query.dtype == torch.float32:
        if direction == "bwd" or block_n > 64 or block_n * block_d > 64 * 64:
            return None
        return LaunchConfig(min(block_n, 32), block_n, num_warps, 1)
    room = 256 * 64 if direction == "fwd" or arch() >= 90 else 128 * 64
    if block_n > (128 if is_causal else 256) or block_n * block_d > room or block_d > 128:
        return None
    if direction == "fwd":
        return LaunchConfig(min(block_n, 64), block_n, num_warps, 1)
    if block_n > 128 or block_n * block_d > 64 * 64:
        is_small = block_n <= 128 and block_d <= 64 and arch() >= 90
        return LaunchConfig(64 if is_small else 32, block_n, 8, 1)
    return LaunchConfig(min(block_n, 64 if arch() >= 90 else 32), block_n, num_warps, 1)


_LONG = {
    (True, 64): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    (True, 128): ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (True, 256): ((128, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
    (False, 64): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    (False, 128): ((128, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    (False, 256): ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
}
"""(has wgmma or its successor, columns) -> (queries, keys, warps, stages) of the forward pass, dQ
and dK with dV, whose query blocks divide its key blocks: the largest tiles without spills. At 64
columns forward and dQ stay within 128 registers on sm_90, so that two blocks share an SM."""

_LONG_FP32 = {
    32: ((64, 32, 8, 2), (16, 32, 4, 1), (16, 32, 8, 1)),
    64: ((64, 32, 8, 2), (16, 16, 4, 1), (16, 32, 8, 1)),
    128: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
"""The same in fp32 for all chips."""


def long_config(kernel: Literal["fwd", "bwd_query", "bwd_key"], query: Tensor) -> LaunchConfig:
    """Tiles of the walk over longer segments."""
    if query.dtype == torch.float32:
        row = _LONG_FP32[max(_block_d(query), 32)]
    else:
        row = _LONG[arch() >= 90, max(_block_d(query), 64)]
    return LaunchConfig(*row[("fwd", "bwd_query", "bwd_key").index(kernel)])


def _constants(query: Tensor, is_causal: bool, dropout_p: float) -> dict[str, Any]:
    """Compile-time constants that all kernels take.

    fp32 products are three of tf32: one of tf32 is off by 500 units in the last place of fp32, and
    "ieee" leaves the tensor cores for scalar code.
    """
    return {
        "STRIDE": query.stride(0), "H": query.shape[1], "D": query.shape[2],
        "BLOCK_D": _block_d(query), "IS_CAUSAL": is_causal, "DROP": dropout_p > 0,
        "KEEP_SCALE": keep_scale(dropout_p),
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def fwd(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, is_causal: bool,
    scale: float, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), log-sum-exp to base 2, fp32 (T, H)).

    Scores are made to base 2, and a log-sum-exp on its way to base e and back would be rounded
    twice more, by which every probability of the row is off in the backward pass.
    """
    T, H, D = query.shape
    S = len(offsets) - 1
    out = query.new_empty(T, H, D)
    lse = query.new_empty(T, H, dtype=torch.float32)
    if T == 0:
        return out, lse
    # The maximum of scaled scores is the scaled maximum for positive scales; -inf * 0 is no score.
    positive_scale = max(abs(scale), 1e-30) * LOG2E
    constants = _constants(query, is_causal, dropout_p) | {"IS_NEGATED": scale < 0}
    tensors = (query, key, value, offsets, out, lse, rng_key)
    rest = (max_len, positive_scale, site, threshold(dropout_p))
    c = tile_config("fwd", max_len, query, is_causal)
    if c is not None:
        launch(_segment_attention_fwd_kernel_tile, (S * H,), *tensors, *rest, **constants,
               **c.constants())  # fmt: skip
        return out, lse
    c = long_config("fwd", query)
    launch(_segment_attention_fwd_kernel_long, (T // c.block_m + S, H), *tensors, S, *rest,
           **constants, **c.constants(), STEPS=S.bit_length())  # fmt: skip
    return out, lse


def bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, out: Tensor,
    lse: Tensor, max_len: int, is_causal: bool, scale: float, dropout_p: float,
    rng_key: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """Gradients of query, key and value, packed as (T, 3, H, D)."""
    T, H, D = query.shape
    S = len(offsets) - 1
    grad = query.new_empty(T, 3, H, D)
    if T == 0:
        return grad
    constants = _constants(query, is_causal, dropout_p)
    inputs = (grad_out, query, key, value, offsets)
    rest = (max_len, scale, scale * LOG2E, site, threshold(dropout_p))
    c = tile_config("bwd", max_len, query, is_causal)
    if c is not None:
        launch(_segment_attention_bwd_kernel_tile, (S * H,), *inputs, out, lse, grad, rng_key,
               *rest, **constants, **c.constants())  # fmt: skip
        return grad
    delta = torch.empty_like(lse)
    constants["STEPS"] = S.bit_length()
    c = long_config("bwd_query", query)
    launch(_segment_attention_bwd_kernel_query, (T // c.block_m + S, H), *inputs, out, lse, delta,
           grad, rng_key, S, *rest, **constants, **c.constants())  # fmt: skip
    c = long_config("bwd_key", query)
    launch(_segment_attention_bwd_kernel_key, (T // c.block_n + S, H), *inputs, lse, delta, grad,
           rng_key, S, *rest, **constants, **c.constants())  # fmt: skip
    return grad
