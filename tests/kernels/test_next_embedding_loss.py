"""Next-embedding loss: what counts, every instruction set, chunks, memory, incoming gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.live_bytes import peak_bytes
from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import linear_loss, next_embedding_loss
from uml_fast.kernels.next_embedding_loss import SPEC, next_embedding_loss_reference

BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
LEAVES = ("hidden", "weight", "bias")
native = functools.partial(next_embedding_loss, backend="native")


def arguments(rows: int = 21, width: int = 12, features: int = 10, **change: object) -> dict:
    inputs = SPEC.inputs(
        {"C": rows, "D": width, "F": features}, torch.float32, torch.Generator().manual_seed(1)
    )
    return inputs | change


# Less than a vector of any instruction set, one more than a vector, several vectors.
@pytest.mark.parametrize("features", [3, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
def test_matches(
    instruction_set: str, features: int, dtype: torch.dtype, target: torch.dtype
) -> None:
    inputs = arguments(70, 24, features)
    inputs["hidden"], inputs["target"] = inputs["hidden"].to(dtype), inputs["target"].to(target)
    assert_matches(native, next_embedding_loss_reference, inputs, LEAVES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_is_the_mean_over_rows_that_predict(backend: str, shift: int) -> None:
    """By hand: no masks, the rows that count alone."""
    x = arguments(shift=shift)
    rows = [i for i in range(21 - shift) if x["predicts"][i]]
    predicted = x["hidden"][rows] @ x["weight"].t() + x["bias"]
    want = (predicted - x["target"][[i + shift for i in rows]]).square().mean()
    torch.testing.assert_close(next_embedding_loss(**x, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"predicts": torch.zeros(21).bool()}, {"shift": 21}])
def test_no_row_counts(backend: str, change: dict) -> None:
    op = functools.partial(next_embedding_loss, backend=backend)
    for name, value in forward_backward(op, arguments(**change), LEAVES):
        assert value.eq(0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_does_not_count_has_no_effect(backend: str) -> None:
    op = functools.partial(next_embedding_loss, backend=backend)
    x = arguments()
    x["predicts"][4] = False
    clean = forward_backward(op, x, LEAVES)
    x["target"] = x["target"].clone()
    x["target"][5] = torch.nan
    x["target"][0] = torch.nan
    assert_equal(clean, forward_backward(op, x, LEAVES))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_counts_is_not_hidden(backend: str) -> None:
    x = arguments(predicts=torch.ones(21).bool())
    x["target"][5, 3] = torch.nan
    assert next_embedding_loss(**x, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_of_two_backward_passes(backend: str) -> None:
    """The gradients that forward computed survive a backward pass and follow its factor."""
    x = arguments()
    leaves = [x[n].requires_grad_() for n in LEAVES]
    loss = next_embedding_loss(**x, backend=backend)
    first = torch.autograd.grad(loss, leaves, torch.tensor(-0.5), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(4.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, -8 * a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
def test_some_gradients_alone(backend: str, wanted: tuple[str, ...]) -> None:
    op = functools.partial(next_embedding_loss, backend=backend)
    every = dict(forward_backward(op, arguments(), LEAVES))
    some = forward_backward(op, arguments(), wanted)
    assert len(some) == 1 + len(wanted)
    for name, value in some:
        assert torch.equal(value, every[name]), name


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_chunks_give_the_same_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows: two whole ones, one more of 64 - 1, one of one row."""
    op = functools.partial(next_embedding_loss, backend=backend)
    monkeypatch.setitem(linear_loss.SCRATCH_BYTES, "cpu", 64 * 10 * 4)
    assert linear_loss.chunk_rows(129, 10, 2, 4, "cpu") == 64
    for rows in (129, 130, 192):
        assert_matches(op, next_embedding_loss_reference, arguments(rows, 2), LEAVES)


@pytest.mark.native
def test_threads_give_the_same_bits(two_threads: None) -> None:
    inputs = arguments(300, 16, 20)
    two = forward_backward(native, inputs, LEAVES)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(native, inputs, LEAVES))


def full(op: Callable[..., Tensor], inputs: dict) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op(**inputs), [inputs[n] for n in LEAVES])


@pytest.mark.native
def test_memory_is_a_third_of_plain_torch() -> None:
    inputs = arguments(65_536, 8, 768)
    inputs |= {n: inputs[n].requires_grad_() for n in LEAVES}
    inputs["hidden"] = inputs["hidden"].detach().bfloat16().requires_grad_()
    outputs = sum(inputs[n].nbytes for n in LEAVES)
    ours = peak_bytes(lambda: full(native, inputs)) - outputs
    plain = peak_bytes(lambda: full(next_embedding_loss_reference, inputs)) - outputs
    assert ours < plain / 3
    assert ours < 2 * linear_loss.SCRATCH_BYTES["cpu"]


def test_compiled_and_opcheck() -> None:
    inputs = arguments()
    compiled = torch.compile(next_embedding_loss, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, LEAVES)
    assert_equal(got, forward_backward(next_embedding_loss, inputs, LEAVES))
    tensors = [inputs[n].requires_grad_() for n in LEAVES]
    rest = (inputs["target"], inputs["predicts"], 1)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.uml_fast.next_embedding_loss_fwd.default, (*tensors, *rest, *needs),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


def test_plain_path_of_the_operator() -> None:
    """float64 has no kernel: inside a compiled graph the operator runs the reference."""
    inputs = {n: t.double() if n != "predicts" and n != "shift" else t
              for n, t in arguments().items()}  # fmt: skip
    compiled = torch.compile(next_embedding_loss, fullgraph=True, backend="aot_eager")
    want = dict(forward_backward(next_embedding_loss_reference, inputs, LEAVES))
    for name, value in forward_backward(compiled, inputs, LEAVES):
        torch.testing.assert_close(value, want[name])


BAD = {
    "integers": ({"hidden": torch.ones(21, 12).int()}, TypeError, "hidden is torch.int32"),
    "target": ({"target": torch.ones(21, 9)}, ValueError, r"target is \[21, 9\]; .* \[21, 10\]"),
    "target dtype": ({"target": torch.ones(21, 10).int()}, TypeError, "target is torch.int32"),
    "dimensions": ({"hidden": torch.ones(12)}, ValueError, "must have two dimensions"),
    "weight": ({"weight": torch.ones(10, 11)}, ValueError, r"weight is \[10, 11\]; .* \[10, 12\]"),
    "bias": ({"bias": torch.ones(9)}, ValueError, r"bias is \[9\]; it must be \[10\]"),
    "mask": ({"predicts": torch.ones(21)}, TypeError, "predicts is torch.float32"),
    "mask length": ({"predicts": torch.ones(20).bool()}, ValueError, r"predicts is \[20\]"),
    "strides": ({"target": torch.ones(10, 21).t()}, ValueError, "target has strides"),
    "shift": ({"shift": -1}, ValueError, "shift is -1; it must be 0 or more"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        next_embedding_loss(**arguments(**change), backend=backend)
