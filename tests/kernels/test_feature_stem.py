"""Feature stem against the float64 reference; what only it does: rows that are not valid, NaN."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_in_place_with_its_gradient(backend: str) -> None:
    inputs = arguments()
    op = functools.partial(feature_stem, backend=backend)

    def through_buffer(**x: Any) -> Tensor:
        buffer = torch.full((12, 10), 7.0)
        tokens = op(**x, out=buffer[2:11])
        assert tokens.data_ptr() == buffer[2:].data_ptr()
        assert buffer[[0, 1, 11]].eq(7).all()
        assert torch.equal(tokens, buffer[2:11]) and not buffer.requires_grad
        return tokens

    want = forward_backward(op, inputs, PARAMETERS)
    assert_equal(forward_backward(through_buffer, inputs, PARAMETERS), want)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_threads_give_the_same_bits(two_threads: None, dtype: torch.dtype) -> None:
    """Of what this project computes; PyTorch's product is not the subject."""
    inputs = arguments(dtype, C=600)
    op = functools.partial(feature_stem, backend="native")
    two = forward_backward(op, inputs, ("bias", "position"))
    torch.set_num_threads(1)
    assert_equal(two[1:], forward_backward(op, inputs, ("bias", "position"))[1:])


@pytest.mark.parametrize("with_all", [True, False])
def test_compiled_and_opcheck(with_all: bool) -> None:
    inputs = arguments(BF16)
    wanted = PARAMETERS
    if not with_all:
        absent = ("position", "position_index", "mean", "deviation", "valid")
        inputs |= dict.fromkeys(absent) | {"rows": torch.randn(9, 6)}
        wanted = ("weight", "bias")
    compiled = torch.compile(feature_stem, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, wanted)
    assert_equal(got, forward_backward(feature_stem, inputs, wanted))
    inputs["rows"] = torch.randn(9, 6)
    tensors = {k: v.requires_grad_() if k in wanted else v for k, v in inputs.items()}
    torch.library.opcheck(torch.ops.uml_fast.feature_stem_fwd.default, tuple(tensors.values()))


def test_out_is_refused_inside_a_compiled_graph() -> None:
    compiled = torch.compile(feature_stem, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="out must be None inside a compiled graph"):
        compiled(**arguments(), out=torch.empty(9, 10))


BAD = {
    "rows dtype": ({"rows": torch.ones(9, 6).half()}, TypeError, "rows are torch.float16"),
    "rows dimensions": ({"rows": torch.ones(9)}, ValueError, r"must be \[rows, features\]"),
    "rows strides": ({"rows": torch.ones(6, 9).t()}, ValueError, "rows has strides"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
    "weight shape": ({"weight": torch.ones(10, 5)}, ValueError, r"it must be \[10, 6\]"),
    "bias": ({"bias": torch.ones(9)}, ValueError, r"bias is \[9\]; it must be \[10\]"),
    "position": ({"position": torch.ones(3, 9)}, ValueError, r"position is \[3, 9\]"),
    "no position": ({"position": None}, ValueError, "position_index is given"),
    "no index": ({"position_index": None}, ValueError, "position is given"),
    "index dtype": ({"position_index": torch.zeros(9).long()}, TypeError, "must be int32"),
    "mean alone": ({"deviation": None}, ValueError, "must both be given"),
    "mean": ({"mean": torch.ones(5)}, ValueError, r"mean is \[5\]; it must be \[6\]"),
    "deviation": ({"deviation": torch.ones(7)}, ValueError, r"deviation is \[7\]"),
    "deviation zero": (
        {"deviation": torch.tensor([1.0, 1, 1, 0, 1, 1])}, ValueError, "feature 3 is 0.0"),
    "valid dtype": ({"valid": torch.ones(9).byte()}, TypeError, "valid is torch.uint8"),
    "valid shape": ({"valid": torch.ones(8).bool()}, ValueError, r"valid is \[8\]"),
    "valid strides": ({"valid": torch.ones(18).bool()[::2]}, ValueError, "valid has strides"),
    "out dtype": ({"out": torch.ones(9, 10).bfloat16()}, TypeError, "out is torch.bfloat16"),
    "out shape": ({"out": torch.ones(8, 10)}, ValueError, r"out is \[8, 10\]"),
    "out strides": ({"out": torch.ones(9, 20)[:, ::2]}, ValueError, "out has strides"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        feature_stem(**arguments() | change, backend=backend)
