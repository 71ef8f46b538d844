"""What both losses of a linear layer do alike: chunks, threads, memory, compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.live_bytes import peak_bytes
from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import SPECS, linear_loss
from uml_fast.kernels.spec import KernelSpec

BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
LEAVES = ("hidden", "weight", "bias")
LOSSES = [s for s in SPECS if s.name in ("linear_cross_entropy", "next_embedding_loss")]
EVERY_LOSS = pytest.mark.parametrize("spec", LOSSES, ids=lambda s: s.name)


def arguments(
    spec: KernelSpec, rows: int = 21, width: int = 12, outputs: int = 10, **change: object
) -> dict[str, Any]:
    shape = {"C": rows, "D": width, "F": outputs, "V": outputs}
    return spec.inputs(shape, torch.float32, torch.Generator().manual_seed(1)) | change


def loss(spec: KernelSpec, backend: str) -> Callable[..., Tensor]:
    return functools.partial(spec.function, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"predicts": torch.zeros(21).bool()}, {"shift": 21}])
@EVERY_LOSS
def test_no_row_counts(spec: KernelSpec, backend: str, change: dict[str, Any]) -> None:
    for name, value in forward_backward(loss(spec, backend), arguments(spec, **change), LEAVES):
        assert value.eq(0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@EVERY_LOSS
def test_incoming_gradients_of_two_backward_passes(spec: KernelSpec, backend: str) -> None:
    """The gradients that forward computed survive a backward pass and follow its factor."""
    x = arguments(spec)
    leaves = [x[n].requires_grad_() for n in LEAVES]
    out = loss(spec, backend)(**x)
    first = torch.autograd.grad(out, leaves, torch.tensor(-0.5), retain_graph=True)
    second = torch.autograd.grad(out, leaves, torch.tensor(4.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, -8 * a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
@EVERY_LOSS
def test_some_gradients_alone(
    spec: KernelSpec, backend: str, passes: None, wanted: tuple[str, ...]
) -> None:
    op = loss(spec, backend)
    every = dict(forward_backward(op, arguments(spec), LEAVES))
    some = forward_backward(op, arguments(spec), wanted)
    assert len(some) == 1 + len(wanted)
    for name, value in some:
        assert torch.equal(value, every[name]), name


@pytest.mark.parametrize("backend", BACKENDS[:2])
@EVERY_LOSS
def test_chunks_give_the_same_loss(
    spec: KernelSpec, backend: str, passes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 64 rows: two whole ones, one more of 64 - 1, one of one row; several tasks."""
    monkeypatch.setitem(linear_loss.SCRATCH_BYTES, "cpu", 64 * 40 * 4)
    assert linear_loss.chunk_rows(129, 40, 2, 4, "cpu") == 64
    for rows in (129, 130, 192, 600):
        inputs = arguments(spec, rows, 2, 40)
        assert_matches(loss(spec, backend), loss(spec, "reference"), inputs, LEAVES)


@pytest.mark.native
@EVERY_LOSS
def test_threads_give_the_same_bits(spec: KernelSpec, two_threads: None, passes: None) -> None:
    inputs = arguments(spec, 300, 16, 40)
    two = forward_backward(loss(spec, "native"), inputs, LEAVES)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(loss(spec, "native"), inputs, LEAVES))


def full(op: Callable[..., Tensor], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op(**inputs), [inputs[n] for n in LEAVES])


@pytest.mark.native
@EVERY_LOSS
def test_memory_is_a_third_of_plain_torch(spec: KernelSpec) -> None:
    inputs = arguments(spec, 32_768, 8, 1024)
    inputs |= {n: inputs[n].requires_grad_() for n in LEAVES}
    inputs["hidden"] = inputs["hidden"].detach().bfloat16().requires_grad_()
    outputs = sum(inputs[n].nbytes for n in LEAVES)
    ours = peak_bytes(lambda: full(loss(spec, "native"), inputs)) - outputs
    plain = peak_bytes(lambda: full(loss(spec, "reference"), inputs)) - outputs
    assert ours < plain / 3
    assert ours < 2 * linear_loss.SCRATCH_BYTES["cpu"]


@EVERY_LOSS
def test_compiled_and_opcheck(spec: KernelSpec) -> None:
    inputs = arguments(spec)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, LEAVES)
    assert_equal(got, forward_backward(spec.function, inputs, LEAVES))
    tensors = [inputs[n].requires_grad_() for n in LEAVES]
    rest = (inputs["target"], inputs["predicts"], 1)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            getattr(torch.ops.uml_fast, f"{spec.name}_fwd").default, (*tensors, *rest, *needs),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


@EVERY_LOSS
def test_plain_path_of_the_operator(spec: KernelSpec) -> None:
    """float64 has no kernel: inside a compiled graph the operator runs the reference."""
    inputs = {
        n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for n, t in arguments(spec).items()
    }
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    want = dict(forward_backward(loss(spec, "reference"), inputs, LEAVES))
    for name, value in forward_backward(compiled, inputs, LEAVES):
        torch.testing.assert_close(value, want[name])


BAD = {
    "integers": ({"hidden": torch.ones(21, 12).int()}, TypeError, "hidden is torch.int32"),
    "dimensions": ({"hidden": torch.ones(12)}, ValueError, "must have two dimensions"),
    "weight": ({"weight": torch.ones(10, 11)}, ValueError, r"weight is \[10, 11\]; .* \[10, 12\]"),
    "bias": ({"bias": torch.ones(9)}, ValueError, r"bias is \[9\]; it must be \[10\]"),
    "mask": ({"predicts": torch.ones(21)}, TypeError, "predicts is torch.float32"),
    "mask length": ({"predicts": torch.ones(20).bool()}, ValueError, r"predicts is \[20\]"),
    "strides": ({"hidden": torch.ones(12, 21).t()}, ValueError, "hidden has strides"),
    "shift": ({"shift": -1}, ValueError, "shift is -1; it must be 0 or more"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
@EVERY_LOSS
def test_bad_input(spec: KernelSpec, case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        loss(spec, backend)(**arguments(spec, **change))
