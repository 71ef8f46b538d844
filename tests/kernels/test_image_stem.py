"""Image stem against the modality's own stem and the float64 reference; what only it does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

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
    "deviation zero": (
        {"deviation": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "channel 1 is 0.0"),
    "deviation NaN": (
        {"deviation": torch.tensor([1.0, 1.0, float("nan")])}, ValueError, "channel 2 is nan"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        image_stem(**arguments() | change, backend=backend)
