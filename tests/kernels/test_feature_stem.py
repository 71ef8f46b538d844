"""Feature stem against the float64 reference; what only it does: rows that are not valid, NaN."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.feature_stem import SPEC, feature_stem

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
SHAPE = {"C": 9, "F": 6, "D": 10, "P": 3}
PARAMETERS = ("weight", "bias", "position")


def arguments(dtype: torch.dtype = FP32, **change: Any) -> dict[str, Any]:
    return SPEC.inputs(SHAPE | change, dtype, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
# Features: one; a prime below and above a vector; exactly two vectors. 131 rows: a chunk and 3.
@pytest.mark.parametrize("features", [1, 13, 32, 37])
def test_matches_on_every_instruction_set(
    instruction_set: str, features: int, dtype: torch.dtype
) -> None:
    native = functools.partial(feature_stem, backend="native")
    reference = functools.partial(feature_stem, backend="reference")
    for standardise in (True, False):
        inputs = arguments(dtype, C=131, F=features, standardise=standardise)
        assert_matches(native, reference, inputs, PARAMETERS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rows_that_are_not_valid_count_as_zeros(backend: str, dtype: torch.dtype) -> None:
    """Whatever they hold: their tokens are bias and position, and no gradient sees them."""
    inputs = arguments(dtype)
    inputs["valid"] = torch.tensor([True, False] * 4 + [True])
    op = functools.partial(feature_stem, backend=backend)
    results = []
    for garbage in (0.0, 1e30, float("inf"), float("nan")):
        rows = torch.where(inputs["valid"].unsqueeze(1), torch.ones(9, 6), garbage)
        results.append(forward_backward(op, inputs | {"rows": rows}, PARAMETERS))
        assert_equal(results[0], results[-1])
    index = inputs["position_index"].clamp(max=2).long()
    want = (inputs["bias"] + inputs["position"][index])[1::2]
    tolerance = 1e-6 if dtype == FP32 else 0.05
    assert torch.allclose(results[0][0][1][1::2].float(), want, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy's, interpreted
def test_a_feature_that_is_not_finite_reaches_its_tokens_alone(
    backend: str, dtype: torch.dtype, standardise: bool
) -> None:
    inputs = arguments(dtype, standardise=standardise) | {"valid": None}
    inputs["rows"] = torch.ones(9, 6)
    inputs["rows"][2, 3] = float("nan")
    inputs["rows"][7, 5] = float("inf")
    tokens = feature_stem(**inputs, backend=backend)
    assert tokens[2].isnan().all()
    assert not tokens[7].isfinite().any()
    assert tokens[[0, 1, 3, 4, 5, 6, 8]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rows_alone(backend: str, dtype: torch.dtype) -> None:
    """Nothing but rows, weight and bias: a linear layer."""
    inputs = arguments(dtype, standardise=False)
    inputs |= {"rows": torch.randn(9, 6), "position": None, "position_index": None, "valid": None}
    op = functools.partial(feature_stem, backend=backend)
    reference = functools.partial(feature_stem, backend="reference")
    assert_matches(op, reference, inputs, ("weight", "bias"))
    want = torch.nn.functional.linear(inputs["rows"], inputs["weight"], inputs["bias"])
    tolerance = 1e-5 if dtype == FP32 else 0.1
    assert torch.allclose(op(**inputs).float(), want, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_keeps_its_precision(backend: str) -> None:
    """The mean is subtracted before anything is multiplied."""
    inputs = arguments(C=40)
    inputs |= {"rows": torch.randn(40, 6) + 1000, "mean": torch.full((6,), 1000.0)}
    op = functools.partial(feature_stem, backend=backend)
    reference = functools.partial(feature_stem, backend="reference")
    assert_matches(op, reference, inputs, PARAMETERS)


BAD = {
    "rows dtype": ({"rows": torch.ones(9, 6).half()}, TypeError, "rows are torch.float16"),
    "rows dimensions": ({"rows": torch.ones(9)}, ValueError, r"must be \[rows, features\]"),
    "rows strides": ({"rows": torch.ones(6, 9).t()}, ValueError, "rows has strides"),
    "no index": ({"position_index": None}, ValueError, "position is given"),
    "mean alone": ({"deviation": None}, ValueError, "must both be given"),
    "deviation zero": (
        {"deviation": torch.tensor([1.0, 1, 1, 0, 1, 1])}, ValueError, "feature 3 is 0.0"),
    "valid dtype": ({"valid": torch.ones(9).byte()}, TypeError, "valid is torch.uint8"),
    "valid shape": ({"valid": torch.ones(8).bool()}, ValueError, r"valid is \[8\]"),
    "valid strides": ({"valid": torch.ones(18).bool()[::2]}, ValueError, "valid has strides"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        feature_stem(**arguments() | change, backend=backend)
