"""Attention of segments of up to 256 keys: a program holds all keys and values of its head.

One program does one (segment, head) and walks over blocks of its query rows, so K and V cross
memory once and backward has the gradients of keys and values in registers while it passes over the
queries: dQ, dK and dV in one pass, each score computed once, nothing added to another's rows.

Triton's tiles are powers of two; a segment of L keys is therefore held in pieces, the binary digits
of L rounded up to 16 (forward, where wgmma wants keys in multiples of 8) or 64 (backward, where
keys are rows of wgmma): 197 keys cost 208 and 256, not two tiles of 128, and a text of 77 in the
same pack 80 and 128. Pieces that a segment does not need are skipped. Softmax runs over at most
four pieces; of 256 scores a row at once, the plain one, registers spill (docs/design.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from uml_fast.kernels.triton.rng import site_key
from uml_fast.kernels.triton.segment_attention_parts import (
    attend,
    attend_bwd,
    dot,
    load_tile,
    store_tile,
)


@triton.jit
def _fwd_tile(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE: tl.constexpr,
    H: tl.constexpr, mask_row, max_len, scale_log2, rng, threshold, KEEP_SCALE: tl.constexpr,
    DROP: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_NEGATED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, MORE: tl.constexpr,
    REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment of at most KEYS + MORE + REST keys and, with MORE, of more than KEYS."""
    k = load_tile(key_ptr, STRIDE, length, D, KEYS, BLOCK_D, MORE == 0)
    v = load_tile(value_ptr, STRIDE, length, D, KEYS, BLOCK_D, MORE == 0)
    key = tl.arange(0, KEYS)[None, :]
    if MORE > 0:
        at: tl.constexpr = KEYS
        more_k = load_tile(key_ptr + at * STRIDE, STRIDE, length - at, D, MORE, BLOCK_D, True)
        more_v = load_tile(value_ptr + at * STRIDE, STRIDE, length - at, D, MORE, BLOCK_D, True)
        more_key = at + tl.arange(0, MORE)[None, :]
    if REST > 0:
        end: tl.constexpr = KEYS + MORE
        rest_k = load_tile(key_ptr + end * STRIDE, STRIDE, length - end, D, REST, BLOCK_D, True)
        rest_v = load_tile(value_ptr + end * STRIDE, STRIDE, length - end, D, REST, BLOCK_D, True)
        rest_key = end + tl.arange(0, REST)[None, :]
    next_q = load_tile(query_ptr, STRIDE, length, D, BLOCK_M, BLOCK_D, True)
    for start in range(0, length, BLOCK_M):
        q = next_q
        query_ptr += BLOCK_M * STRIDE
        rows = length - start
        next_q = load_tile(query_ptr, STRIDE, rows - BLOCK_M, D, BLOCK_M, BLOCK_D, True)
        query = start + tl.arange(0, BLOCK_M)[:, None]
        top, total, o = attend(
            q, k, v, 0, 0, 0, query, key, length, H, mask_row, max_len, scale_log2, rng, threshold,
            DROP, IS_CAUSAL, IS_NEGATED, IS_CAUSAL or MORE == 0, True, PRECISION,
        )  # fmt: skip
        if MORE > 0:
            top, total, o = attend(
                q, more_k, more_v, top, total, o, query, more_key, length, H, mask_row, max_len,
                scale_log2, rng, threshold, DROP, IS_CAUSAL, IS_NEGATED, IS_CAUSAL or REST == 0,
                False, PRECISION,
            )  # fmt: skip
        if REST > 0:
            top, total, o = attend(
                q, rest_k, rest_v, top, total, o, query, rest_key, length, H, mask_row, max_len,
                scale_log2, rng, threshold, DROP, IS_CAUSAL, IS_NEGATED, True, False, PRECISION,
            )  # fmt: skip
        store_tile(out_ptr + start * H * D, H * D, rows, o * (KEEP_SCALE / total), D)
        lse = top + tl.log2(total)
        tl.store(lse_ptr + query * H, lse, mask=query < length)


