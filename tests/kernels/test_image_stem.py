"""Image stem against the modality's own stem and the float64 reference; what only it does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches, forward_backward
from uml_fast.kernels.image_stem import SPEC, image_stem

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = [
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
    "reference",
]
SHAPE = {"N": 5, "H": 6, "W": 4, "channels": 3, "patch": (3, 2), "D": 10, "P": 3}
PARAMETERS = ("weight", "bias", "position")


def arguments(dtype: torch.dtype = FP32, **change: Any) -> dict[str, Any]:
    inputs = SPEC.inputs(SHAPE | change, dtype, torch.Generator().manual_seed(0))
    return inputs | {"position_index": inputs["position_index"]}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
# Elements of a patch: fewer than a vector, exactly two, a prime; with lines shorter than a vector.
@pytest.mark.parametrize("patch", [(1, 5), (4, 8), (1, 37), (11, 3)], ids=str)
def test_matches_on_every_instruction_set(
    instruction_set: str, patch: tuple[int, int], dtype: torch.dtype
) -> None:
    for across in (1, 2):
        inputs = arguments(dtype, H=patch[0], W=across * patch[1], channels=1, patch=patch, N=70)
        native = functools.partial(image_stem, backend="native")
        reference = functools.partial(image_stem, backend="reference")
        assert_matches(native, reference, inputs, PARAMETERS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_patch_alone(backend: str) -> None:
    """A token is the linear image of its own patch, in reading order, by hand."""
    inputs = arguments()
    got = image_stem(**inputs, backend=backend)
    row = 0
    for image in inputs["pixels"]:
        for top in (0, 3):
            for left in (0, 2):
                patch = image[top : top + 3, left : left + 2].double() / 255
                features = ((patch - inputs["mean"]) / inputs["deviation"]).flatten()
                place = min(int(inputs["position_index"][row]), 2)
                want = inputs["weight"].double() @ features + inputs["bias"]
                want += inputs["position"][place]
                assert torch.allclose(got[row].double(), want, atol=1e-5)
                row += 1
    assert row == len(got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cut_patches_are_images_of_one_patch(backend: str) -> None:
    """The form of packs: the same patches cut beforehand give the same tokens and gradients."""
    inputs = arguments()
    pixels = inputs["pixels"].view(5, 2, 3, 2, 2, 3).transpose(2, 3).reshape(20, 3, 2, 3)
    op = functools.partial(image_stem, backend=backend)
    whole = forward_backward(op, inputs, PARAMETERS)
    assert_equal(whole, forward_backward(op, inputs | {"pixels": pixels}, PARAMETERS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_an_index_positions_repeat_each_image(backend: str) -> None:
    """Four patches an image; a shorter table is clamped."""
    for size in (4, 3):
        inputs = arguments(P=size)
        index = (torch.arange(20) % 4).clamp(max=size - 1).int()
        op = functools.partial(image_stem, backend=backend)
        implied = forward_backward(op, inputs | {"position_index": None}, PARAMETERS)
        assert_equal(implied, forward_backward(op, inputs | {"position_index": index}, PARAMETERS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_without_a_table(backend: str, dtype: torch.dtype) -> None:
    inputs = arguments(dtype) | {"position": None, "position_index": None}
    op = functools.partial(image_stem, backend=backend)
    reference = functools.partial(image_stem, backend="reference")
    assert_matches(op, reference, inputs, ("weight", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_in_place_with_its_gradient(backend: str) -> None:
    """Rows of a pack's buffer: no other row changes; what is returned carries the gradient."""
    inputs = arguments()
    op = functools.partial(image_stem, backend=backend)

    def through_buffer(**x: Any) -> Tensor:
        buffer = torch.full((24, 10), 7.0)
        tokens = op(**x, out=buffer[3:23])
        assert tokens.data_ptr() == buffer[3:].data_ptr()
        assert buffer[:3].eq(7).all()
        assert buffer[23:].eq(7).all()
        assert torch.equal(tokens, buffer[3:23]) and not buffer.requires_grad
        return tokens

    want = forward_backward(op, inputs, PARAMETERS)
    assert_equal(forward_backward(through_buffer, inputs, PARAMETERS), want)
    with torch.no_grad():
        assert torch.equal(through_buffer(**inputs), want[0][1])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_threads_give_the_same_bits(two_threads: None, dtype: torch.dtype) -> None:
    """Of what this project computes; PyTorch's product is not the subject."""
    inputs = arguments(dtype, N=300)
    op = functools.partial(image_stem, backend="native")
    two = forward_backward(op, inputs, ("bias", "position"))
    torch.set_num_threads(1)
    assert_equal(two[1:], forward_backward(op, inputs, ("bias", "position"))[1:])


@pytest.mark.parametrize("with_table", [True, False])
def test_compiled_and_opcheck(with_table: bool) -> None:
    inputs = arguments(BF16)
    wanted = PARAMETERS
    if not with_table:
        inputs |= {"position": None, "position_index": None}
        wanted = ("weight", "bias")
    compiled = torch.compile(image_stem, fullgraph=True, backend="aot_eager")
    got = forward_backward(compiled, inputs, wanted)
    assert_equal(got, forward_backward(image_stem, inputs, wanted))
    tensors = {k: v.requires_grad_() if k in wanted else v for k, v in inputs.items()}
    *most, patch, dtype = tensors.values()
    torch.library.opcheck(torch.ops.uml_fast.image_stem_fwd.default, (*most, *patch, dtype))


def test_out_is_refused_inside_a_compiled_graph() -> None:
    compiled = torch.compile(image_stem, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="out must be None inside a compiled graph"):
        compiled(**arguments(), out=torch.empty(20, 10))


BAD = {
    "pixels dtype": ({"pixels": torch.ones(5, 6, 4, 3)}, TypeError, "pixels are torch.float32"),
    "pixels dimensions": ({"pixels": torch.ones(6, 4, 3).byte()}, ValueError, "pixels are "),
    "channels": ({"pixels": torch.ones(5, 6, 4, 2).byte()}, ValueError, "1 or 3 channels"),
    "pixels strides": (
        {"pixels": torch.ones(5, 3, 6, 4).byte().permute(0, 2, 3, 1)}, ValueError,
        "pixels has strides"),
    "patch": ({"patch_size": (4, 2)}, ValueError, "patches of height 4 do not divide the height 6"),
    "no patch": ({"patch_size": (3, 0)}, ValueError, "patches of width 0"),
    "no pixels": ({"pixels": torch.ones(5, 0, 4, 3).byte()}, ValueError, "the height 0"),
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
    "mean": ({"mean": torch.ones(1)}, ValueError, r"mean is \[1\]; it must be \[3\]"),
    "mean dtype": ({"mean": torch.ones(3).int()}, TypeError, "mean is torch.int32"),
    "deviation": ({"deviation": torch.ones(4)}, ValueError, r"deviation is \[4\]"),
    "deviation zero": (
        {"deviation": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "channel 1 is 0.0"),
    "deviation NaN": (
        {"deviation": torch.tensor([1.0, 1.0, float("nan")])}, ValueError, "channel 2 is nan"),
    "out dtype": ({"out": torch.ones(20, 10).bfloat16()}, TypeError, "out is torch.bfloat16"),
    "out shape": ({"out": torch.ones(21, 10)}, ValueError, r"out is \[21, 10\]"),
    "out strides": ({"out": torch.ones(20, 20)[:, ::2]}, ValueError, "out has strides"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        image_stem(**arguments() | change, backend=backend)
