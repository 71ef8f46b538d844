"""Means of ragged segments against the float64 reference, and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.segment_mean import segment_mean, segment_mean_reference

# One row; empty segments at both ends and between; more segments than one chunk; one long segment.
LENGTHS = {"one row": [1], "edges": [0, 3, 0, 0, 7, 1, 0], "many": [2, 5, 3] * 9, "long": [977]}


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def native(**x: object) -> Tensor:
    return segment_mean(**x, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("cols", [1, 16, 37, 300])
def test_matches(instruction_set: str, name: str, cols: int, dtype: torch.dtype) -> None:
    offsets = offsets_of(LENGTHS[name])
    inputs = {"input": torch.randn(int(offsets[-1]), cols).to(dtype), "offsets": offsets}
    assert_matches(native, segment_mean_reference, inputs)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_values(backend: str) -> None:
    x = torch.tensor([[2.0], [4.0], [9.0]])
    means = segment_mean(x, offsets_of([2, 0, 1]), backend=backend)
    assert means.tolist() == [[3.0], [0.0], [9.0]]


@pytest.mark.native
def test_threads_give_the_same_bits(two_threads: None) -> None:
    inputs = {"input": torch.randn(900, 33), "offsets": offsets_of([4, 14] * 50)}
    two = forward_backward(native, inputs)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(native, inputs))


def test_no_rows() -> None:
    x = torch.empty(0, 5, requires_grad=True)
    means = segment_mean(x, offsets_of([0, 0]))
    means.sum().backward()
    assert means.tolist() == [[0.0] * 5] * 2 and x.grad.shape == (0, 5)


def test_compiled_and_opcheck() -> None:
    inputs = {"input": torch.randn(12, 9), "offsets": offsets_of([4, 0, 8])}
    compiled = torch.compile(segment_mean, fullgraph=True, backend="aot_eager")
    assert_equal(forward_backward(compiled, inputs), forward_backward(segment_mean, inputs))
    torch.library.opcheck(
        torch.ops.uml_fast.segment_mean_fwd.default,
        (inputs["input"].requires_grad_(), inputs["offsets"]),
    )


BAD = {
    "integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input is torch.int64"),
    "strides": ({"input": torch.ones(8, 4).t()}, ValueError, "input has strides"),
    "dimensions": ({"input": torch.ones(4)}, ValueError, r"must be \[rows, columns\]"),
    "decreasing": ({"offsets": torch.tensor([0, 3, 2, 4]).int()}, ValueError,
                   "decrease from 3 to 2"),
    "end": ({"offsets": torch.tensor([0, 5]).int()}, ValueError, "must run from 0 to 4"),
    "type": ({"offsets": torch.tensor([0, 4])}, TypeError, "must be int32"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    arguments = {"input": torch.ones(4, 8), "offsets": offsets_of([1, 3])} | change
    with pytest.raises(error, match=message):
        segment_mean(**arguments, backend=backend)
