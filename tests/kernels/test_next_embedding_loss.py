"""Next-embedding loss: what counts, every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import next_embedding_loss
from uml_fast.kernels.next_embedding_loss import SPEC, next_embedding_loss_reference

BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
LEAVES = ("hidden", "weight", "bias")
native = functools.partial(next_embedding_loss, backend="native")


def arguments(rows: int = 21, width: int = 12, features: int = 10, **change: object) -> dict:
    inputs = SPEC.inputs(
        {"C": rows, "D": width, "F": features}, torch.float32, torch.Generator().manual_seed(1)
    )
    return inputs | change


# Less than a vector of any instruction set, one more than a vector, several vectors.
@pytest.mark.parametrize("features", [3, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
def test_matches(
    instruction_set: str, passes: None, features: int, dtype: torch.dtype, target: torch.dtype
) -> None:
    inputs = arguments(70, 24, features)
    inputs["hidden"], inputs["target"] = inputs["hidden"].to(dtype), inputs["target"].to(target)
    assert_matches(native, next_embedding_loss_reference, inputs, LEAVES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_is_the_mean_over_rows_that_predict(backend: str, passes: None, shift: int) -> None:
    """By hand: no masks, the rows that count alone."""
    x = arguments(shift=shift)
    rows = [i for i in range(21 - shift) if x["predicts"][i]]
    predicted = x["hidden"][rows] @ x["weight"].t() + x["bias"]
    want = (predicted - x["target"][[i + shift for i in rows]]).square().mean()
    torch.testing.assert_close(next_embedding_loss(**x, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_does_not_count_has_no_effect(backend: str, passes: None) -> None:
    op = functools.partial(next_embedding_loss, backend=backend)
    x = arguments()
    x["predicts"][4] = False
    clean = forward_backward(op, x, LEAVES)
    x["target"] = x["target"].clone()
    x["target"][5] = torch.nan
    x["target"][0] = torch.nan
    assert_equal(clean, forward_backward(op, x, LEAVES))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_counts_is_not_hidden(backend: str, passes: None) -> None:
    x = arguments(predicts=torch.ones(21).bool())
    x["target"][5, 3] = torch.nan
    assert next_embedding_loss(**x, backend=backend).isnan()


BAD = {
    "target": ({"target": torch.ones(21, 9)}, ValueError, r"target is \[21, 9\]; .* \[21, 10\]"),
    "target dtype": ({"target": torch.ones(21, 10).int()}, TypeError, "target is torch.int32"),
    "strides": ({"target": torch.ones(10, 21).t()}, ValueError, "target has strides"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        next_embedding_loss(**arguments(**change), backend=backend)
