"""The feed-forward block against the float64 reference, every gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.feed_forward import SPEC, feed_forward, feed_forward_reference

# One row and column; primes; hidden narrower than the stream; the paper's block at d = 40 (a few
# rows); more rows than one chunk of partial sums.
SHAPES = [(1, 1, 1), (7, 13, 37), (5, 24, 10), (3, 40, 2048), (67, 16, 96)]
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])


def arguments(
    rows: int, width: int, hidden: int, dtype: torch.dtype, activation: str = "relu"
) -> dict[str, Any]:
    """Tensors as the SPEC draws them, with fp32 masters."""
    shape = {"T": rows, "K": width, "N": hidden, "activation": activation}
    x = SPEC.inputs(shape, dtype, torch.Generator().manual_seed(0))
    return {n: x[n] for n in (*SPEC.gradients, "activation")}


def native(**x: object) -> Tensor:
    return feed_forward(**x, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ACTIVATIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_matches(
    instruction_set: str, rng_key: Tensor, shape: tuple[int, int, int], activation: str,
    dropout_p: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    inputs = arguments(*shape, dtype, activation)
    inputs |= {"dropout_p": dropout_p, "rng_key": rng_key, "site": 2}
    assert_matches(native, feed_forward_reference, inputs)


@pytest.mark.native
def test_gradients_have_the_dtype_of_the_masters() -> None:
    inputs = arguments(4, 8, 16, torch.bfloat16)
    dtypes = [g.dtype for _, g in forward_backward(native, inputs)]
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 4


@pytest.mark.native
@ACTIVATIONS
def test_frozen_block_takes_the_input_gradient_and_no_other_product(activation: str) -> None:
    found, products = [], []
    for trains in (True, False):
        x = arguments(4, 8, 16, torch.float32, activation)
        x["input"].requires_grad_()
        for name in ("weight_up", "bias_up", "weight_down", "bias_down"):
            x[name].requires_grad_(trains)
        out = native(**x).sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        found.append(x["input"].grad)
        products.append(counter.get_total_flops())
        assert (x["weight_up"].grad is not None) == trains
    assert torch.equal(*found) and products[1] == products[0] / 2


@pytest.mark.native
@ACTIVATIONS
def test_backward_twice_gives_the_same_bits(rng_key: Tensor, activation: str) -> None:
    """The backward pass overwrites its own buffers, never what was saved."""
    x = arguments(9, 8, 40, torch.float32, activation)
    leaves = [x[n].requires_grad_() for n in SPEC.gradients]
    out = native(**x, dropout_p=0.3, rng_key=rng_key)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.native
def test_threads_give_the_same_bits(rng_key: Tensor, two_threads: None) -> None:
    """Of the kernels around the products; a stream of one column keeps the products exact."""
    inputs = arguments(200, 1, 96, torch.float32)
    inputs["weight_down"] = torch.zeros(1, 96).index_fill(1, torch.tensor([5]), 1.0)
    inputs |= {"dropout_p": 0.1, "rng_key": rng_key}
    two = forward_backward(native, inputs)
    torch.set_num_threads(1)
    one = forward_backward(native, inputs)
    exact = ("output 0", "gradient of bias_up", "gradient of bias_down")
    assert_equal([r for r in two if r[0] in exact], [r for r in one if r[0] in exact])


@pytest.mark.native
def test_backward_uses_the_cast_of_the_forward_pass() -> None:
    """Masters are cast once a step, so they may change between the passes."""
    x = arguments(4, 8, 16, torch.bfloat16)
    out = native(**x | {"input": x["input"].requires_grad_()})
    want = torch.autograd.grad(out.sum(), x["input"], retain_graph=True)[0]
    x["weight_up"].zero_()
    x["weight_down"].zero_()
    assert want.abs().max() > 0
    assert torch.equal(torch.autograd.grad(out.sum(), x["input"])[0], want)


@pytest.mark.triton
@ACTIVATIONS
def test_large_tiles(monkeypatch: pytest.MonkeyPatch, rng_key: Tensor, activation: str) -> None:
    """The tile of large packs, which the shapes of the SPEC have too few rows for."""
    kernels = pytest.importorskip("uml_fast.kernels.triton.feed_forward")
    monkeypatch.setattr(kernels, "processors", lambda: 1)
    assert kernels.launch_config(130, 140, 40, torch.bfloat16).block_rows == 128
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = arguments(130, 40, 140, torch.bfloat16, activation)
    inputs |= {"dropout_p": 0.1, "rng_key": rng_key}
    inputs = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in inputs.items()}
    op = functools.partial(feed_forward, backend="triton")
    assert_matches(op, feed_forward_reference, inputs, SPEC.gradients)


def test_gates_are_the_first_rows_of_the_up_weight() -> None:
    x = {
        n: t.double()
        for n, t in arguments(3, 4, 5, torch.float32, "swiglu").items()
        if n in SPEC.gradients
    }
    gate, value = (x["input"] @ x["weight_up"].T + x["bias_up"]).split(5, 1)
    hidden = gate * torch.sigmoid(gate) * value
    want = hidden @ x["weight_down"].T + x["bias_down"]
    torch.testing.assert_close(feed_forward(**x, activation="swiglu"), want)


@ACTIVATIONS
def test_compiled_and_opcheck(rng_key: Tensor, activation: str) -> None:
    inputs = arguments(5, 8, 16, torch.bfloat16, activation)
    inputs |= {"dropout_p": 0.5, "rng_key": rng_key}
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    found, wanted = (
        [(n, t.bfloat16() if "weight" in n else t) for n, t in forward_backward(f, inputs)]
        for f in (compiled, feed_forward)
    )  # a compiled graph rounds the gradients of the masters to bf16
    assert_equal(found, wanted)
    frozen = {n: t.clone() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    frozen["input"].requires_grad_()
    grads = [torch.autograd.grad(f(**frozen).sum(), frozen["input"])[0]
             for f in (compiled, feed_forward)]  # fmt: skip
    assert torch.equal(*grads)
    tensors = arguments(5, 8, 16, torch.float32, activation)
    torch.library.opcheck(
        torch.ops.uml_fast.feed_forward_fwd.default,
        (*[tensors[n].requires_grad_() for n in SPEC.gradients], activation, 0.5, rng_key, 1),
    )


BAD = {
    "integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input is torch.int64"),
    "strides": ({"input": torch.ones(8, 4).t()}, ValueError, "input has strides"),
    "dimensions": ({"input": torch.ones(2, 4, 8)}, ValueError, "must have two dimensions"),
    "width": ({"input": torch.ones(4, 7)}, ValueError, r"weight_up is \[16, 8\]"),
    "bias": ({"bias_up": torch.ones(15)}, ValueError, r"bias_up is \[15\]; it must be \[16\]"),
    "down": ({"weight_down": torch.ones(8, 15)}, ValueError, r"must be \[8, 16\]"),
    "activation": ({"activation": "swish"}, ValueError, "'swish' is not one of"),
    "half a gate": (
        {"activation": "swiglu", "weight_up": torch.ones(17, 8)},
        ValueError,
        r"weight_up is \[17, 8\]; it must be \[16, 8\]",
    ),
    "device": ({"bias_up": torch.ones(16, device="meta")}, ValueError, "devices differ"),
    "no key": ({"dropout_p": 0.1}, ValueError, "needs rng_key"),
}


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("triton", marks=pytest.mark.triton),
        "reference",
    ],
)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        feed_forward(**arguments(4, 8, 16, torch.float32) | change, backend=backend)
