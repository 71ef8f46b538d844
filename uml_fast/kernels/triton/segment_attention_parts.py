"""What the attention kernels share: where a program's rows are, their loads, one tile of scores.

Tiles are addressed by an int64 base and int32 offsets inside the tile. Legend: L rows of a segment,
M queries and N keys of a tile, D head dimension, padded to BLOCK_D columns of zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uml_fast.kernels.triton.dot import INTERPRETED
from uml_fast.kernels.triton.rng import keep_mask
from uml_fast.kernels.triton.rounding import round_to, store_rounded


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in fp32; ``dot.py`` says why the interpreter needs another way."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, stride, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
              CHECK_ROWS: tl.constexpr):  # fmt: skip
    """(ROWS, COLS) of a matrix of ``rows`` rows and D columns; zeros outside of it."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    at = ptr + row * stride + col
    if CHECK_ROWS:
        return tl.load(at, mask=(row < rows) & (col < D), other=0.0)
    if D < COLS:
        return tl.load(at, mask=col < D, other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(ptr, stride, rows, tile, D: tl.constexpr):
    """Writes the first ``rows`` rows and D columns of a tile, rounded to the dtype of ``ptr``."""
    row = tl.arange(0, tile.shape[0])[:, None]
    col = tl.arange(0, tile.shape[1])[None, :]
    inside = (row < rows) & (col < D)
    store_rounded(ptr + row * stride + col, tile, inside)


@triton.jit
def is_seen(query, key, length, IS_CAUSAL: tl.constexpr):
    """Whether row ``query`` of a segment attends to row ``key``; broadcasts."""
    seen = key < length
    if IS_CAUSAL:
        seen &= key <= query
    return seen


@triton.jit
def find_block(offsets_ptr, block, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """(first row of the segment, its length, first row in it) of work item ``block``.

    Segment s owns the items from ``offsets[s] // BLOCK + s`` on: at least as many as it has blocks,
    at most one more, and T // BLOCK + S together, so no list is made and nothing is read back by
    the host. Items behind a segment's end start at or behind its length.
    """
    low = 0
    high = S
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_left = tl.load(offsets_ptr + middle) // BLOCK + middle > block
        high = tl.where(is_left, middle, high)
        low = tl.where(is_left, low, middle)
    first = tl.load(offsets_ptr + low)
    length = tl.load(offsets_ptr + low + 1) - first
    return first, length, (block - first // BLOCK - low) * BLOCK


@triton.jit
def attend(
    q, k, v, top, total, o, query, key, length, H, mask_row, max_len, scale_log2, rng, threshold,
    DROP: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_NEGATED: tl.constexpr, IS_MASKED: tl.constexpr,
    IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running maximum (base 2) and normaliser (M, 1) and output (M, D) after one more tile of keys.

    query (M, 1) and key (1, N) are positions in the segment; without IS_MASKED all see all. The
    first tile reads nothing of what came before: of a single tile this is the plain softmax.
    """
    s = dot(q, tl.trans(k), PRECISION)
    if IS_NEGATED:
        s = -s
    if IS_MASKED:
        s = tl.where(is_seen(query, key, length, IS_CAUSAL), s, float("-inf"))
    higher = tl.max(s, 1, keep_dims=True) * scale_log2
    if not IS_FIRST:
        higher = tl.maximum(top, higher)
        shrink = tl.exp2(top - higher)
        total *= shrink
        o *= shrink
    p = tl.exp2(s * scale_log2 - higher)
    sums = tl.sum(p, 1, keep_dims=True)
    if DROP:
        row = mask_row + query.to(tl.int64) * H
        p = tl.where(keep_mask(rng, row, key, max_len, threshold), p, 0.0)
    new = dot(round_to(p, v.dtype), v, PRECISION)
    if IS_FIRST:
        return higher, sums, new
    return higher, total + sums, o + new


@triton.jit
def probabilities(s, scale_log2, lse):
    """exp2(s * scale_log2 - lse) of pairs that see each other; at most one where they do not."""
    return tl.exp2(tl.minimum(s * scale_log2 - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def attend_bwd(
    q, go, k, v, grad_k, grad_v, lse, delta, query, key, length, H, mask_row, max_len, scale_log2,
    rng, threshold, KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v (N, D) after one more tile of queries, and the scores' gradient (N, M).

    All without the scale. Keys behind the segment's end need no mask: they are zeros, as queries
    there are, so they add nothing to grad_q, and nobody stores their rows. Scores are transposed,
    keys down and queries across, so that the products that make grad_k and grad_v take them from
    registers. lse (base 2), delta and query are (1, M), key is (N, 1). The order keeps few tiles
    alive: probabilities are used up before their gradient is made.
    """
    p = probabilities(dot(k, tl.trans(q), PRECISION), scale_log2, lse)
    if IS_MASKED:
        p = tl.where(is_seen(query, key, length, IS_CAUSAL), p, 0.0)
    if DROP:
        row = mask_row + query.to(tl.int64) * H
        keep = keep_mask(rng, row, key, max_len, threshold)
        grad_v += dot(round_to(tl.where(keep, p * KEEP_SCALE, 0.0), q.dtype), go, PRECISION)
        grad_p = dot(v, tl.trans(go), PRECISION)
        grad_p = tl.where(keep, grad_p * KEEP_SCALE, 0.0)
    else:
        grad_v += dot(round_to(p, q.dtype), go, PRECISION)
        grad_p = dot(v, tl.trans(go), PRECISION)
    grad_s = round_to(p * (grad_p - delta), q.dtype)
    grad_k += dot(grad_s, q, PRECISION)
    return grad_k, grad_v, grad_s