@triton.jit
def _segment_attention_fwd_kernel_tile(
    query_ptr, key_ptr, value_ptr, offsets_ptr, out_ptr, lse_ptr, rng_key_ptr, max_len,
    scale_log2, site, threshold, STRIDE: tl.constexpr, H: tl.constexpr,
    KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_NEGATED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(offsets_ptr + segment).to(tl.int64)
    length = (tl.load(offsets_ptr + segment + 1) - first).to(tl.int32)
    if length == 0:
        return
    mask_row = first * H + head
    query_ptr += first * STRIDE + head * D
    key_ptr += first * STRIDE + head * D
    value_ptr += first * STRIDE + head * D
    out_ptr += mask_row * D
    lse_ptr += mask_row
    rng = site_key(rng_key_ptr, site) if DROP else 0
    if BLOCK_N >= 256 and length > 208:
        _fwd_tile(query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE, H, mask_row,
                  max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_NEGATED, D,
                  BLOCK_D, BLOCK_M, 128, 64, 64, PRECISION)  # fmt: skip
    elif BLOCK_N >= 256 and length > 192:
        _fwd_tile(query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE, H, mask_row,
                  max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_NEGATED, D,
                  BLOCK_D, BLOCK_M, 128, 64, 16, PRECISION)  # fmt: skip
    elif BLOCK_N >= 256 and length > 128:
        _fwd_tile(query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE, H, mask_row,
                  max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_NEGATED, D,
                  BLOCK_D, BLOCK_M, 128, 64, 0, PRECISION)  # fmt: skip
    elif BLOCK_N >= 128 and length > 80:
        _fwd_tile(query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE, H, mask_row,
                  max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_NEGATED, D,
                  BLOCK_D, BLOCK_M, 128, 0, 0, PRECISION)  # fmt: skip
    elif BLOCK_N >= 128 and length > 64:
        _fwd_tile(query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE, H, mask_row,
                  max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_NEGATED, D,
                  BLOCK_D, BLOCK_M, 64, 16, 0, PRECISION)  # fmt: skip
    else:
        _fwd_tile(query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, length, STRIDE, H, mask_row,
                  max_len, scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_NEGATED, D,
                  BLOCK_D, BLOCK_M, 64 if BLOCK_N > 64 else BLOCK_N, 0, 0, PRECISION)  # fmt: skip


@triton.jit
def _bwd_tile(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, grad_ptr, first, length,
    head, STRIDE: tl.constexpr, H: tl.constexpr, max_len, scale, scale_log2, rng, threshold,
    KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment of at most KEYS keys, in one pass over its queries."""
    mask_row = first * H + head
    at = first * STRIDE + head * D
    k = load_tile(key_ptr + at, STRIDE, length, D, KEYS, BLOCK_D, True)
    v = load_tile(value_ptr + at, STRIDE, length, D, KEYS, BLOCK_D, True)
    grad_k = tl.zeros((KEYS, BLOCK_D), tl.float32)
    grad_v = tl.zeros((KEYS, BLOCK_D), tl.float32)
    key = tl.arange(0, KEYS)[:, None]
    for start in range(0, length, BLOCK_M):
        rows = length - start
        # Bases are made here from one int64 and kernel arguments: kept, they would cost registers.
        token = first + start
        at = token * STRIDE + head * D
        here = (token * H + head) * D
        q = load_tile(query_ptr + at, STRIDE, rows, D, BLOCK_M, BLOCK_D, True)
        go = load_tile(grad_out_ptr + here, H * D, rows, D, BLOCK_M, BLOCK_D, True)
        o = load_tile(out_ptr + here, H * D, rows, D, BLOCK_M, BLOCK_D, True)
        delta = tl.sum(go.to(tl.float32) * o.to(tl.float32), 1)[None, :]
        query = start + tl.arange(0, BLOCK_M)[None, :]
        lse = tl.load(lse_ptr + mask_row + query * H, mask=query < length, other=0.0)
        grad_k, grad_v, grad_s = attend_bwd(
            q, go, k, v, grad_k, grad_v, lse, delta, query, key, length, H, mask_row, max_len,
            scale_log2, rng, threshold, KEEP_SCALE, DROP, IS_CAUSAL, IS_CAUSAL, PRECISION,
        )  # fmt: skip
        grad_q = tl.trans(dot(tl.trans(k), grad_s, PRECISION)) * scale
        at = (token * 3 * H + head) * D
        store_tile(grad_ptr + at, 3 * H * D, rows, grad_q, D)
    at = ((first * 3 + 1) * H + head) * D
    store_tile(grad_ptr + at, 3 * H * D, length, grad_k * scale, D)
    store_tile(grad_ptr + at + H * D, 3 * H * D, length, grad_v, D)


@triton.jit
def _segment_attention_bwd_kernel_tile(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, offsets_ptr, out_ptr, lse_ptr, grad_ptr,
    rng_key_ptr, max_len, scale, scale_log2, site, threshold, STRIDE: tl.constexpr,
    H: tl.constexpr, KEEP_SCALE: tl.constexpr, DROP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(offsets_ptr + segment).to(tl.int64)
    length = (tl.load(offsets_ptr + segment + 1) - first).to(tl.int32)
    if length == 0:
        return
    rng = site_key(rng_key_ptr, site) if DROP else 0
    if BLOCK_N >= 256 and length > 128:
        _bwd_tile(grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, grad_ptr, first,
                  length, head, STRIDE, H, max_len, scale, scale_log2, rng, threshold, KEEP_SCALE,
                  DROP, IS_CAUSAL, D, BLOCK_D, BLOCK_M, 256, PRECISION)  # fmt: skip
    elif BLOCK_N >= 128 and length > 64:
        _bwd_tile(grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, grad_ptr, first,
                  length, head, STRIDE, H, max_len, scale, scale_log2, rng, threshold, KEEP_SCALE,
                  DROP, IS_CAUSAL, D, BLOCK_D, BLOCK_M, 128, PRECISION)  # fmt: skip
    else:
        _bwd_tile(grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, grad_ptr, first,
                  length, head, STRIDE, H, max_len, scale, scale_log2, rng, threshold, KEEP_SCALE,
                  DROP, IS_CAUSAL, D, BLOCK_D, BLOCK_M, 64 if BLOCK_N > 64 else BLOCK_N,
                  PRECISION)  # fmt: skip
