"""Softmax attention inside ragged segments.

For each segment (rows ``offsets[s] .. offsets[s + 1]``) and head:

    score = scale * query key^T;  prob = softmax(score);  out = dropout(prob) value

Legend: T rows, H heads, D head dimension, S segments, L rows of a segment. Inputs and output in the
working dtype (fp32 or bf16), which is also that of the operands of products; softmax and sums in
fp32. FLOPs forward 4 L^2 D per head (half of it causal), backward 10 L^2 D; memory is 4 T H D
elements forward, 7 T H D backward: scores never leave the cache. Saved for backward: the inputs and
the fp32 log-sum-exp (T, H); masks are drawn again (rng.py, mask row t * H + h, column = key's
position in its segment, max_len columns).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, has_kernel
from uml_fast.kernels.checks import check_floating, check_offsets, check_same
from uml_fast.kernels.native.library import CODES, library, mask_arguments
from uml_fast.kernels.rng import check_dropout, keep_mask, keep_scale

NAME = "segment_attention"


def segment_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, *,
    is_causal: bool = False, dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch definition, one segment at a time; differentiable, any floating dtype."""
    _T, H, D = query.shape
    scale = D**-0.5 if scale is None else scale
    heads = torch.arange(H, device=query.device).view(H, 1, 1)
    out = [query[:0] + key[:0] + value[:0]]
    for start, end in itertools.pairwise(offsets.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        score = q @ k.transpose(1, 2) * scale
        at = torch.arange(end - start, device=query.device)
        if is_causal:
            score = score.masked_fill(at > at.unsqueeze(1), float("-inf"))
        prob = score.softmax(-1)
        if rng_key is not None and dropout_p > 0:
            row = (start + at.view(1, -1, 1)) * H + heads
            keep = keep_mask(rng_key, site, row, at, max_len, dropout_p)
            prob = prob * keep * keep_scale(dropout_p)
        out.append((prob @ v).transpose(0, 1))
    return torch.cat(out)


def segment_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, is_causal: bool,
    scale: float, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Native (out (T, H, D), log-sum-exp fp32 (T, H))."""
    T, H, D = query.shape
    out = query.new_empty(T, H, D)
    lse = query.new_empty(T, H, dtype=torch.float32)
    library().attention_fwd(
        torch.get_num_threads(), offsets.data_ptr(), len(offsets) - 1, H, D, max_len,
        query.stride(0), is_causal, scale, CODES[query.dtype], query.data_ptr(), key.data_ptr(),
        value.data_ptr(), out.data_ptr(), lse.data_ptr(), *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return out, lse


def segment_attention_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, lse: Tensor,
    max_len: int, is_causal: bool, scale: float, dropout_p: float, rng_key: Tensor | None,
    site: int,
) -> Tensor:  # fmt: skip
    """Native gradients of query, key and value, packed as (T, 3, H, D)."""
    T, H, D = query.shape
    grad = query.new_empty(T, 3, H, D)
    first = grad.data_ptr()
    step = H * D * grad.element_size()
    library().attention_bwd(
        torch.get_num_threads(), offsets.data_ptr(), len(offsets) - 1, H, D, max_len,
        query.stride(0), is_causal, scale, CODES[query.dtype], grad_out.data_ptr(),
        query.data_ptr(), key.data_ptr(), value.data_ptr(), lse.data_ptr(), first, first + step,
        first + 2 * step, grad.stride(0), *mask_arguments(dropout_p, rng_key, site),
    )  # fmt: skip
    return grad


@torch.library.custom_op("uml_fast::segment_attention_fwd", mutates_args=())
def _fwd_op(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, is_causal: bool,
    scale: float, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_offsets(NAME, offsets, len(query), max_len)
    if has_kernel(NAME, "auto", query):
        return segment_attention_fwd(
            query, key, value, offsets, max_len, is_causal, scale, dropout_p, rng_key, site
        )
    out = segment_attention_reference(
        query, key, value, offsets, max_len, is_causal=is_causal, dropout_p=dropout_p,
        rng_key=rng_key, site=site, scale=scale,
    )  # fmt: skip
    return out.contiguous(), query.new_zeros(query.shape[:2], dtype=torch.float32)


@_fwd_op.register_fake
def _(query, key, value, offsets, max_len, is_causal, scale, dropout_p, rng_key, site):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("uml_fast::segment_attention_bwd", mutates_args=())
def _bwd_op(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, lse: Tensor,
    max_len: int, is_causal: bool, scale: float, dropout_p: float, rng_key: Tensor | None,
    site: int,
) -> Tensor:  # fmt: skip
    if has_kernel(NAME, "auto", query):
        return segment_attention_bwd(
            grad_out.contiguous(), query, key, value, offsets, lse, max_len, is_causal, scale,
            dropout_p, rng_key, site,
        )  # fmt: skip
    reference = functools.partial(
        segment_attention_reference, offsets=offsets, max_len=max_len, is_causal=is_causal,
        dropout_p=dropout_p, rng_key=rng_key, site=site, scale=scale,
    )  # fmt: skip
    pull = torch.func.vjp(reference, query, key, value)[1]
    return torch.stack(pull(grad_out), 1)


@_bwd_op.register_fake
def _(grad_out, query, *_):
    T, H, D = query.shape
    return query.new_empty(T, 3, H, D)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, *options, rng_key, site = inputs
    ctx.save_for_backward(query, key, value, offsets, output[1], rng_key)
    ctx.options, ctx.site = options, site
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, rng_key = ctx.saved_tensors
    grad = _bwd_op(grad_out, *saved, *ctx.options, rng_key, ctx.site)
    return *grad.unbind(1), *[None] * 7


_fwd_op.register_autograd(_backward, setup_context=_setup)


def _unpack(
    query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if key is None or value is None:
        query, key, value = query.unbind(1)
    return query, key, value


class _SegmentAttention(torch.autograd.Function):
    """The native kernels for eager mode, without the cost of the operator boundary.

    With ``key`` and ``value`` None, ``query`` is the packed (T, 3, H, D) projection and its
    gradient comes back as one tensor.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor | None, value: Tensor | None, offsets: Tensor,
                max_len: int, is_causal: bool, scale: float, dropout_p: float,
                rng_key: Tensor | None, site: int) -> Tensor:  # fmt: skip
        q, k, v = _unpack(query, key, value)
        options = (max_len, is_causal, scale, dropout_p)
        out, lse = segment_attention_fwd(q, k, v, offsets, *options, rng_key, site)
        ctx.save_for_backward(query, key, value, offsets, lse, rng_key)
        ctx.options, ctx.site = options, site
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, offsets, lse, rng_key = ctx.saved_tensors
        q, k, v = _unpack(query, key, value)
        max_len, is_causal, scale, dropout_p = ctx.options
        grad = segment_attention_bwd(
            grad_out.contiguous(), q, k, v, offsets, lse, max_len, is_causal, scale, dropout_p,
            rng_key, ctx.site,
        )  # fmt: skip
        grads = (grad, None, None) if key is None else grad.unbind(1)
        return *grads, *[None] * 7


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int) -> None:
    tensors = {"query": query, "key": key, "value": value}
    check_floating(NAME, **tensors)
    for attribute in ("dtype", "device", "shape"):
        check_same(NAME, attribute, **tensors)
    if query.ndim != 3:
        raise ValueError(
            f"{NAME}: query is {list(query.shape)}; it must be [rows, heads, head_dim]"
        )
    _T, H, D = query.shape
    if not 1 <= D <= 256:
        raise ValueError(f"{NAME}: head_dim is {D}; 1..256 are supported")
    for name, t in tensors.items():
        if t.stride(2) != 1 or (H > 1 and t.stride(1) != D) or t.stride(0) != query.stride(0):
            raise ValueError(
                f"{NAME}: {name} has strides {list(t.stride())}; query, key and value must have "
                f"the same row stride, then {D} and 1 (views of one projection, or contiguous)"
            )
    check_offsets(NAME, offsets, len(query), max_len)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, *,
    is_causal: bool = False, dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
    scale: float | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Softmax attention of every row to the rows of its segment.

    Args:
        query, key, value: (T, H, D) fp32 or bf16 (the reference also takes float64), D in 1..256,
            of
            equal strides (any, D, 1): contiguous, or views of one (T, 3, H, D) projection.
        offsets: int32 (S + 1,), first row of each segment, then T; segments may be empty.
        max_len: no segment is longer; part of the numbering of the dropout mask.
        is_causal: rows attend to themselves and to earlier rows only.
        dropout_p: probability of dropping an attention weight, with ``rng_key`` int64 (1,) and
            ``site``.
        scale: factor of the scores; None: D ** -0.5.
        backend: for tests.

    Returns:
        (T, H, D), contiguous.

    Raises:
        TypeError, ValueError: shapes, dtypes, strides or offsets that do not fit.
    """
    check_dropout(NAME, dropout_p, rng_key)
    _check(query, key, value, offsets, max_len)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    options = (max_len, is_causal, scale, dropout_p, rng_key, site)
    if torch.compiler.is_compiling():
        out: Tensor = _fwd_op(query, key, value, offsets, *options)[0]
    elif has_kernel(NAME, backend, query):
        out = _SegmentAttention.apply(query, key, value, offsets, *options)
    else:
        out = segment_attention_reference(
            query, key, value, offsets, max_len, is_causal=is_causal, dropout_p=dropout_p,
            rng_key=rng_key, site=site, scale=scale,
        )  # fmt: skip
    return out


def packed_segment_attention(
    qkv: Tensor, offsets: Tensor, max_len: int, *, is_causal: bool = False, dropout_p: float = 0.0,
    rng_key: Tensor | None = None, site: int = 0, scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """``segment_attention`` of one contiguous (T, 3, H, D) projection.

    Its gradient is written in place of the projection's layout, which saves the stacking of three.
    """
    query, key, value = qkv.unbind(1)
    eager = not torch.compiler.is_compiling()
    if not (eager and qkv.is_contiguous() and has_kernel(NAME, backend, qkv)):
        return segment_attention(
            query, key, value, offsets, max_len, is_causal=is_causal, dropout_p=dropout_p,
            rng_key=rng_key, site=site, scale=scale, backend=backend,
        )  # fmt: skip
    check_dropout(NAME, dropout_p, rng_key)
    _check(query, key, value, offsets, max_len)
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = _SegmentAttention.apply(
        qkv, None, None, offsets, max_len, is_causal, scale, dropout_p, rng_key, site
    )
    return out
