"""Attention in ragged segments against the float64 reference, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.segment_attention import (
    packed_segment_attention,
    segment_attention,
    segment_attention_reference,
)

# One row; empty segments first, between and last, a prime, one vector, one more; lengths of the
# MOSI shape; a segment of several query blocks beside a short one.
LENGTHS = {
    "one row": [1],
    "edges": [0, 13, 0, 16, 17, 1, 0],
    "mosi": [3, 50, 19, 7, 32, 24],
    "long": [5, 401],
}
# Head dimensions of the paper's preset at d = 40, 150 and 300, ViT's, and the ends of the range.
HEADS = [(5, 8), (5, 30), (5, 60), (3, 64), (1, 1), (1, 256)]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def projection(rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, heads, dim).to(dtype)


def native(qkv: Tensor, **options: object) -> Tensor:
    return packed_segment_attention(qkv, backend="native", **options)


def reference(qkv: Tensor, **options: object) -> Tensor:
    return segment_attention_reference(*qkv.unbind(1), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_lengths(
    instruction_set: str, rng_key: Tensor, name: str, is_causal: bool, dtype: torch.dtype
) -> None:
    offsets = offsets_of(LENGTHS[name])
    options = {"offsets": offsets, "max_len": max(LENGTHS[name]), "is_causal": is_causal,
               "dropout_p": 0.2, "rng_key": rng_key, "site": 3}  # fmt: skip
    inputs = {"qkv": projection(int(offsets[-1]), 2, 24, dtype), **options}
    assert_matches(native, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "dim"), HEADS)
def test_heads(instruction_set: str, heads: int, dim: int, dtype: torch.dtype) -> None:
    offsets = offsets_of(LENGTHS["mosi"])
    inputs = {"qkv": projection(int(offsets[-1]), heads, dim, dtype), "offsets": offsets,
              "max_len": 50, "is_causal": True}  # fmt: skip
    assert_matches(native, reference, inputs)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64, 65, 129])
def test_one_segment_around_whole_blocks(instruction_set: str, length: int) -> None:
    """Odd numbers of keys, half-filled words, panels and tiles; one block of queries and two."""
    inputs = {"qkv": projection(length, 2, 20, torch.bfloat16), "offsets": offsets_of([length]),
              "max_len": length}  # fmt: skip
    assert_matches(native, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [2, 7, 15, 16, 17, 31, 32, 33, 63, 65, 129, 255])
def test_head_dimensions_around_whole_words(
    instruction_set: str, rng_key: Tensor, dim: int, dtype: torch.dtype
) -> None:
    offsets = offsets_of([3, 37])
    inputs = {"qkv": projection(40, 2, dim, dtype), "offsets": offsets, "max_len": 37,
              "dropout_p": 0.3, "rng_key": rng_key, "site": 1}  # fmt: skip
    assert_matches(native, reference, inputs)


def test_what_scratch_memory_held_does_not_matter(instruction_set: str) -> None:
    """NaN left in scratch by one call must not leak into the padding of the next."""
    poison = projection(200, 1, 256, torch.bfloat16).fill_(float("nan"))
    inputs = {"qkv": projection(37, 2, 9, torch.bfloat16), "offsets": offsets_of([20, 17]),
              "max_len": 20, "is_causal": True}  # fmt: skip
    clean = forward_backward(native, inputs)
    for dtype in (torch.bfloat16, torch.float32):
        poisoned = {"qkv": poison.to(dtype), "offsets": offsets_of([200]), "max_len": 200}
        assert forward_backward(native, poisoned)[0][1].isnan().all()
        assert_equal(forward_backward(native, inputs), clean)


def test_between_matrix_products_of_torch(instruction_set: str, two_threads: None) -> None:
    """torch's bf16 products use the same matrix tiles of the same threads where there are any."""
    x, y = torch.randn(192, 160).bfloat16(), torch.randn(160, 96).bfloat16()
    lengths = [70, 3, 50, 19]
    inputs = {"qkv": projection(142, 4, 40, torch.bfloat16), "offsets": offsets_of(lengths),
              "max_len": 70}  # fmt: skip
    product, attention = x @ y, forward_backward(native, inputs)
    for _ in range(3):
        assert torch.equal(x @ y, product)
        assert_equal(forward_backward(native, inputs), attention)
    want = x.double() @ y.double()
    assert (product.double() - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.native
@pytest.mark.parametrize("scale", [0.01, 3.0, -1.0])
def test_scale_and_large_scores(scale: float) -> None:
    """Scores up to hundreds: softmax must not overflow, and rows become one-hot."""
    inputs = {"qkv": projection(40, 2, 16) * 4, "offsets": offsets_of([40]), "max_len": 40,
              "scale": scale}  # fmt: skip
    assert_matches(native, reference, inputs)


@pytest.mark.native
@pytest.mark.parametrize("layout", ["packed views", "contiguous", "wide rows"])
def test_strides(rng_key: Tensor, layout: str) -> None:
    offsets = offsets_of([9, 0, 21])
    query, key, value = projection(30, 2, 12).unbind(1)
    if layout == "contiguous":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if layout == "wide rows":
        query, key, value = torch.randn(30, 5, 2, 12)[:, 1:4].unbind(1)
    inputs = {"query": query, "key": key, "value": value, "offsets": offsets, "max_len": 21,
              "dropout_p": 0.3, "rng_key": rng_key}  # fmt: skip
    assert_matches(
        lambda **x: segment_attention(**x, backend="native"), segment_attention_reference, inputs
    )


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_segments_do_not_see_each_other(backend: str) -> None:
    qkv = projection(30, 2, 8)
    offsets = offsets_of([10, 20])
    before = packed_segment_attention(qkv, offsets, 20, backend=backend)
    qkv[10:] += 100.0
    after = packed_segment_attention(qkv, offsets, 20, backend=backend)
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_causal_rows_do_not_see_later_rows(backend: str) -> None:
    qkv = projection(33, 2, 8)
    offsets = offsets_of([33])
    before = packed_segment_attention(qkv, offsets, 33, is_causal=True, backend=backend)
    qkv[20:] += 100.0
    after = packed_segment_attention(qkv, offsets, 33, is_causal=True, backend=backend)
    assert torch.equal(before[:20], after[:20])


@pytest.mark.native
def test_threads_give_the_same_bits(rng_key: Tensor, two_threads: None) -> None:
    lengths = [3, 50, 19, 7] * 20
    offsets = offsets_of(lengths)
    inputs = {"qkv": projection(int(offsets[-1]), 5, 30, torch.bfloat16), "offsets": offsets,
              "max_len": 50, "dropout_p": 0.1, "rng_key": rng_key}  # fmt: skip
    two = forward_backward(native, inputs)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(native, inputs))
    assert_equal(two, forward_backward(native, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_order_of_long_segments_does_not_matter(
    instruction_set: str, two_threads: None, dtype: torch.dtype
) -> None:
    """Threads take long segments first; each segment's rows are its own in any order."""
    lengths = [5, 0, 90, 200, 90, 33]
    qkv = projection(sum(lengths), 3, 24, dtype)
    options = {"offsets": offsets_of(lengths), "max_len": 200, "is_causal": True}
    both = forward_backward(native, {"qkv": qkv, **options})
    torch.set_num_threads(1)
    assert_equal(both, forward_backward(native, {"qkv": qkv, **options}))
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = native(qkv[rows], offsets=offsets_of([length]), max_len=length, is_causal=True)
        assert torch.equal(alone, both[0][1][rows])
        start += length


def test_packed_is_the_same_op(rng_key: Tensor) -> None:
    offsets = offsets_of([4, 9])
    inputs = {"qkv": projection(13, 2, 8), "offsets": offsets, "max_len": 9, "dropout_p": 0.5,
              "rng_key": rng_key}  # fmt: skip

    def three(qkv: Tensor, **options: object) -> Tensor:
        return segment_attention(*qkv.unbind(1), **options)

    packed = forward_backward(packed_segment_attention, inputs)
    assert_equal(packed, forward_backward(three, inputs))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(lengths: list[int]) -> None:
    qkv = projection(0, 2, 8).requires_grad_()
    out = packed_segment_attention(qkv, offsets_of(lengths), 4)
    out.sum().backward()
    assert out.shape == (0, 2, 8) and qkv.grad.shape == qkv.shape


def test_compiled_and_opcheck(rng_key: Tensor) -> None:
    offsets = offsets_of([4, 0, 9])
    inputs = {"qkv": projection(13, 2, 8), "offsets": offsets, "max_len": 9, "is_causal": True,
              "dropout_p": 0.5, "rng_key": rng_key}  # fmt: skip
    compiled = torch.compile(packed_segment_attention, fullgraph=True, backend="aot_eager")
    eager = forward_backward(packed_segment_attention, inputs)
    assert_equal(forward_backward(compiled, inputs), eager)
    query, key, value = (t.requires_grad_() for t in projection(13, 2, 8).unbind(1))
    torch.library.opcheck(
        torch.ops.uml_fast.segment_attention_fwd.default,
        (query, key, value, offsets, 9, True, 0.3, 0.5, rng_key, 1),
    )


def test_float64_takes_the_reference() -> None:
    qkv = projection(6, 2, 4, torch.float64).requires_grad_()
    offsets = offsets_of([2, 4])
    assert torch.autograd.gradcheck(lambda x: packed_segment_attention(x, offsets, 4), (qkv,))


BAD = {
    "dtype": (lambda a: a | {"key": a["key"].bfloat16()}, ValueError, "dtypes differ"),
    "integers": (lambda a: a | {n: a[n].int() for n in ("query", "key", "value")}, TypeError,
                 "must be a floating tensor"),
    "shape": (lambda a: a | {"value": a["value"][:-1]}, ValueError, "shapes differ"),
    "dimensions": (lambda a: a | {n: a[n].flatten(1) for n in ("query", "key", "value")},
                   ValueError, r"must be \[rows, heads, head_dim\]"),
    "strides": (lambda a: a | {"key": a["key"].transpose(0, 1).contiguous().transpose(0, 1)},
                ValueError, "key has strides"),
    "head dimension": (
        lambda a: a | dict.fromkeys(("query", "key", "value"), torch.ones(8, 1, 257)), ValueError,
        "head_dim is 257",
    ),
    "decreasing offsets": (lambda a: a | {"offsets": torch.tensor([0, 5, 3, 8]).int()}, ValueError,
                           "offsets decrease from 5 to 3 at segment 1"),
    "rows left over": (lambda a: a | {"offsets": torch.tensor([0, 7]).int()}, ValueError,
                       "must run from 0 to 8"),
    "first offset": (lambda a: a | {"offsets": torch.tensor([1, 8]).int()}, ValueError,
                     "must run from 0 to 8"),
    "long segment": (lambda a: a | {"max_len": 4}, ValueError,
                     "segment 1 has 5 rows; max_len is 4"),
    "offset type": (lambda a: a | {"offsets": a["offsets"].long()}, TypeError, "must be int32"),
    "no key": (lambda a: a | {"dropout_p": 0.1}, ValueError, "needs rng_key"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    query, key, value = projection(8, 2, 4).unbind(1)
    arguments = {"query": query, "key": key, "value": value, "offsets": offsets_of([3, 5]),
                 "max_len": 5}  # fmt: skip
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        segment_attention(**change(arguments), backend=backend)
