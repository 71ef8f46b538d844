"""Residual addition with layer norm against the float64 reference, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference

# One column (variance zero); fewer than a vector; a prime; the paper's widths 40 and 300; exactly
# two vectors; more rows than one chunk of partial sums.
SHAPES = [(2, 1), (3, 5), (17, 37), (5, 40), (4, 300), (1, 32), (50, 64)]
BF16, FP32 = torch.bfloat16, torch.float32
# Dtypes of (input, residual): all fp32; post-norm in bf16; pre-norm with an fp32 stream; the rest.
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)]


def arguments(rows: int, cols: int, input: torch.dtype, residual: torch.dtype) -> dict:
    return {
        "input": torch.randn(rows, cols).to(input),
        "residual": (torch.randn(rows, cols) + 1).to(residual),
        "weight": torch.randn(cols) + 1,
        "bias": torch.randn(cols),
    }


def native(**x: object) -> tuple[Tensor, Tensor]:
    return add_layer_norm(**x, return_sum=True, backend="native")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_matches(
    instruction_set: str, rng_key: Tensor, shape: tuple[int, int], dtypes: tuple
) -> None:
    inputs = arguments(*shape, *dtypes)
    for dropout_p in (0.0, 0.3):
        options = {"dropout_p": dropout_p, "rng_key": rng_key, "site": 2}
        assert_matches(native, add_layer_norm_reference, inputs | options)


@pytest.mark.native
def test_without_the_sum_is_the_same_norm(rng_key: Tensor) -> None:
    inputs = arguments(9, 40, FP32, FP32) | {"dropout_p": 0.3, "rng_key": rng_key}
    got = forward_backward(lambda **x: add_layer_norm(**x, backend="native"), inputs)
    want = forward_backward(lambda **x: native(**x)[0], inputs)
    assert_equal(got, want)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32)], ids=str)
def test_one_gradient_for_both_inputs(dtypes: tuple, compiled: bool) -> None:
    """Without dropout and in one dtype it is written once; added up it is still right."""
    op = torch.compile(native, fullgraph=True, backend="aot_eager") if compiled else native
    x = torch.randn(9, 40).to(dtypes[0]).requires_grad_()
    inputs = arguments(9, 40, *dtypes) | {"input": x}
    inputs["residual"].requires_grad_()
    a, b = torch.autograd.grad(op(**inputs)[0].sum(), (x, inputs["residual"]))
    assert (a.data_ptr() == b.data_ptr()) == (dtypes == (FP32, FP32))
    normed, _ = op(**inputs | {"residual": x.to(dtypes[1])})
    (both,) = torch.autograd.grad(normed.sum(), x)
    normed, _ = add_layer_norm_reference(**inputs | {"residual": x.to(dtypes[1])})
    (expected,) = torch.autograd.grad(normed.sum(), x)
    torch.testing.assert_close(both, expected)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_outputs_past_the_caches(rng_key: Tensor, dtype: torch.dtype) -> None:
    """Outputs of 24 MB and more are stored with other instructions: the same bits."""
    rows = 24 * 2**20 // (2 * 512 * dtype.itemsize)
    few, many = arguments(8, 512, dtype, dtype), arguments(rows, 512, dtype, dtype)
    options = {"weight": few["weight"], "bias": few["bias"], "dropout_p": 0.1, "rng_key": rng_key}
    for name in ("input", "residual"):
        many[name][:8] = few[name]
    got, want = (forward_backward(native, inputs | options) for inputs in (many, few))
    for i in (0, 1):
        assert torch.equal(got[i][1][:8], want[i][1])
    plain = dict(forward_backward(add_layer_norm_reference, many | options))
    for name in ("gradient of input", "gradient of residual"):
        torch.testing.assert_close(dict(got)[name], plain[name], rtol=2e-2, atol=1e-2)


@pytest.mark.native
def test_gradient_of_the_sum_alone() -> None:
    inputs = arguments(9, 40, FP32, FP32)
    results = dict(forward_backward(lambda **x: native(**x)[1], inputs))
    assert torch.equal(results["gradient of input"], results["gradient of residual"])
    assert results["gradient of weight"].eq(0).all()


@pytest.mark.native
def test_large_mean_keeps_its_precision() -> None:
    """Two passes over the row: the variance is not a difference of large numbers."""
    inputs = arguments(4, 300, FP32, FP32)
    inputs["residual"] = inputs["residual"] + 1000
    assert_matches(native, add_layer_norm_reference, inputs)


@pytest.mark.native
def test_threads_give_the_same_bits(rng_key: Tensor, two_threads: None) -> None:
    inputs = arguments(300, 40, BF16, FP32) | {"dropout_p": 0.1, "rng_key": rng_key}
    two = forward_backward(native, inputs)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(native, inputs))


def test_no_rows() -> None:
    results = dict(forward_backward(add_layer_norm, arguments(0, 8, FP32, FP32)))
    assert results["output 0"].shape == (0, 8)
    assert results["gradient of weight"].eq(0).all()


@pytest.mark.parametrize("return_sum", [False, True])
def test_compiled_and_opcheck(rng_key: Tensor, return_sum: bool) -> None:
    inputs = arguments(5, 8, BF16, FP32)
    inputs |= {"dropout_p": 0.5, "rng_key": rng_key, "return_sum": return_sum}
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    assert_equal(forward_backward(compiled, inputs), forward_backward(add_layer_norm, inputs))
    tensors = [t.requires_grad_() for t in arguments(5, 8, FP32, FP32).values()]
    torch.library.opcheck(
        torch.ops.uml_fast.add_layer_norm_fwd.default,
        (*tensors, 1e-5, 0.5, rng_key, 1, return_sum),
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
        add_layer_norm(**arguments(4, 8, FP32, FP32) | change, backend=backend)
