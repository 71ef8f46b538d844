"""Sums of rows that share an index, against float64 sums; the same bits for any thread count."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.numerics import assert_equal
from uml_fast.kernels.index_sum import index_sum

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
]
# Rows, columns, entries: no rows; no columns; one of each; fewer columns than a vector; exactly the
# widest column block and one more; a prime; more entries than rows (most are empty) and than a
# Triton tile; many blocks of rows.
SHAPES = [
    (0, 8, 3), (3, 0, 2), (1, 1, 1), (9, 5, 2), (17, 64, 4), (17, 65, 4), (31, 37, 7),
    (20, 16, 150), (700, 20, 5),
]  # fmt: skip


def arguments(rows: int, cols: int, size: int, dtype: torch.dtype) -> dict:
    index = torch.randint(-1, size + 1, (rows,), dtype=torch.int32)
    return {"input": torch.randn(rows, cols).to(dtype), "index": index, "size": size}


def check(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    """The rule of numerics.py, with sums of fp32 rows in torch as the baseline."""
    inputs = arguments(*shape, dtype)
    want = index_sum(**inputs | {"input": inputs["input"].double()}, backend="reference")
    plain = index_sum(**inputs, backend="reference")
    got = index_sum(**inputs, backend=backend)
    assert got.dtype == FP32
    assert got.shape == want.shape
    if want.numel():
        ulp = torch.finfo(FP32).eps * want.abs().max().item()
        limit = 2 * (plain - want).abs().max().item() + ulp
        assert (got - want).abs().max().item() <= limit


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_on_every_instruction_set(
    instruction_set: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(shape, dtype, "native")


@pytest.mark.native
@pytest.mark.parametrize("is_fresh", [True, False])
def test_large_tables_are_zero_where_no_row_has_the_index(
    is_fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pages that nothing was written to, which come as zeros, and in those that hold NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", not is_fresh)
    rows, cols, size = 40, 65, (33 << 20) // (4 * 65)
    index = torch.randint(size, (rows,), dtype=torch.int32)
    index[:3] = torch.tensor([0, size - 1, size - 1])
    input = torch.randn(rows, cols)
    got = index_sum(input, index, size, backend="native")
    assert torch.equal(got, index_sum(input, index, size, backend="reference"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_in_triton(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, "triton")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_indices_beyond_the_table_are_clamped(backend: str) -> None:
    index = torch.tensor([-(2**31), 0, 1, 2, 2**31 - 1], dtype=torch.int32)
    input = 2.0 ** torch.arange(5)[:, None].float()
    got = index_sum(input, index, 2, backend=backend)
    assert got.tolist() == [[3.0], [28.0]]


@pytest.mark.native
def test_threads_give_the_same_bits(two_threads: None) -> None:
    inputs = arguments(3000, 150, 7, FP32)
    two = [("sums", index_sum(**inputs, backend="native"))]
    torch.set_num_threads(1)
    assert_equal(two, [("sums", index_sum(**inputs, backend="native"))])


@pytest.mark.triton
def test_large_and_small_parts_of_fp32_survive_the_split_into_bf16() -> None:
    """One row an entry: the sum is the row itself, to the last bit."""
    input = torch.randn(40, 16) * 10.0 ** torch.randint(-20, 20, (40, 16))
    index = torch.arange(40, dtype=torch.int32)
    assert torch.equal(index_sum(input, index, 40, backend="triton"), input)


BAD = {
    "integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input is torch.int64"),
    "dimensions": ({"input": torch.ones(4)}, ValueError, r"must be \[rows, columns\]"),
    "strides": ({"input": torch.ones(8, 4).t()}, ValueError, "input has strides"),
    "index dtype": ({"index": torch.zeros(4).long()}, TypeError, "index is torch.int64"),
    "index length": ({"index": torch.zeros(5).int()}, ValueError, r"index is \[5\]"),
    "index strides": ({"index": torch.zeros(8).int()[::2]}, ValueError, "index has strides"),
    "no table": ({"size": 0}, ValueError, "4 rows for a table of size 0"),
    "negative": ({"size": -1}, ValueError, "size is -1"),
}


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        index_sum(**arguments(4, 8, 3, FP32) | change, backend=backend)
