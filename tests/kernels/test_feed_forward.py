"""The feed-forward block against the float64 reference, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.feed_forward import feed_forward, feed_forward_reference

# One row and column; primes; hidden narrower than the stream; the paper's block at d = 40 (a few
# rows); more rows than one chunk of partial sums.
SHAPES = [(1, 1, 1), (7, 13, 37), (5, 24, 10), (3, 40, 2048), (67, 16, 96)]


def arguments(rows: int, width: int, hidden: int, dtype: torch.dtype, masters: torch.dtype) -> dict:
    """Values near those of a trained block: pre-activations of unit scale, small biases.

    In bf16, pre-activations are multiples of 1/16 below 16 and never 0, hence exact: otherwise
    rounding decides which units near 0 are active, and the largest error tells nothing else.
    """
    x = {
        "input": torch.randn(rows, width),
        "weight_up": torch.randn(hidden, width) / width**0.5,
        "bias_up": torch.randn(hidden) / 4,
        "weight_down": torch.randn(width, hidden) / hidden**0.5,
        "bias_down": torch.randn(width) / 4,
    }
    if dtype == torch.bfloat16:
        x["input"] = x["input"].round().clamp(-2, 2)
        x["weight_up"] = (8 * x["weight_up"]).round().clamp(-2, 2) / 8
        x["bias_up"] = (8 * x["bias_up"]).round() / 8 + 1 / 16
    return {n: t.to(dtype if n == "input" else masters) for n, t in x.items()}


def native(**x: object) -> Tensor:
    return feed_forward(**x, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_matches(
    instruction_set: str, rng_key: Tensor, shape: tuple[int, int, int], activation: str,
    dropout_p: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    inputs = arguments(*shape, dtype, torch.float32)
    inputs |= {"activation": activation, "dropout_p": dropout_p, "rng_key": rng_key, "site": 2}
    assert_matches(native, feed_forward_reference, inputs)


@pytest.mark.native
def test_gradients_have_the_dtype_of_the_masters() -> None:
    inputs = arguments(4, 8, 16, torch.bfloat16, torch.float32)
    dtypes = [g.dtype for _, g in forward_backward(native, inputs)]
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 4


@pytest.mark.native
def test_frozen_block_gives_the_input_gradient_alone() -> None:
    x = arguments(4, 8, 16, torch.float32, torch.float32)
    x["input"].requires_grad_()
    native(**x).sum().backward()
    assert x["input"].grad is not None and x["weight_up"].grad is None


@pytest.mark.native
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_backward_twice_gives_the_same_bits(rng_key: Tensor, activation: str) -> None:
    """The backward pass overwrites its own buffers, never what was saved."""
    x = arguments(9, 8, 40, torch.float32, torch.float32)
    x = {n: t.requires_grad_() for n, t in x.items()}
    out = native(**x, activation=activation, dropout_p=0.3, rng_key=rng_key)
    first = torch.autograd.grad(out.sum(), list(x.values()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.native
def test_threads_give_the_same_bits(rng_key: Tensor, two_threads: None) -> None:
    """Of the kernels around the products; a stream of one column keeps the products exact."""
    inputs = arguments(200, 1, 96, torch.float32, torch.float32)
    inputs["weight_down"] = torch.zeros(1, 96).index_fill(1, torch.tensor([5]), 1.0)
    inputs |= {"dropout_p": 0.1, "rng_key": rng_key}
    two = forward_backward(native, inputs)
    torch.set_num_threads(1)
    one = forward_backward(native, inputs)
    exact = ("output 0", "gradient of bias_up", "gradient of bias_down")
    assert_equal([r for r in two if r[0] in exact], [r for r in one if r[0] in exact])


def test_no_rows() -> None:
    inputs = arguments(0, 8, 16, torch.float32, torch.float32)
    results = dict(forward_backward(feed_forward, inputs))
    assert results["output 0"].shape == (0, 8)
    assert all(results[f"gradient of {n}"].eq(0).all() for n in inputs if n != "input")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_compiled_and_opcheck(rng_key: Tensor, activation: str) -> None:
    inputs = arguments(5, 8, 16, torch.bfloat16, torch.float32)
    inputs |= {"activation": activation, "dropout_p": 0.5, "rng_key": rng_key}
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    assert_equal(forward_backward(compiled, inputs), forward_backward(feed_forward, inputs))
    tensors = arguments(5, 8, 16, torch.float32, torch.float32).values()
    torch.library.opcheck(
        torch.ops.uml_fast.feed_forward_fwd.default,
        (*[t.requires_grad_() for t in tensors], activation, 0.5, rng_key, 1),
    )


BAD = {
    "integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input is torch.int64"),
    "strides": ({"input": torch.ones(8, 4).t()}, ValueError, "input has strides"),
    "dimensions": ({"input": torch.ones(2, 4, 8)}, ValueError, "must have two dimensions"),
    "width": ({"input": torch.ones(4, 7)}, ValueError, r"weight_up is \[16, 8\]"),
    "bias": ({"bias_up": torch.ones(15)}, ValueError, r"bias_up is \[15\]; it must be \[16\]"),
    "down": ({"weight_down": torch.ones(8, 15)}, ValueError, r"must be \[8, 16\]"),
    "activation": ({"activation": "swish"}, ValueError, "'swish' is not one of"),
    "no key": ({"dropout_p": 0.1}, ValueError, "needs rng_key"),
}


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        feed_forward(**arguments(4, 8, 16, torch.float32, torch.float32) | change, backend=backend)
