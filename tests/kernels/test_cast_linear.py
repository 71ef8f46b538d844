"""A linear layer with fp32 masters: as plain torch, with gradients that are not rounded to bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from uml_fast.kernels.cast_linear import linear
from uml_fast.kernels.native.library import library
from uml_fast.kernels.native.linear import has_tiles


def gradients(shape: tuple[int, int, int], dtype: torch.dtype, has_bias: bool = True):
    """Output and gradients in ``dtype`` of fp32 masters, and those of float64 of what it rounds."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype).float()
    bias = torch.randn(outputs, generator=generator).to(dtype).float() if has_bias else None
    grad = torch.randn(rows, outputs, generator=generator).to(dtype)
    found = []
    for function, cast in ((linear, torch.Tensor.clone), (F.linear, torch.Tensor.double)):
        leaves = [None if t is None else cast(t).requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        wanted = [t for t in leaves if t is not None]
        found.append([out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))])
    return found


# why these: nothing, one row, no multiple of a tile, one more than two blocks of rows with several
# tasks of columns, a result that is the transpose of the product and one that is not
WHOLE = ((0, 64, 128), (1, 64, 64), (7, 64, 192), (513, 64, 448), (513, 448, 64), (40, 192, 576))
SHAPES = (*WHOLE, (1, 1, 1), (7, 13, 37))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_as_float64_in_fp32(shape, has_bias):
    for got, want in zip(*gradients(shape, torch.float32, has_bias), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16(shape):
    for got, want in zip(*gradients(shape, torch.bfloat16), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=0.3)


@pytest.mark.parametrize("shape", WHOLE)
def test_gradients_of_masters_are_not_rounded_to_bf16(shape):
    (_, _, *of_masters), (_, _, *wanted) = gradients(shape, torch.bfloat16)
    assert {t.dtype for t in of_masters} == {torch.float32}
    if library() is None or not has_tiles(torch.bfloat16, 64, 64):
        pytest.skip("no matrix tiles here")
    for got, want in zip(of_masters, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gradients((700, 192, 576), torch.bfloat16)[0])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*(f[2:] for f in found), strict=True):
        assert torch.equal(one, two)


def test_frozen_masters_get_no_gradient_and_rows_still_do():
    x = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.full((2, 3), 0.5), torch.zeros(2)
    linear(x, weight, bias).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_masters_may_change_between_the_passes():
    x = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.full((2, 3), 0.5, requires_grad=True)
    out = linear(x, weight, None)
    weight.data.zero_()
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
