"""Layer norm of a residual sum: what is its own; test_add_norm.py has the rest."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_matches, forward_backward
from uml_fast.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference

native = functools.partial(add_layer_norm, return_sum=True, backend="native")


def arguments(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> dict:
    return {
        "input": torch.randn(rows, cols).to(dtype),
        "residual": (torch.randn(rows, cols) + 1).to(dtype),
        "weight": torch.randn(cols) + 1,
        "bias": torch.randn(cols),
    }


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_past_the_caches(rng_key: Tensor, dtype: torch.dtype) -> None:
    """Outputs of 24 MB and more are stored with other instructions: the same bits."""
    rows = 24 * 2**20 // (2 * 512 * dtype.itemsize)
    few, many = arguments(8, 512, dtype), arguments(rows, 512, dtype)
    options = {"weight": few["weight"], "bias": few["bias"], "dropout_p": 0.1, "rng_key": rng_key}
    for name in ("input", "residual"):
        many[name][:8] = few[name]
    got, want = (forward_backward(native, inputs | options) for inputs in (many, few))
    for i in (0, 1):
        assert torch.equal(got[i][1][:8], want[i][1])
    plain = dict(forward_backward(add_layer_norm_reference, many | options))
    for name in ("gradient of input", "gradient of residual"):
        torch.testing.assert_close(dict(got)[name], plain[name], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("triton", marks=pytest.mark.triton),
    ],
)
def test_large_mean_keeps_its_precision(backend: str) -> None:
    """Two passes over the row: the variance is not a difference of large numbers."""
    inputs = arguments(4, 300)
    inputs["residual"] = inputs["residual"] + 1000
    op = functools.partial(add_layer_norm, return_sum=True, backend=backend)
    assert_matches(op, add_layer_norm_reference, inputs)


def test_no_rows() -> None:
    results = dict(forward_backward(add_layer_norm, arguments(0, 8)))
    assert results["output 0"].shape == (0, 8)
    assert results["gradient of weight"].eq(0).all()
