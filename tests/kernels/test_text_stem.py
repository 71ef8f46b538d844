"""Text tokens and the gradients of both tables against the float64 reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.index_sum import index_sum_reference
from uml_fast.kernels.text_stem import text_stem, text_stem_reference

BF16, FP32 = torch.bfloat16, torch.float32
TRITON = pytest.param("triton", marks=pytest.mark.triton)
NATIVE = pytest.param("native", marks=pytest.mark.native)
# (rows, vocabulary, positions, width): one of each; fewer columns than a vector; primes; whole
# vectors; more rows than a chunk, and more entries than rows.
SHAPES = [(1, 1, 1, 1), (5, 3, 2, 7), (17, 101, 5, 37), (9, 16, 4, 64), (130, 700, 50, 48)]


def arguments(
    rows: int, vocabulary: int, positions: int, cols: int, weight: torch.dtype = FP32,
    position: torch.dtype = FP32,
) -> dict[str, Any]:  # fmt: skip
    return {
        "ids": torch.randint(vocabulary, (rows,), dtype=torch.int32),
        "weight": torch.randn(vocabulary, cols).to(weight),
        "position": torch.randn(positions, cols).to(position),
        # beyond the table at both ends
        "position_index": (torch.arange(rows) % (positions + 2) - 1).int(),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32, FP32), (FP32, FP32, BF16), (BF16, FP32, BF16), (FP32, BF16, FP32)],
    ids=str,
)  # fmt: skip
def test_matches(instruction_set: str, shape: tuple[int, ...], dtypes: tuple) -> None:
    inputs = arguments(*shape, *dtypes[:2])
    op = functools.partial(text_stem, dtype=dtypes[2], backend="native")
    assert_matches(op, functools.partial(text_stem_reference, dtype=dtypes[2]), inputs)


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
def test_values(backend: str) -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    position = torch.tensor([[0.5, 0.25], [0.125, 0.0]], requires_grad=True)
    ids, index = torch.tensor([2, 0, 2]).int(), torch.tensor([0, 1, 9]).int()
    tokens = text_stem(ids, weight, position, index, dtype=FP32, backend=backend)
    assert tokens.tolist() == [[5.5, 6.25], [1.125, 2.0], [5.125, 6.0]]
    tokens.backward(torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]))
    assert weight.grad.tolist() == [[2.0, 20.0], [0.0, 0.0], [5.0, 50.0]]
    assert position.grad.tolist() == [[1.0, 10.0], [6.0, 60.0]]


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
def test_without_positions(backend: str) -> None:
    inputs = arguments(17, 11, 3, 9)
    inputs |= {"position": None, "position_index": None, "dtype": FP32, "backend": backend}
    results = dict(forward_backward(text_stem, inputs))
    assert torch.equal(results["output 0"], inputs["weight"][inputs["ids"].long()])
    assert results.keys() == {"output 0", "gradient of weight"}
    assert results["gradient of weight"].abs().sum() > 0


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
@pytest.mark.parametrize("has_position", [True, False])
def test_writes_into_rows_of_the_pack(backend: str, has_position: bool) -> None:
    inputs = arguments(6, 11, 3, 9)
    if not has_position:
        inputs |= {"position": None, "position_index": None}
    pack = torch.full((10, 9), -1.0, dtype=BF16)
    want = forward_backward(functools.partial(text_stem, dtype=BF16, backend=backend), inputs)
    version = pack._version
    into = functools.partial(text_stem, dtype=BF16, out=pack[2:8], backend=backend)
    got = forward_backward(into, inputs)
    assert_equal(got, want)
    assert torch.equal(pack[2:8], want[0][1])
    assert pack[:2].eq(-1).all() and pack[8:].eq(-1).all() and not pack.requires_grad
    assert into(**inputs).data_ptr() == pack[2].data_ptr()
    assert pack._version > version, "a graph that saved the pack's older rows must notice"


@pytest.mark.parametrize("backend", [NATIVE, "reference"])
@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_outside_the_vocabulary_is_named(backend: str, bad: int) -> None:
    inputs = arguments(6, 11, 3, 9)
    inputs["ids"][4] = bad
    with pytest.raises(IndexError, match=rf"ids\[4\] is {bad}; the vocabulary has 11 ids"):
        text_stem(**inputs, dtype=FP32, backend=backend)
    if backend == "native":
        compiled = torch.compile(text_stem, fullgraph=True, backend="aot_eager")
        with pytest.raises(IndexError, match=rf"ids\[4\] is {bad}"):
            compiled(**inputs, dtype=FP32)


def interpreted(**inputs: Any) -> Tensor:
    return text_stem(**inputs, dtype=FP32, backend="triton")


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(interpreted, marks=pytest.mark.triton),
        functools.partial(text_stem_reference, dtype=FP32),
    ],
    ids=["triton", "reference"],
)
@pytest.mark.parametrize("vocabulary", [0, 11])
def test_an_id_outside_the_vocabulary_is_nan_where_it_cannot_raise(
    op: Any, vocabulary: int
) -> None:
    inputs = arguments(6, 11, 3, 9)
    inputs["weight"] = inputs["weight"][:vocabulary].clone()
    inputs["ids"][[1, 4]] = torch.tensor([-7, 11]).int()
    results = dict(forward_backward(op, inputs, ("weight",)))
    is_bad = (inputs["ids"] < 0) | (inputs["ids"] >= vocabulary)
    assert torch.equal(results["output 0"].isnan().all(1), is_bad)
    assert torch.equal(results["output 0"].isnan().any(1), is_bad)
    assert results["gradient of weight"].isfinite().all()


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
def test_frequent_ids(backend: str) -> None:
    """Runs that begin, end, cover and miss whole chunks of the sorted rows."""
    ids = torch.cat([torch.full((n,), v) for v, n in enumerate((100, 300, 0, 1, 55, 128, 3))])
    inputs = arguments(len(ids), 7, 3, 5) | {"ids": ids[torch.randperm(len(ids))].int()}
    op = functools.partial(text_stem, dtype=FP32, backend=backend)
    assert_matches(op, functools.partial(text_stem_reference, dtype=FP32), inputs)


@pytest.mark.native
def test_a_table_of_huge_pages() -> None:
    """Above 32 MiB the kernel asks for huge pages; the sums are still the sums."""
    grad, index = torch.randn(64, 256), torch.randint(40_000, (64,), dtype=torch.int32)
    weight = torch.zeros(40_000, 256, requires_grad=True)
    text_stem(index, weight, dtype=FP32, backend="native").backward(grad)
    torch.testing.assert_close(weight.grad, index_sum_reference(grad, index, 40_000))


@pytest.mark.native
def test_threads_give_the_same_bits(two_threads: None) -> None:
    inputs = arguments(900, 40, 30, 33)
    op = functools.partial(text_stem, dtype=BF16, backend="native")
    two = forward_backward(op, inputs)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(op, inputs))


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
def test_no_rows(backend: str) -> None:
    op = functools.partial(text_stem, dtype=FP32, backend=backend)
    results = dict(forward_backward(op, arguments(0, 4, 3, 8)))
    assert results["output 0"].shape == (0, 8)
    assert results["gradient of weight"].eq(0).all()
    assert results["gradient of position"].eq(0).all()


@pytest.mark.parametrize("has_position", [True, False])
def test_compiled_and_opcheck(has_position: bool) -> None:
    inputs = arguments(12, 9, 4, 8)
    if not has_position:
        inputs |= {"position": None, "position_index": None}
    op = functools.partial(text_stem, dtype=BF16)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_equal(forward_backward(compiled, inputs), forward_backward(op, inputs))
    for name in ("weight", "position"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    torch.library.opcheck(torch.ops.uml_fast.text_stem_fwd.default, (*inputs.values(), FP32))


def test_out_does_not_compile() -> None:
    inputs = arguments(12, 9, 4, 8) | {"dtype": FP32, "out": torch.empty(12, 8)}
    compiled = torch.compile(text_stem, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="out must be None"):
        compiled(**inputs)


INDEX = torch.zeros(6, dtype=torch.int32)
BAD = {
    "ids int64": ({"ids": torch.zeros(6).long()}, TypeError, "ids are torch.int64"),
    "ids 2-D": ({"ids": INDEX[:, None]}, ValueError, r"must be \[rows\]"),
    "ids strides": ({"ids": INDEX.repeat(2)[::2]}, ValueError, "ids has strides"),
    "integers": ({"weight": torch.ones(5, 8).int()}, TypeError, "weight is torch.int32"),
    "weight": ({"weight": torch.ones(8)}, ValueError, r"must be \[vocabulary, width\]"),
    "strides": ({"weight": torch.ones(8, 5).t()}, ValueError, "weight has strides"),
    "width": ({"position": torch.ones(3, 7)}, ValueError, r"it must be \[3, 8\]"),
    "no position": ({"position": None}, ValueError, "given together"),
    "no index": ({"position_index": None}, ValueError, "given together"),
    "empty position": ({"position": torch.ones(0, 8)}, ValueError, "needs a row"),
    "index dtype": ({"position_index": INDEX.long()}, TypeError, "position_index is torch.int64"),
    "index rows": ({"position_index": INDEX[:5]}, ValueError, r"must be \[6\]"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
    "out dtype": ({"out": torch.ones(6, 8)}, TypeError, "out is torch.float32"),
    "out shape": ({"out": torch.ones(5, 8).bfloat16()}, ValueError, r"out is \[5, 8\]"),
    "out strides": ({"out": torch.ones(8, 6).bfloat16().t()}, ValueError, "out has strides"),
    "out with gradient": (
        {"out": torch.ones(6, 8, dtype=BF16, requires_grad=True)}, ValueError, "plain buffer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    inputs = arguments(6, 5, 3, 8) | {"dtype": BF16} | change
    with pytest.raises(error, match=message):
        text_stem(**inputs, backend=backend)
