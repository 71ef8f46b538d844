"""Attention of longer segments in blocks of queries and keys, with running softmax.

Forward: one program per (query block, head) walks over the keys it sees. Backward: one such pass
for dQ, which also makes the row sums delta = sum(P * dP) = sum(dO * O), and one per (key block,
head) that walks over the queries that see it, for dK and dV. Nobody adds to another program's rows,
so results do not depend on timing. Blocks that everyone sees whole take a loop without masks; the
masked loop has what is left. Consecutive programs have the same head and neighbouring blocks, which
share keys and values in the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uml_fast.kernels.triton.rng import keep_mask, site_key
from uml_fast.kernels.triton.rounding import round_to
from uml_fast.kernels.triton.segment_attention_parts import (
    attend,
    attend_bwd,
    dot,
    find_block,
    is_seen,
    load_tile,
    probabilities,
    store_tile,
)


@triton.jit
def _fwd_keys(
    q, top, total, o, begin, end, start, key_ptr, value_ptr, length, STRIDE: tl.constexpr,
    H: tl.constexpr, mask_row, max_len, scale_log2, rng, threshold, DROP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_NEGATED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running maximum (in base 2), normaliser and output after the keys [begin, end)."""
    query = start + tl.arange(0, q.shape[0])[:, None]
    for at in range(begin, end, BLOCK_N):
        k = load_tile(key_ptr, STRIDE, length - at, D, BLOCK_N, q.shape[1], IS_MASKED)
        v = load_tile(value_ptr, STRIDE, length - at, D, BLOCK_N, q.shape[1], IS_MASKED)
        key = at + tl.arange(0, BLOCK_N)[None, :]
        top, total, o = attend(
            q, k, v, top, total, o, query, key, length, H, mask_row, max_len, scale_log2, rng,
            threshold, DROP, IS_CAUSAL, IS_NEGATED, IS_MASKED, False, PRECISION,
        )  # fmt: skip
        key_ptr += BLOCK_N * STRIDE
        value_ptr += BLOCK_N * STRIDE
    return top, total, o


