"""Residual addition with RMS norm: beyond its SPEC, every instruction set and what is its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

# As for the layer norm: one column; fewer than a vector; a prime; exactly two vectors; more rows
# than one chunk of partial sums.
SHAPES = [(2, 1), (3, 5), (17, 37), (1, 32), (50, 64)]
BF16, FP32 = torch.bfloat16, torch.float32


def arguments(rows: int, cols: int, input: torch.dtype, residual: torch.dtype) -> dict:
    return {
        "input": torch.randn(rows, cols).to(input),
        "residual": (torch.randn(rows, cols) + 1).to(residual),
        "weight": torch.randn(cols) + 1,
    }


def native(**x: object) -> tuple[Tensor, Tensor]:
    return add_rms_norm(**x, return_sum=True, backend="native")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
def test_matches(
    instruction_set: str, rng_key: Tensor, shape: tuple[int, int], dtypes: tuple
) -> None:
    inputs = arguments(*shape, *dtypes)
    for dropout_p in (0.0, 0.3):
        options = {"dropout_p": dropout_p, "rng_key": rng_key, "site": 2}
        assert_matches(native, add_rms_norm_reference, inputs | options)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("triton", marks=pytest.mark.triton),
        "reference",
    ],
)
def test_values(backend: str) -> None:
    """The mean is not taken off: 3 and 4 have the mean square 12.5; eps makes it 16."""
    normed, summed = add_rms_norm(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([1.0, 10.0]), 3.5,
        return_sum=True, backend=backend,
    )  # fmt: skip
    assert summed.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(normed, torch.tensor([[0.75, 10.0]]))


@pytest.mark.native
def test_threads_give_the_same_bits(rng_key: Tensor, two_threads: None) -> None:
    inputs = arguments(300, 40, BF16, FP32) | {"dropout_p": 0.1, "rng_key": rng_key}
    two = forward_backward(native, inputs)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(native, inputs))


@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(rng_key: Tensor, dropout_p: float, return_sum: bool) -> None:
    tensors = [t.requires_grad_() for t in arguments(5, 8, FP32, FP32).values()]
    torch.library.opcheck(
        torch.ops.uml_fast.add_rms_norm_fwd.default,
        (*tensors, 1e-6, dropout_p, rng_key, 1, return_sum),
    )


BAD = {
    "integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input is torch.int64"),
    "strides": ({"residual": torch.ones(8, 4).t()}, ValueError, "residual has strides"),
    "dimensions": ({"input": torch.ones(2, 4, 8)}, ValueError, r"must be \[rows, columns\]"),
    "shapes": ({"residual": torch.ones(4, 7)}, ValueError, "shapes differ"),
    "weight": ({"weight": torch.ones(7)}, ValueError, r"weight is \[7\]; it must be \[8\]"),
    "no key": ({"dropout_p": 0.1}, ValueError, "needs rng_key"),
}


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        add_rms_norm(**arguments(4, 8, FP32, FP32) | change, backend=backend)
