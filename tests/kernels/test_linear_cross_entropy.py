"""Linear cross-entropy: classes, every instruction set, infinite logits, chunks, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.live_bytes import peak_bytes
from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels import linear_cross_entropy, linear_loss
from uml_fast.kernels.linear_cross_entropy import SPEC, linear_cross_entropy_reference

BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
LEAVES = ("hidden", "weight", "bias")
native = functools.partial(linear_cross_entropy, backend="native")


def arguments(rows: int = 21, width: int = 12, classes: int = 10, **change: object) -> dict:
    inputs = SPEC.inputs(
        {"C": rows, "D": width, "V": classes}, torch.float32, torch.Generator().manual_seed(1)
    )
    return inputs | change


# Less than a vector of any instruction set, one more than a vector, several vectors.
@pytest.mark.parametrize("classes", [3, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_matches(instruction_set: str, classes: int, dtype: torch.dtype, ids: torch.dtype) -> None:
    inputs = arguments(70, 24, classes)
    inputs["hidden"], inputs["target"] = inputs["hidden"].to(dtype), inputs["target"].to(ids)
    assert_matches(native, linear_cross_entropy_reference, inputs, LEAVES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_is_torchs_cross_entropy_over_rows_that_predict(backend: str, shift: int) -> None:
    x = arguments(shift=shift)
    rows = [i for i in range(21 - shift) if x["predicts"][i]]
    logits = x["hidden"][rows] @ x["weight"].t() + x["bias"]
    want = F.cross_entropy(logits, x["target"][[i + shift for i in rows]].long())
    torch.testing.assert_close(linear_cross_entropy(**x, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"predicts": torch.zeros(21).bool()}, {"shift": 21}])
def test_no_row_counts(backend: str, change: dict) -> None:
    op = functools.partial(linear_cross_entropy, backend=backend)
    for name, value in forward_backward(op, arguments(**change), LEAVES):
        assert value.eq(0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_rows_that_do_not_count_are_not_read(backend: str) -> None:
    op = functools.partial(linear_cross_entropy, backend=backend)
    x = arguments()
    x["predicts"][4] = False
    clean = forward_backward(op, x, LEAVES)
    x["target"] = x["target"].clone()
    x["target"][5] = 2**30
    x["target"][0] = -1
    assert_equal(clean, forward_backward(op, x, LEAVES))


@pytest.mark.parametrize("backend", [BACKENDS[0], "reference"])
@pytest.mark.parametrize("wrong", [-1, 10])
def test_no_class_is_an_error_on_the_cpu(backend: str, wrong: int) -> None:
    x = arguments(predicts=torch.ones(21).bool())
    x["target"][7] = wrong
    message = rf"row 6 is scored against target\[7\] = {wrong}; classes are 0 to 9"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**x, backend=backend)


@pytest.mark.triton
@pytest.mark.parametrize("wrong", [-1, 10])
def test_no_class_is_nan_on_cuda(wrong: int) -> None:
    op = functools.partial(linear_cross_entropy, backend="triton")
    x = arguments(predicts=torch.ones(21).bool())
    x["target"][7] = wrong
    results = dict(forward_backward(op, x, LEAVES))
    assert results["output 0"].isnan()
    assert results["gradient of hidden"][6].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_counts_is_not_hidden(backend: str) -> None:
    x = arguments(predicts=torch.ones(21).bool())
    x["hidden"][5, 3] = torch.nan
    assert linear_cross_entropy(**x, backend=backend).isnan()


@pytest.mark.native
@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_one_nan_logit_is_enough(instruction_set: str, column: int) -> None:
    """Wherever in a vector it is, the last, shorter one included."""
    x = arguments(classes=37)
    x["bias"][column] = torch.nan
    assert native(**x).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_shut_off_and_large_logits(backend: str) -> None:
    """Minus infinity has probability zero, also a whole block; 1e4 does not overflow."""
    x = arguments(rows=9, width=4, classes=5000)
    x["bias"][:4096] = -torch.inf
    x["bias"][4097] = 1e4
    x["target"] = x["target"] % 900 + 4098
    op = functools.partial(linear_cross_entropy, backend=backend)
    got = dict(forward_backward(op, x, LEAVES))
    want = dict(forward_backward(linear_cross_entropy_reference, x, LEAVES))
    assert want["output 0"].isfinite()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)
    assert got["gradient of bias"][:4096].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_of_two_backward_passes(backend: str) -> None:
    """The gradients that forward computed survive a backward pass and follow its factor."""
    x = arguments()
    leaves = [x[n].requires_grad_() for n in LEAVES]
    loss = linear_cross_entropy(**x, backend=backend)
    first = torch.autograd.grad(loss, leaves, torch.tensor(-0.5), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(4.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, -8 * a)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_chunks_give_the_same_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = functools.partial(linear_cross_entropy, backend=backend)
    monkeypatch.setitem(linear_loss.SCRATCH_BYTES, "cpu", 64 * 40 * 4)
    for rows in (129, 130, 192):
        assert_matches(op, linear_cross_entropy_reference, arguments(rows, 2, 40), LEAVES)


@pytest.mark.native
def test_threads_give_the_same_bits(two_threads: None) -> None:
    inputs = arguments(300, 16, 40)
    two = forward_backward(native, inputs, LEAVES)
    torch.set_num_threads(1)
    assert_equal(two, forward_backward(native, inputs, LEAVES))


def full(op: Callable[..., Tensor], inputs: dict) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op(**inputs), [inputs[n] for n in LEAVES])


@pytest.mark.native
def test_memory_is_a_third_of_plain_torch() -> None:
    inputs = arguments(16_384, 8, 2048)
    inputs |= {n: inputs[n].requires_grad_() for n in LEAVES}
    inputs["hidden"] = inputs["hidden"].detach().bfloat16().requires_grad_()
    outputs = sum(inputs[n].nbytes for n in LEAVES)
    ours = peak_bytes(lambda: full(native, inputs)) - outputs
    plain = peak_bytes(lambda: full(linear_cross_entropy_reference, inputs)) - outputs
    assert ours < plain / 3
    assert ours < 2 * linear_loss.SCRATCH_BYTES["cpu"]


def test_compiled_and_opcheck() -> None:
    inputs = arguments()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, LEAVES)
    assert_equal(got, forward_backward(linear_cross_entropy, inputs, LEAVES))
    tensors = [inputs[n].requires_grad_() for n in LEAVES]
    rest = (inputs["target"], inputs["predicts"], 1)
    torch.library.opcheck(
        torch.ops.uml_fast.linear_cross_entropy_fwd.default, (*tensors, *rest, True, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_plain_path_of_the_operator() -> None:
    """float64 has no kernel: inside a compiled graph the operator runs the reference."""
    inputs = arguments()
    inputs |= {n: inputs[n].double() for n in LEAVES}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    want = dict(forward_backward(linear_cross_entropy_reference, inputs, LEAVES))
    for name, value in forward_backward(compiled, inputs, LEAVES):
        torch.testing.assert_close(value, want[name])


BAD = {
    "target dtype": ({"target": torch.ones(21)}, TypeError, "target is torch.float32; .* int32"),
    "target": ({"target": torch.ones(20).int()}, ValueError, r"target is \[20\]; .* \[21\]"),
    "weight": ({"weight": torch.ones(10, 11)}, ValueError, r"weight is \[10, 11\]; .* \[10, 12\]"),
    "mask": ({"predicts": torch.ones(21)}, TypeError, "predicts is torch.float32"),
    "strides": ({"hidden": torch.ones(12, 21).t()}, ValueError, "hidden has strides"),
    "shift": ({"shift": -1}, ValueError, "shift is -1; it must be 0 or more"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments(**change), backend=backend)
