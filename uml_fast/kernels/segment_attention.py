"""Softmax attention inside ragged segments.

For each segment (rows ``offsets[s] .. offsets[s + 1]``) and head:

    score = scale * query key^T;  prob = softmax(score);  out = dropout(prob) value

Legend: T rows, H heads, D head dimension, S segments, L rows of a segment. Inputs and output in the
working dtype (fp32, bf16, and fp16 on CUDA), which is also that of the operands of products;
softmax and sums in fp32. FLOPs forward 4 L^2 D per head (half of it causal), backward 10 L^2 D;
memory is 4 T H D elements forward, 7 to 8 T H D backward: scores never leave the cache. Saved for
backward: the inputs, the output (alive anyway, as the next layer's input) and the fp32 log-sum-exp
(T, H); masks are drawn again (rng.py, mask row t * H + h, column = key's position in its segment,
max_len columns).

``key`` and ``value`` None mean everywhere inside that ``query`` is the packed (T, 3, H, D)
projection; gradients of the three are always written in that layout.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_floating, check_offsets, check_same
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.rng import check_dropout, keep_mask, keep_scale
from uml_fast.kernels.spec import KernelSpec, Shape

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


def _unpack(
    query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if key is None or value is None:
        query, key, value = query.unbind(1)
    return query, key, value


def _fwd(
    choice: Choice, query: Tensor, key: Tensor | None, value: Tensor | None, offsets: Tensor,
    max_len: int, is_causal: bool, scale: float, dropout_p: float, rng_key: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), log-sum-exp fp32 (T, H))."""
    q, k, v = _unpack(query, key, value)
    if choice != "reference":
        outputs: tuple[Tensor, Tensor] = implementation(NAME, choice).fwd(
            q, k, v, offsets, max_len, is_causal, scale, dropout_p, rng_key, site
        )
        return outputs
    out = segment_attention_reference(
        q, k, v, offsets, max_len, is_causal=is_causal, dropout_p=dropout_p, rng_key=rng_key,
        site=site, scale=scale,
    )  # fmt: skip
    return out.contiguous(), q.new_zeros(q.shape[:2], dtype=torch.float32)


