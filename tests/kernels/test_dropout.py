"""Dropout: the native kernels give the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, forward_backward
from uml_fast.kernels.dropout import dropout, dropout_reference

# One element; odd columns (rows start at pairs); fewer columns than two vectors; exactly two
# vectors of the widest set; one more; the wide hidden layer.
SHAPES = [(1, 1), (3, 7), (5, 33), (4, 32), (2, 3, 65), (3, 2048)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_same_bits_as_reference(
    instruction_set: str, rng_key: Tensor, shape: tuple[int, ...], p: float, dtype: torch.dtype
) -> None:
    inputs = {"input": torch.randn(shape).to(dtype), "p": p, "rng_key": rng_key, "site": 3}
    got = forward_backward(lambda **x: dropout(**x, backend="native"), inputs)
    assert_equal(got, forward_backward(dropout_reference, inputs))


@pytest.mark.native
def test_mask_does_not_depend_on_threads(rng_key: Tensor, two_threads: None) -> None:
    x = torch.ones(1000, 64)
    two = dropout(x, 0.3, rng_key, 0, backend="native")
    torch.set_num_threads(1)
    assert torch.equal(two, dropout(x, 0.3, rng_key, 0, backend="native"))
    assert (two == 0).any()


def test_gradient_uses_the_mask_of_the_forward_pass(rng_key: Tensor) -> None:
    x = torch.ones(64, 64, requires_grad=True)
    y = dropout(x, 0.5, rng_key, 1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_no_dropout_is_the_input_itself() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, None, 0) is x


@pytest.mark.parametrize("rows", [0, 3])
def test_empty(rng_key: Tensor, rows: int) -> None:
    assert dropout(torch.empty(rows, 0), 0.5, rng_key, 0).shape == (rows, 0)


def test_compiled_and_opcheck(rng_key: Tensor) -> None:
    x = torch.randn(5, 9, requires_grad=True)
    compiled = torch.compile(
        lambda x: dropout(x, 0.4, rng_key, 2), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), dropout(x, 0.4, rng_key, 2))
    torch.library.opcheck(torch.ops.uml_fast.dropout.default, (x, 0.4, rng_key, 2))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_bad_input(rng_key: Tensor, backend: str) -> None:
    with pytest.raises(TypeError, match=r"input is torch\.int64"):
        dropout(torch.ones(2, 2, dtype=torch.int64), 0.5, rng_key, 0, backend=backend)
    with pytest.raises(ValueError, match="must be contiguous"):
        dropout(torch.ones(2, 3).t(), 0.5, rng_key, 0, backend=backend)
