"""Every op that has a SPEC: each backend against the float64 reference, on every shape it names."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import SPECS
from uml_fast.kernels.spec import KernelSpec

CASES = [
    pytest.param(spec, shape, dtype, id=f"{spec.name}-{why}-{str(dtype).removeprefix('torch.')}")
    for spec in SPECS
    for why, shape in spec.tests.items()
    for dtype in spec.dtypes
]
BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
]
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)


def arguments(
    spec: KernelSpec, shape: Any, dtype: torch.dtype, backend: str = "auto"
) -> dict[str, Any]:
    """Inputs on the CPU; those of Triton on the GPU where there is one."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    inputs = spec.inputs(shape, dtype, torch.Generator().manual_seed(0))
    return {k: v.cuda() if on_gpu and isinstance(v, Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("spec", "shape", "dtype"), CASES)
def test_matches_the_reference(
    spec: KernelSpec, shape: Any, dtype: torch.dtype, backend: str
) -> None:
    if dtype == torch.float16 and backend == "native":
        pytest.skip("fp16 has no CPU kernels")
    op = functools.partial(spec.function, backend=backend)
    reference = functools.partial(spec.function, backend="reference")
    assert_matches(op, reference, arguments(spec, shape, dtype, backend), spec.gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@EVERY_SPEC
def test_same_bits_twice(spec: KernelSpec, backend: str) -> None:
    inputs = arguments(spec, list(spec.tests.values())[-1], torch.float32, backend)
    op = functools.partial(spec.function, backend=backend)
    first = forward_backward(op, inputs, spec.gradients)
    assert_equal(first, forward_backward(op, inputs, spec.gradients))


@EVERY_SPEC
def test_compiles_without_a_graph_break(spec: KernelSpec) -> None:
    inputs = arguments(spec, list(spec.tests.values())[-1], torch.float32)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, spec.gradients)
    assert_equal(got, forward_backward(spec.function, inputs, spec.gradients))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@EVERY_SPEC
def test_non_contiguous_inputs_are_refused(spec: KernelSpec, backend: str) -> None:
    inputs = arguments(spec, list(spec.tests.values())[-1], torch.float32, backend)
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    name = (*spec.gradients, *tensors)[0]
    value = inputs[name]
    spread = value.new_empty(*value.shape[:-1], 2 * value.shape[-1])[..., ::2].copy_(value)
    with pytest.raises(ValueError, match=f"{name} has strides"):
        spec.function(**inputs | {name: spread}, backend=backend)