@triton.jit
def _segment_attention_fwd_kernel_long(
    query_ptr, key_ptr, value_ptr, offsets_ptr, out_ptr, lse_ptr, rng_key_ptr, S, max_len,
    scale_log2, site, threshold, STRIDE: tl.constexpr, H: tl.constexpr,
    KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_NEGATED: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, length, start = find_block(offsets_ptr, tl.program_id(0), S, STEPS, BLOCK_M)
    if start >= length:
        return
    head = tl.program_id(1)
    mask_row = first.to(tl.int64) * H + head
    key_ptr += first.to(tl.int64) * STRIDE + head * D
    value_ptr += first.to(tl.int64) * STRIDE + head * D
    query_ptr += (first + start).to(tl.int64) * STRIDE + head * D
    rng = site_key(rng_key_ptr, site) if DROP else 0
    q = load_tile(query_ptr, STRIDE, length - start, D, BLOCK_M, BLOCK_D, True)
    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(start + BLOCK_M, length) if IS_CAUSAL else length
    whole = (tl.minimum(start + 1, length) if IS_CAUSAL else length) // BLOCK_N * BLOCK_N
    top, total, o = _fwd_keys(
        q, top, total, o, 0, whole, start, key_ptr, value_ptr, length, STRIDE, H, mask_row,
        max_len, scale_log2, rng, threshold, DROP, IS_CAUSAL, IS_NEGATED, D, BLOCK_N, False,
        PRECISION,
    )  # fmt: skip
    key_ptr += whole.to(tl.int64) * STRIDE
    value_ptr += whole.to(tl.int64) * STRIDE
    top, total, o = _fwd_keys(
        q, top, total, o, whole, end, start, key_ptr, value_ptr, length, STRIDE, H, mask_row,
        max_len, scale_log2, rng, threshold, DROP, IS_CAUSAL, IS_NEGATED, D, BLOCK_N, True,
        PRECISION,
    )  # fmt: skip
    mask_row += start.to(tl.int64) * H
    store_tile(out_ptr + mask_row * D, H * D, length - start, o * (KEEP_SCALE / total), D)
    row = tl.arange(0, BLOCK_M)[:, None]
    lse = top + tl.log2(total)
    tl.store(lse_ptr + mask_row + row * H, lse, mask=row < length - start)


@triton.jit
def _bwd_keys(
    q, go, lse, delta, grad_q, begin, end, start, key_ptr, value_ptr, length,
    STRIDE: tl.constexpr, H: tl.constexpr, mask_row, max_len, scale_log2, rng, threshold,
    KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a query block, without the scale, after the keys [begin, end)."""
    query = start + tl.arange(0, q.shape[0])[:, None]
    for at in range(begin, end, BLOCK_N):
        k = load_tile(key_ptr, STRIDE, length - at, D, BLOCK_N, q.shape[1], IS_MASKED)
        v = load_tile(value_ptr, STRIDE, length - at, D, BLOCK_N, q.shape[1], IS_MASKED)
        key = at + tl.arange(0, BLOCK_N)[None, :]
        p = probabilities(dot(q, tl.trans(k), PRECISION), scale_log2, lse)
        if IS_MASKED:
            p = tl.where(is_seen(query, key, length, IS_CAUSAL), p, 0.0)
        grad_p = dot(go, tl.trans(v), PRECISION)
        if DROP:
            row = mask_row + query.to(tl.int64) * H
            keep = keep_mask(rng, row, key, max_len, threshold)
            grad_p = tl.where(keep, grad_p * KEEP_SCALE, 0.0)
        grad_s = round_to(p * (grad_p - delta), k.dtype)
        grad_q += dot(grad_s, k, PRECISION)
        key_ptr += BLOCK_N * STRIDE
        value_ptr += BLOCK_N * STRIDE
    return grad_q


@triton.jit
def _delta_keys(
    q, go, lse, end, start, key_ptr, value_ptr, length, STRIDE: tl.constexpr, H: tl.constexpr,
    mask_row, max_len, scale_log2, rng, threshold, KEEP_SCALE: tl.constexpr, DROP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum(P * dP) of each row of a query block, normalised again."""
    query = start + tl.arange(0, q.shape[0])[:, None]
    delta = tl.zeros((q.shape[0], 1), tl.float32)
    total = tl.zeros((q.shape[0], 1), tl.float32)
    for at in range(0, end, BLOCK_N):
        k = load_tile(key_ptr, STRIDE, length - at, D, BLOCK_N, q.shape[1], True)
        v = load_tile(value_ptr, STRIDE, length - at, D, BLOCK_N, q.shape[1], True)
        key = at + tl.arange(0, BLOCK_N)[None, :]
        p = probabilities(dot(q, tl.trans(k), PRECISION), scale_log2, lse)
        p = tl.where(is_seen(query, key, length, IS_CAUSAL), p, 0.0)
        grad_p = dot(go, tl.trans(v), PRECISION)
        if DROP:
            row = mask_row + query.to(tl.int64) * H
            keep = keep_mask(rng, row, key, max_len, threshold)
            grad_p = tl.where(keep, grad_p * KEEP_SCALE, 0.0)
        delta += tl.sum(p * grad_p, 1, keep_dims=True)
        total += tl.sum(p, 1, keep_dims=True)
        key_ptr += BLOCK_N * STRIDE
        value_ptr += BLOCK_N * STRIDE
    return delta / total


@triton.jit
def _segment_attention_bwd_kernel_query(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, offsets_ptr, out_ptr, lse_ptr, delta_ptr,
    grad_ptr, rng_key_ptr, S, max_len, scale, scale_log2, site, threshold, STRIDE: tl.constexpr,
    H: tl.constexpr, KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, length, start = find_block(offsets_ptr, tl.program_id(0), S, STEPS, BLOCK_M)
    rows = length - start
    if rows <= 0:
        return
    head = tl.program_id(1)
    mask_row = first.to(tl.int64) * H + head
    here = mask_row + start.to(tl.int64) * H
    key_ptr += first.to(tl.int64) * STRIDE + head * D
    value_ptr += first.to(tl.int64) * STRIDE + head * D
    query_ptr += (first + start).to(tl.int64) * STRIDE + head * D
    grad_ptr += ((first + start).to(tl.int64) * 3 * H + head) * D
    rng = site_key(rng_key_ptr, site) if DROP else 0
    q = load_tile(query_ptr, STRIDE, rows, D, BLOCK_M, BLOCK_D, True)
    go = load_tile(grad_out_ptr + here * D, H * D, rows, D, BLOCK_M, BLOCK_D, True)
    row = tl.arange(0, BLOCK_M)[:, None]
    lse = tl.load(lse_ptr + here + row * H, mask=row < rows, other=0.0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(start + BLOCK_M, length) if IS_CAUSAL else length
    if q.dtype == tl.float32:
        # dO * O is rounded otherwise than dP, from which it is taken away: in a row with one large
        # probability that costs a digit. In 16 bits the rounding of P is larger than all of this.
        delta = _delta_keys(
            q, go, lse, end, start, key_ptr, value_ptr, length, STRIDE, H, mask_row, max_len,
            scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, D, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        o = load_tile(out_ptr + here * D, H * D, rows, D, BLOCK_M, BLOCK_D, True)
        delta = tl.sum(go.to(tl.float32) * o.to(tl.float32), 1, keep_dims=True)
    tl.store(delta_ptr + here + row * H, delta, mask=row < rows)
    whole = (tl.minimum(start + 1, length) if IS_CAUSAL else length) // BLOCK_N * BLOCK_N
    grad_q = _bwd_keys(
        q, go, lse, delta, grad_q, 0, whole, start, key_ptr, value_ptr, length, STRIDE, H,
        mask_row, max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, D, BLOCK_N,
        False, PRECISION,
    )  # fmt: skip
    key_ptr += whole.to(tl.int64) * STRIDE
    value_ptr += whole.to(tl.int64) * STRIDE
    grad_q = _bwd_keys(
        q, go, lse, delta, grad_q, whole, end, start, key_ptr, value_ptr, length, STRIDE, H,
        mask_row, max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, D, BLOCK_N,
        True, PRECISION,
    )  # fmt: skip
    store_tile(grad_ptr, 3 * H * D, rows, grad_q * scale, D)


@triton.jit
def _bwd_queries(
    k, v, grad_k, grad_v, begin, end, start, query_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    length, STRIDE: tl.constexpr, H: tl.constexpr, mask_row, max_len, scale_log2, rng,
    threshold, KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys (without the scale) and values after the queries [begin, end).

    Scores are transposed: keys down, queries across.
    """
    key = start + tl.arange(0, k.shape[0])[:, None]
    column = tl.arange(0, BLOCK_M)[None, :]
    query_ptr += begin.to(tl.int64) * STRIDE
    skipped = begin.to(tl.int64) * H
    grad_out_ptr += skipped * D
    lse_ptr += skipped
    delta_ptr += skipped
    for at in range(begin, end, BLOCK_M):
        rows = length - at
        q = load_tile(query_ptr, STRIDE, rows, D, BLOCK_M, k.shape[1], IS_MASKED)
        go = load_tile(grad_out_ptr, H * D, rows, D, BLOCK_M, k.shape[1], IS_MASKED)
        inside = column < rows
        lse = tl.load(lse_ptr + column * H, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + column * H, mask=inside, other=0.0)
        query = at + column
        grad_k, grad_v, _ = attend_bwd(
            q, go, k, v, grad_k, grad_v, lse, delta, query, key, length, H, mask_row, max_len,
            scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_MASKED and IS_CAUSAL,
            PRECISION,
        )  # fmt: skip
        query_ptr += BLOCK_M * STRIDE
        grad_out_ptr += BLOCK_M * H * D
        lse_ptr += BLOCK_M * H
        delta_ptr += BLOCK_M * H
    return grad_k, grad_v


@triton.jit
def _segment_attention_bwd_kernel_key(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, offsets_ptr, lse_ptr, delta_ptr, grad_ptr,
    rng_key_ptr, S, max_len, scale, scale_log2, site, threshold, STRIDE: tl.constexpr,
    H: tl.constexpr, KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, length, start = find_block(offsets_ptr, tl.program_id(0), S, STEPS, BLOCK_N)
    rows = length - start
    if rows <= 0:
        return
    head = tl.program_id(1)
    mask_row = first.to(tl.int64) * H + head
    at = (first + start).to(tl.int64) * STRIDE + head * D
    query_ptr += first.to(tl.int64) * STRIDE + head * D
    grad_ptr += ((first + start).to(tl.int64) * 3 * H + head) * D
    rng = site_key(rng_key_ptr, site) if DROP else 0
    k = load_tile(key_ptr + at, STRIDE, rows, D, BLOCK_N, BLOCK_D, True)
    v = load_tile(value_ptr + at, STRIDE, rows, D, BLOCK_N, BLOCK_D, True)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    whole = tl.full((), 0, tl.int32)
    if IS_CAUSAL:
        whole = tl.minimum(start + BLOCK_N, length)
        grad_k, grad_v = _bwd_queries(
            k, v, grad_k, grad_v, start, whole, start, query_ptr, grad_out_ptr + mask_row * D,
            lse_ptr + mask_row, delta_ptr + mask_row, length, STRIDE, H, mask_row, max_len,
            scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, D, BLOCK_M, True, PRECISION,
        )  # fmt: skip
    tail = tl.maximum(length // BLOCK_M * BLOCK_M, whole)
    grad_k, grad_v = _bwd_queries(
        k, v, grad_k, grad_v, whole, tail, start, query_ptr, grad_out_ptr + mask_row * D,
        lse_ptr + mask_row, delta_ptr + mask_row, length, STRIDE, H, mask_row, max_len, scale_log2,
        rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, D, BLOCK_M, False, PRECISION,
    )  # fmt: skip
    grad_k, grad_v = _bwd_queries(
        k, v, grad_k, grad_v, tail, length, start, query_ptr, grad_out_ptr + mask_row * D,
        lse_ptr + mask_row, delta_ptr + mask_row, length, STRIDE, H, mask_row, max_len, scale_log2,
        rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, D, BLOCK_M, True, PRECISION,
    )  # fmt: skip
    store_tile(grad_ptr + H * D, 3 * H * D, rows, grad_k * scale, D)
    store_tile(grad_ptr + 2 * H * D, 3 * H * D, rows, grad_v, D)
