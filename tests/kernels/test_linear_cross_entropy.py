"""Linear cross-entropy: classes, every instruction set, infinite logits."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import linear_cross_entropy
from uml_fast.kernels.linear_cross_entropy import SPEC, linear_cross_entropy_reference

BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
LEAVES = ("hidden", "weight", "bias")
native = functools.partial(linear_cross_entropy, backend="native")


def arguments(rows: int = 21, width: int = 12, classes: int = 10, **change: object) -> dict:
    inputs = SPEC.inputs(
        {"C": rows, "D": width, "V": classes}, torch.float32, torch.Generator().manual_seed(1)
    )
    return inputs | change


# Less than a vector of any instruction set, one more than a vector, several vectors.
@pytest.mark.parametrize("classes", [3, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_matches(instruction_set: str, classes: int, dtype: torch.dtype, ids: torch.dtype) -> None:
    inputs = arguments(70, 24, classes)
    inputs["hidden"], inputs["target"] = inputs["hidden"].to(dtype), inputs["target"].to(ids)
    assert_matches(native, linear_cross_entropy_reference, inputs, LEAVES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_is_torchs_cross_entropy_over_rows_that_predict(backend: str, shift: int) -> None:
    x = arguments(shift=shift)
    rows = [i for i in range(21 - shift) if x["predicts"][i]]
    logits = x["hidden"][rows] @ x["weight"].t() + x["bias"]
    want = F.cross_entropy(logits, x["target"][[i + shift for i in rows]].long())
    torch.testing.assert_close(linear_cross_entropy(**x, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_rows_that_do_not_count_are_not_read(backend: str) -> None:
    op = functools.partial(linear_cross_entropy, backend=backend)
    x = arguments()
    x["predicts"][4] = False
    clean = forward_backward(op, x, LEAVES)
    x["target"] = x["target"].clone()
    x["target"][5] = 2**30
    x["target"][0] = -1
    assert_equal(clean, forward_backward(op, x, LEAVES))


@pytest.mark.parametrize("backend", [BACKENDS[0], "reference"])
@pytest.mark.parametrize("wrong", [-1, 10])
def test_no_class_is_an_error_on_the_cpu(backend: str, wrong: int) -> None:
    x = arguments(predicts=torch.ones(21).bool())
    x["target"][7] = wrong
    message = rf"row 6 is scored against target\[7\] = {wrong}; classes are 0 to 9"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**x, backend=backend)


@pytest.mark.triton
@pytest.mark.parametrize("wrong", [-1, 10])
def test_no_class_is_nan_on_cuda(wrong: int) -> None:
    op = functools.partial(linear_cross_entropy, backend="triton")
    x = arguments(predicts=torch.ones(21).bool())
    x["target"][7] = wrong
    results = dict(forward_backward(op, x, LEAVES))
    assert results["output 0"].isnan()
    assert results["gradient of hidden"][6].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_counts_is_not_hidden(backend: str) -> None:
    x = arguments(predicts=torch.ones(21).bool())
    x["hidden"][5, 3] = torch.nan
    assert linear_cross_entropy(**x, backend=backend).isnan()


@pytest.mark.native
@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_one_nan_logit_is_enough(instruction_set: str, column: int) -> None:
    """Wherever in a vector it is, the last, shorter one included."""
    x = arguments(classes=37)
    x["bias"][column] = torch.nan
    assert native(**x).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_shut_off_and_large_logits(backend: str) -> None:
    """Minus infinity has probability zero, also a whole block; 1e4 does not overflow."""
    x = arguments(rows=9, width=4, classes=17_000)
    x["bias"][:16384] = -torch.inf
    x["bias"][16385] = 1e4
    x["target"] = x["target"] % 600 + 16_386
    op = functools.partial(linear_cross_entropy, backend=backend)
    got = dict(forward_backward(op, x, LEAVES))
    want = dict(forward_backward(linear_cross_entropy_reference, x, LEAVES))
    assert want["output 0"].isfinite()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)
    assert got["gradient of bias"][:16384].eq(0).all()


BAD = {
    "target dtype": ({"target": torch.ones(21)}, TypeError, "target is torch.float32; .* int32"),
    "target": ({"target": torch.ones(20).int()}, ValueError, r"target is \[20\]; .* \[21\]"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments(**change), backend=backend)
