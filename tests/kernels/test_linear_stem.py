"""What the stems of images and features do alike: out, threads, compiled graphs, parameters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import SPECS
from uml_fast.kernels.spec import KernelSpec

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
SHAPES = {
    "image_stem": {"N": 5, "H": 6, "W": 4, "channels": 3, "patch": (3, 2), "D": 10, "P": 3},
    "feature_stem": {"C": 20, "F": 18, "D": 10, "P": 3},
}
"""20 rows of 18 features or elements of a patch."""
PARAMETERS = ("weight", "bias", "position")
STEMS = [s for s in SPECS if s.name in SHAPES]
EVERY_STEM = pytest.mark.parametrize("spec", STEMS, ids=lambda s: s.name)
WITHOUT_TABLE: dict[str, Any] = {"position": None, "position_index": None}


def arguments(spec: KernelSpec, dtype: torch.dtype = FP32, **change: Any) -> dict[str, Any]:
    inputs = spec.inputs(SHAPES[spec.name] | change, dtype, torch.Generator().manual_seed(0))
    if "valid" in inputs:
        inputs["rows"] = inputs["rows"].nan_to_num()  # comparisons of inputs know no NaN
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@EVERY_STEM
def test_without_a_table(spec: KernelSpec, backend: str, dtype: torch.dtype) -> None:
    op = functools.partial(spec.function, backend=backend)
    reference = functools.partial(spec.function, backend="reference")
    assert_matches(op, reference, arguments(spec, dtype) | WITHOUT_TABLE, ("weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@EVERY_STEM
def test_out_is_written_in_place_with_its_gradient(spec: KernelSpec, backend: str) -> None:
    """Rows of a pack's buffer: no other row changes; what is returned carries the gradient."""
    inputs = arguments(spec)
    op = functools.partial(spec.function, backend=backend)

    def through_buffer(**x: Any) -> Tensor:
        buffer = torch.full((24, 10), 7.0)
        version = buffer._version
        tokens = op(**x, out=buffer[3:23])
        assert tokens.data_ptr() == buffer[3:].data_ptr()
        assert buffer[:3].eq(7).all()
        assert buffer[23:].eq(7).all()
        assert torch.equal(tokens, buffer[3:23]) and not buffer.requires_grad
        assert buffer._version > version, "a graph that saved its older rows must notice"
        return tokens

    want = forward_backward(op, inputs, PARAMETERS)
    assert_equal(forward_backward(through_buffer, inputs, PARAMETERS), want)
    with torch.no_grad():
        assert torch.equal(through_buffer(**inputs), want[0][1])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@EVERY_STEM
def test_threads_give_the_same_bits(
    spec: KernelSpec, two_threads: None, dtype: torch.dtype
) -> None:
    """Of what this project computes; PyTorch's product is not the subject."""
    inputs = arguments(spec, dtype, N=300, C=600)
    op = functools.partial(spec.function, backend="native")
    two = forward_backward(op, inputs, ("bias", "position"))
    torch.set_num_threads(1)
    assert_equal(two[1:], forward_backward(op, inputs, ("bias", "position"))[1:])


@pytest.mark.parametrize("with_all", [True, False])
@EVERY_STEM
def test_compiled_and_opcheck(spec: KernelSpec, with_all: bool) -> None:
    inputs = arguments(spec, BF16)
    wanted = PARAMETERS
    if not with_all:
        absent = dict.fromkeys(("mean", "deviation", "valid")) if "valid" in inputs else {}
        inputs |= WITHOUT_TABLE | absent
        wanted = ("weight", "bias")
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, wanted)
    assert_equal(got, forward_backward(spec.function, inputs, wanted))
    values = [v.requires_grad_() if k in wanted else v for k, v in inputs.items()]
    flat = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
    torch.library.opcheck(getattr(torch.ops.uml_fast, f"{spec.name}_fwd").default, tuple(flat))


@EVERY_STEM
def test_out_is_refused_inside_a_compiled_graph(spec: KernelSpec) -> None:
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="out must be None inside a compiled graph"):
        compiled(**arguments(spec), out=torch.empty(20, 10))


BAD = {
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
    "weight dtype": ({"weight": torch.ones(10, 18).int()}, TypeError, "weight is torch.int32"),
    "weight dimensions": ({"weight": torch.ones(10)}, ValueError, r"must be \[width, features\]"),
    "weight shape": ({"weight": torch.ones(10, 17)}, ValueError, r"it must be \[10, 18\]"),
    "weight strides": ({"weight": torch.ones(18, 10).t()}, ValueError, "weight has strides"),
    "bias": ({"bias": torch.ones(9)}, ValueError, r"bias is \[9\]; it must be \[10\]"),
    "position": ({"position": torch.ones(3, 9)}, ValueError, r"position is \[3, 9\]"),
    "empty table": ({"position": torch.ones(0, 10)}, ValueError, r"position is \[0, 10\]"),
    "no position": ({"position": None}, ValueError, "position_index is given"),
    "index dtype": ({"position_index": torch.zeros(20).long()}, TypeError, "must be int32"),
    "index length": ({"position_index": torch.zeros(19).int()}, ValueError, r"is \[19\]"),
    "mean": ({"mean": torch.ones(1)}, ValueError, r"mean is \[1\]; it must be \[\d+\]"),
    "mean dtype": ({"mean": torch.ones(3).int()}, TypeError, "mean is torch.int32"),
    "deviation": ({"deviation": torch.ones(4)}, ValueError, r"deviation is \[4\]"),
    "out dtype": ({"out": torch.ones(20, 10).bfloat16()}, TypeError, "out is torch.bfloat16"),
    "out shape": ({"out": torch.ones(21, 10)}, ValueError, r"out is \[21, 10\]"),
    "out strides": ({"out": torch.ones(20, 20)[:, ::2]}, ValueError, "out has strides"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
@EVERY_STEM
def test_bad_input(spec: KernelSpec, case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        spec.function(**arguments(spec) | change, backend=backend)
