"""Attention in ragged segments in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.segment_attention import (
    packed_segment_attention,
    segment_attention,
    segment_attention_reference,
)

pytestmark = pytest.mark.triton

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Around the powers of two that pieces of a tile have, ViT's 197 and the most a tile holds.
TILE_LENGTHS = [
    0,
    1,
    2,
    15,
    16,
    17,
    63,
    64,
    65,
    80,
    81,
    127,
    128,
    129,
    192,
    193,
    197,
    208,
    209,
    256,
]
# Two tiles of queries and a row, exactly two, and a short segment beside; an empty one first.
LONG_LENGTHS = [0, 257, 3, 256, 1]


def inputs_of(
    lengths: list[int], heads: int, dim: int, dtype: torch.dtype, **options: object
) -> dict:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = torch.randn(int(offsets[-1]), 3, heads, dim).to(dtype)
    return {"qkv": qkv, "offsets": offsets, "max_len": max(lengths, default=0), **options}


def triton(qkv: Tensor, **options: object) -> Tensor:
    return packed_segment_attention(qkv, backend="triton", **options)


def reference(qkv: Tensor, **options: object) -> Tensor:
    return segment_attention_reference(*qkv.unbind(1), **options)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_pieces_of_a_tile(rng_key: Tensor, dtype: torch.dtype, is_causal: bool) -> None:
    """A bucket of 256 with segments of every number of pieces, and each bucket below."""
    options = {"is_causal": is_causal, "dropout_p": 0.2, "rng_key": rng_key, "site": 3}
    buckets = [[1, 0, 16], [17, 2], [64, 63, 15], [65, 128, 81], [129, 197, 0, 209]]
    for lengths in buckets[: 3 if dtype == FP32 else 5]:  # fp32 has no larger tiles
        assert_matches(triton, reference, inputs_of(lengths, 1, 16, dtype, **options))


@pytest.mark.parametrize("dim", [8, 24, 64, 80, 130])
def test_heads(dim: int) -> None:
    """Heads below tl.dot's 16 columns, between powers of two, and too wide for a tile backward."""
    assert_matches(triton, reference, inputs_of([33, 5, 70], 2, dim, BF16, is_causal=True))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_longer_than_a_tile(rng_key: Tensor, dtype: torch.dtype, is_causal: bool) -> None:
    options = {"is_causal": is_causal, "dropout_p": 0.2, "rng_key": rng_key, "site": 1}
    lengths = LONG_LENGTHS[: 3 if dtype == FP32 else 5]  # fp32 has small tiles: many programs
    assert_matches(triton, reference, inputs_of(lengths, 1, 24, dtype, **options))


@pytest.mark.parametrize("max_len", [40, 300], ids=["tile", "walk"])
@pytest.mark.parametrize("scale", [0.01, 3.0, -0.3, 0.0])
def test_any_scale(scale: float, max_len: int) -> None:
    """Scores up to hundreds must not overflow; negative and zero scales are scales."""
    inputs = inputs_of([40], 2, 16, FP32, scale=scale) | {"max_len": max_len}
    assert_matches(triton, reference, inputs | {"qkv": inputs["qkv"] * 3})


@pytest.mark.parametrize("layout", ["packed views", "contiguous", "wide rows"])
def test_strides(rng_key: Tensor, layout: str) -> None:
    query, key, value = torch.randn(30, 5, 2, 12)[:, 1:4].unbind(1)
    if layout == "contiguous":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if layout == "packed views":
        query, key, value = torch.randn(30, 3, 2, 12).unbind(1)
    inputs = {"query": query, "key": key, "value": value, "max_len": 21, "dropout_p": 0.3,
              "offsets": torch.tensor([0, 9, 9, 30]).int(), "rng_key": rng_key}  # fmt: skip
    assert_matches(
        lambda **x: segment_attention(**x, backend="triton"), segment_attention_reference, inputs
    )


@pytest.mark.parametrize("max_len", [30, 300], ids=["tile", "walk"])
def test_segments_do_not_see_each_other(max_len: int) -> None:
    inputs = inputs_of([10, 20], 1, 8, BF16) | {"max_len": max_len}
    before = dict(forward_backward(triton, inputs))
    inputs["qkv"][10:] += 100.0
    after = dict(forward_backward(triton, inputs))
    for name, x in before.items():
        assert torch.equal(x[:10], after[name][:10]), name
        assert not torch.equal(x[10:], after[name][10:]), name


@pytest.mark.parametrize("max_len", [100, 300], ids=["tile", "walk"])
def test_causal_rows_do_not_see_later_rows(max_len: int) -> None:
    inputs = inputs_of([100], 1, 8, FP32, is_causal=True) | {"max_len": max_len}
    before = triton(**inputs)
    inputs["qkv"][70:] += 100.0
    assert torch.equal(before[:70], triton(**inputs)[:70])


@pytest.mark.parametrize("max_len", [64, 300], ids=["tile", "walk"])
def test_the_mask_depends_on_max_len_alone_not_on_the_kernel(rng_key: Tensor, max_len: int) -> None:
    """Values of ones give the share of kept probabilities: the bits of the reference's mask."""
    options = {"dropout_p": 0.5, "rng_key": rng_key, "site": 2, "scale": 0.0}
    inputs = inputs_of([64, 9], 2, 16, FP32, **options) | {"max_len": max_len}
    inputs["qkv"][:, 2] = 1.0
    want = reference(**inputs)
    assert want.std() > 0.05
    torch.testing.assert_close(triton(**inputs), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_len", [129, 300], ids=["tile", "walk"])
def test_same_bits_twice(rng_key: Tensor, max_len: int) -> None:
    options = {"dropout_p": 0.1, "rng_key": rng_key}
    inputs = inputs_of([3, 129], 1, 16, BF16, **options) | {"max_len": max_len}
    assert_equal(forward_backward(triton, inputs), forward_backward(triton, inputs))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("max_len", [4, 300], ids=["tile", "walk"])
def test_no_rows(lengths: list[int], max_len: int) -> None:
    inputs = inputs_of(lengths, 2, 8, BF16) | {"max_len": max_len}
    results = dict(forward_backward(triton, inputs))
    assert results["output 0"].shape == (0, 2, 8)
    assert results["gradient of qkv"].shape == (0, 3, 2, 8)


def test_query_blocks_of_the_walk_divide_its_key_blocks() -> None:
    """The causal part of a key block is whole query blocks, also on chips no test here runs."""
    from uml_fast.kernels.triton.segment_attention import _LONG, _LONG_FP32

    for *_, (queries, keys, *_) in (*_LONG.values(), *_LONG_FP32.values()):
        assert keys % queries == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_segments(seed: int) -> None:
    """Work items of both kernels find their rows, whatever the segments are."""
    rng = random.Random(seed)
    lengths = [rng.choice((0, 1, rng.randint(0, 70))) for _ in range(rng.randint(1, 6))]
    inputs = inputs_of(lengths, 1, rng.choice((8, 17, 32)), BF16, is_causal=seed % 2 == 0)
    for max_len in (max(lengths), 300):
        assert_matches(triton, reference, inputs | {"max_len": max_len})


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("max_len", [256, 400], ids=["tile", "walk"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 128])
def test_every_length(
    rng_key: Tensor, dim: int, dtype: torch.dtype, max_len: int, is_causal: bool
) -> None:
    for dropout_p in (0.0, 0.2):
        options = {"is_causal": is_causal, "dropout_p": dropout_p, "rng_key": rng_key}
        inputs = inputs_of(TILE_LENGTHS, 2, dim, dtype, **options)
        assert_matches(triton, reference, inputs | {"max_len": max_len})