def _bwd(
    choice: Choice, grad_out: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None,
    offsets: Tensor, out: Tensor, lse: Tensor, max_len: int, is_causal: bool, scale: float,
    dropout_p: float, rng_key: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """Gradients of query, key and value, packed as (T, 3, H, D)."""
    q, k, v = _unpack(query, key, value)
    if choice != "reference":
        grad: Tensor = implementation(NAME, choice).bwd(
            grad_out.contiguous(), q, k, v, offsets, out, lse, max_len, is_causal, scale,
            dropout_p, rng_key, site,
        )  # fmt: skip
        return grad
    reference = functools.partial(
        segment_attention_reference, offsets=offsets, max_len=max_len, is_causal=is_causal,
        dropout_p=dropout_p, rng_key=rng_key, site=site, scale=scale,
    )  # fmt: skip
    pull = torch.func.vjp(reference, q, k, v)[1]
    return torch.stack(pull(grad_out), 1)


@torch.library.custom_op("uml_fast::segment_attention_fwd", mutates_args=())
def _fwd_op(
    query: Tensor, key: Tensor | None, value: Tensor | None, offsets: Tensor, max_len: int,
    is_causal: bool, scale: float, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_offsets(NAME, offsets, len(query), max_len)
    return _fwd(
        choose(NAME, "auto", query), query, key, value, offsets, max_len, is_causal, scale,
        dropout_p, rng_key, site,
    )  # fmt: skip


@_fwd_op.register_fake
def _(query, key, value, offsets, max_len, is_causal, scale, dropout_p, rng_key, site):
    rows_heads = query.shape[0], query.shape[-2]
    lse = query.new_empty(rows_heads, dtype=torch.float32)
    return query.new_empty(*rows_heads, query.shape[-1]), lse


@torch.library.custom_op("uml_fast::segment_attention_bwd", mutates_args=())
def _bwd_op(
    grad_out: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, offsets: Tensor,
    out: Tensor, lse: Tensor, max_len: int, is_causal: bool, scale: float, dropout_p: float,
    rng_key: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    return _bwd(
        choose(NAME, "auto", query), grad_out, query, key, value, offsets, out, lse, max_len,
        is_causal, scale, dropout_p, rng_key, site,
    )  # fmt: skip


@_bwd_op.register_fake
def _(grad_out, query, *_):
    return query.new_empty(query.shape[0], 3, *query.shape[-2:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, *options, rng_key, site = inputs
    ctx.save_for_backward(query, key, value, offsets, *output, rng_key)
    ctx.options, ctx.site = options, site
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, rng_key = ctx.saved_tensors
    arguments: tuple[Any, ...] = (grad_out, *saved, *ctx.options, rng_key, ctx.site)
    grad = _bwd(ctx.choice, *arguments) if ctx.choice else _bwd_op(*arguments)
    is_packed = saved[1] is None
    return *((grad, None, None) if is_packed else grad.unbind(1)), *[None] * 7


_apply = differentiable("SegmentAttention", _fwd, _fwd_op, _setup, _backward)


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


def _attend(
    backend: Backend, query: Tensor, key: Tensor | None, value: Tensor | None, offsets: Tensor,
    max_len: int, is_causal: bool, dropout_p: float, rng_key: Tensor | None, site: int,
    scale: float | None,
) -> Tensor:  # fmt: skip
    check_dropout(NAME, dropout_p, rng_key)
    q, k, v = _unpack(query, key, value)
    _check(q, k, v, offsets, max_len)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    arguments = (
        query, key, value, offsets, max_len, is_causal, scale, dropout_p, rng_key, site
    )  # fmt: skip
    if torch.compiler.is_compiling():
        out: Tensor = _fwd_op(*arguments)[0]
    elif (choice := choose(NAME, backend, query)) != "reference":
        out = _apply(choice, *arguments)[0]
    else:
        out = segment_attention_reference(
            q, k, v, offsets, max_len, is_causal=is_causal, dropout_p=dropout_p, rng_key=rng_key,
            site=site, scale=scale,
        )  # fmt: skip
    return out


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, *,
    is_causal: bool = False, dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
    scale: float | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Softmax attention of every row to the rows of its segment.

    Args:
        query, key, value: (T, H, D) fp32 or bf16 (fp16 on CUDA; the reference also takes float64),
            D in 1..256, of equal strides (any, D, 1): contiguous, or views of one (T, 3, H, D)
            projection.
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
    return _attend(
        backend, query, key, value, offsets, max_len, is_causal, dropout_p, rng_key, site, scale
    )


def packed_segment_attention(
    qkv: Tensor, offsets: Tensor, max_len: int, *, is_causal: bool = False, dropout_p: float = 0.0,
    rng_key: Tensor | None = None, site: int = 0, scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """``segment_attention`` of one contiguous (T, 3, H, D) projection.

    Its gradient is written in place of the projection's layout, which saves the stacking of three.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or not qkv.is_contiguous():
        raise ValueError(
            f"{NAME}: qkv is {list(qkv.shape)} of strides {list(qkv.stride())}; it must be "
            "contiguous [rows, 3, heads, head_dim]"
        )
    return _attend(
        backend, qkv, None, None, offsets, max_len, is_causal, dropout_p, rng_key, site, scale
    )


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    lengths, H, D = shape["lengths"], shape["H"], shape["D"]
    qkv = torch.randn(sum(lengths), 3, H, D, generator=generator).to(dtype)
    query, key, value = qkv.unbind(1)
    return {
        "query": query,
        "key": key,
        "value": value,
        "offsets": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_len": shape.get("max_len", max(lengths, default=0)),
        "is_causal": shape.get("is_causal", False),
        "dropout_p": shape.get("dropout_p", 0.0),
        "rng_key": torch.tensor([0x1234_5678_9ABC_DEF0]),
        "scale": shape.get("scale"),
    }


def _flops(shape: Shape) -> tuple[float, float]:
    """Two products of L^2 D forward and five backward, half of them where rows look back only."""
    pairs = sum(n * n for n in shape["lengths"]) / (1 + shape.get("is_causal", False))
    product = 2.0 * pairs * shape["H"] * shape["D"]
    return 2 * product, 5 * product


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Three reads and a write; backward reads the output and its gradient too, writes three."""
    tensor = float(size * sum(shape["lengths"]) * shape["H"] * shape["D"])
    return 4 * tensor, 8 * tensor


SPEC = KernelSpec(
    name=NAME,
    function=segment_attention,
    inputs=_inputs,
    gradients=("query", "key", "value"),
    tests={
        "no rows": {"lengths": (), "H": 2, "D": 8},
        "empty segments, a prime, a block of 16 and one more": {
            "lengths": (0, 13, 0, 16, 17, 1, 0), "H": 2, "D": 8, "is_causal": True,
            "dropout_p": 0.3,
        },
        "a long bucket for short segments, padded head": {
            "lengths": (3, 65, 64), "H": 1, "D": 24, "max_len": 224, "dropout_p": 0.1,
        },
        "ViT and text in one pack": {"lengths": (77, 197), "H": 1, "D": 64},
        "longer than a tile, with dropout": {
            "lengths": (5, 290), "H": 2, "D": 16, "dropout_p": 0.1,
        },
        "longer than a tile, causal": {"lengths": (257, 130), "H": 1, "D": 8, "is_causal": True},
    },
    benches={
        "8 mixed segments, D 64": {
            "lengths": (197, 77, 197, 64, 512, 128, 197, 30), "H": 12, "D": 64,
        },
        "multibench d 40": {"lengths": (50, 31, 19, 7, 44, 24, 3, 36) * 8, "H": 5, "D": 8},
        "10 heads of 8": {"lengths": (50, 31, 19, 7, 44, 24, 3, 36) * 8, "H": 10, "D": 8},
        "multibench d 150": {
            "lengths": (50, 31, 19, 7, 44, 24) * 28, "H": 5, "D": 30, "is_causal": True,
            "dropout_p": 0.1,
        },
        "ViT-S": {"lengths": (197,) * 332, "H": 6, "D": 64},
        "text": {"lengths": (77,) * 851, "H": 6, "D": 64, "is_causal": True},
        "image and text": {"lengths": (197, 77) * 239, "H": 6, "D": 64, "max_len": 224},
        "512": {"lengths": (512,) * 128, "H": 12, "D": 64},
        "ViT-L, 512, D 128": {"lengths": (512,) * 128, "H": 8, "D": 128},
    },
    aot={
        "multibench d 150": {
            "lengths": (5,), "max_len": 50, "H": 5, "D": 30, "is_causal": True, "dropout_p": 0.1,
        },
        "ViT-S": {"lengths": (5,), "max_len": 224, "H": 6, "D": 64},
        "text": {"lengths": (5,), "max_len": 80, "H": 6, "D": 64, "is_causal": True},
        "512": {"lengths": (5,), "max_len": 512, "H": 12, "D": 64},
        "512, D 128": {"lengths": (5,), "max_len": 512, "H": 8, "D": 128},
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
