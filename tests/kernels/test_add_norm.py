"""What both residual norms do alike: every instruction set, gradients, threads, compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import SPECS
from uml_fast.kernels.spec import KernelSpec

# One column (variance zero); fewer than a vector; a prime; the paper's widths 40 and 300; exactly
# two vectors; more rows than one chunk of partial sums.
SHAPES = [(2, 1), (3, 5), (17, 37), (5, 40), (4, 300), (1, 32), (50, 64)]
BF16, FP32 = torch.bfloat16, torch.float32
# Dtypes of (input, residual): all fp32; post-norm in bf16; pre-norm with an fp32 stream; the rest.
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)]
NORMS = [s for s in SPECS if s.name in ("add_layer_norm", "add_rms_norm")]
EVERY_NORM = pytest.mark.parametrize("spec", NORMS, ids=lambda s: s.name)


def arguments(
    spec: KernelSpec, rows: int, cols: int, input: torch.dtype = FP32, residual: torch.dtype = FP32
) -> dict[str, Any]:
    shape = {"T": rows, "K": cols, "residual": residual}
    inputs = spec.inputs(shape, input, torch.Generator().manual_seed(0))
    return {name: inputs[name] for name in spec.gradients}


def norm(spec: KernelSpec, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(spec.function, return_sum=True, backend=backend)


@EVERY_NORM
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_matches(
    instruction_set: str, rng_key: Tensor, spec: KernelSpec, shape: tuple[int, int], dtypes: tuple
) -> None:
    inputs = arguments(spec, *shape, *dtypes)
    for dropout_p in (0.0, 0.3):
        options = {"dropout_p": dropout_p, "rng_key": rng_key, "site": 2}
        assert_matches(norm(spec, "native"), norm(spec, "reference"), inputs | options)


@pytest.mark.native
@EVERY_NORM
def test_without_the_sum_is_the_same_norm(spec: KernelSpec, rng_key: Tensor) -> None:
    inputs = arguments(spec, 9, 40) | {"dropout_p": 0.3, "rng_key": rng_key}
    got = forward_backward(functools.partial(spec.function, backend="native"), inputs)
    want = forward_backward(lambda **x: norm(spec, "native")(**x)[0], inputs)
    assert_equal(got, want)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32)], ids=str)
@EVERY_NORM
def test_one_gradient_for_both_inputs(spec: KernelSpec, dtypes: tuple, compiled: bool) -> None:
    """Without dropout and in one dtype it is written once; added up it is still right."""
    op = norm(spec, "auto")
    op = torch.compile(op, fullgraph=True, backend="aot_eager") if compiled else op
    x = torch.randn(9, 40).to(dtypes[0]).requires_grad_()
    inputs = arguments(spec, 9, 40, *dtypes) | {"input": x}
    inputs["residual"].requires_grad_()
    a, b = torch.autograd.grad(op(**inputs)[0].sum(), (x, inputs["residual"]))
    assert (a.data_ptr() == b.data_ptr()) == (dtypes == (FP32, FP32))
    normed, _ = op(**inputs | {"residual": x.to(dtypes[1])})
    (both,) = torch.autograd.grad(normed.sum(), x)
    normed, _ = norm(spec, "reference")(**inputs | {"residual": x.to(dtypes[1])})
    (expected,) = torch.autograd.grad(normed.sum(), x)
    torch.testing.assert_close(both, expected)


@pytest.mark.native
@EVERY_NORM
def test_gradient_of_the_sum_alone(spec: KernelSpec) -> None:
    inputs = arguments(spec, 9, 40)
    results = dict(forward_backward(lambda **x: norm(spec, "native")(**x)[1], inputs))
    assert torch.equal(results["gradient of input"], results["gradient of residual"])
    assert results["gradient of weight"].eq(0).all()


@pytest.mark.native
@EVERY_NORM
def test_threads_give_the_same_bits(spec: KernelSpec, rng_key: Tensor, two_threads: None) -> None:
    inputs = arguments(spec, 300, 40, BF16, FP32) | {"dropout_p": 0.1, "rng_key": rng_key}
    two = forward_backward(norm(spec, "native"), inputs)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(norm(spec, "native"), inputs))


@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@EVERY_NORM
def test_compiled_and_opcheck(
    spec: KernelSpec, rng_key: Tensor, dropout_p: float, return_sum: bool
) -> None:
    inputs = arguments(spec, 5, 8, BF16, FP32)
    inputs |= {"dropout_p": dropout_p, "rng_key": rng_key, "return_sum": return_sum}
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    assert_equal(forward_backward(compiled, inputs), forward_backward(spec.function, inputs))
    tensors = {n: t.requires_grad_() for n, t in arguments(spec, 5, 8).items()}
    torch.library.opcheck(
        getattr(torch.ops.uml_fast, f"{spec.name}_fwd").default,
        (*(tensors.get(n) for n in ("input", "residual", "weight", "bias")), 1e-5, dropout_p,
         rng_key, 1, return_sum),
    )  # fmt: skip


BAD = {
    "integers": ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input is torch.int64"),
    "strides": ({"residual": torch.ones(8, 4).t()}, ValueError, "residual has strides"),
    "dimensions": ({"input": torch.ones(2, 4, 8)}, ValueError, r"must be \[rows, columns\]"),
    "shapes": ({"residual": torch.ones(4, 7)}, ValueError, "shapes differ"),
    "weight": ({"weight": torch.ones(7)}, ValueError, r"weight is \[7\]; it must be \[8\]"),
    "device": ({"weight": torch.ones(8, device="meta")}, ValueError, "devices differ"),
    "no key": ({"dropout_p": 0.1}, ValueError, "needs rng_key"),
}


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("case", BAD)
@EVERY_NORM
def test_bad_input(spec: KernelSpec, case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        spec.function(**arguments(spec, 4, 8) | change, backend=backend)
