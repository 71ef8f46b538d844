"""Images to tokens: ``tokens = normalise(patches(pixels)) weight^T + bias + position``.

Legend: N images of H x W pixels, C patches in reading order, E elements of a patch in (row, column,
channel) order, D width, P positions. uint8 pixels are normalised per channel in registers (CUDA) or
on their way to the product (CPU), rounded once to the working dtype, multiplied with fp32 sums;
bias and position are added in fp32. Bytes forward C E + C D size + D E size, FLOPs 2 C E D;
backward reads the pixels and the gradient. Saved: the pixels and parameters, nothing new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend
from uml_fast.kernels.checks import check_contiguous
from uml_fast.kernels.linear_stem import (
    check_parameters,
    check_statistics,
    linear_stem,
    tokens_reference,
    wide_dtype,
)
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "image_stem"


def cut(pixels: Tensor, patch_height: int, patch_width: int) -> Tensor:
    """Images (N, H, W, channels) to patches (C, patch_height * patch_width, channels)."""
    images, height, width, channels = pixels.shape
    down, across = height // patch_height, width // patch_width
    grid = pixels.view(images, down, patch_height, across, patch_width, channels)
    patches = grid.transpose(2, 3)
    return patches.reshape(images * down * across, patch_height * patch_width, channels)


def patches_per_image(pixels: Tensor, patch_height: int, patch_width: int) -> int:
    """Of (N, H, W, channels)."""
    return (pixels.shape[1] // patch_height) * (pixels.shape[2] // patch_width)


def image_stem_reference(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor, deviation: Tensor, patch_height: int,
    patch_width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Plain torch definition; differentiable, any floating dtypes."""
    patches = cut(pixels, patch_height, patch_width).to(wide_dtype(dtype))
    scale = 1 / (255 * deviation)
    features = torch.addcmul(-mean / deviation, patches, scale).flatten(1)
    if position is not None and position_index is None:
        rows = torch.arange(len(features), device=pixels.device)
        position_index = rows % patches_per_image(pixels, patch_height, patch_width)
    return tokens_reference(features, weight, bias, position, position_index, dtype)


def _rows(pixels: Tensor, patch_height: int, patch_width: int) -> int:
    return pixels.shape[0] * patches_per_image(pixels, patch_height, patch_width)


_stem = linear_stem(
    NAME, "channel", "int patch_height, int patch_width", image_stem_reference, _rows
)


def image_stem(
    pixels: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor, deviation: Tensor, *, patch_size: tuple[int, int],
    dtype: torch.dtype, out: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Tokens of images, one row per patch in reading order.

    Packs that hold patches already cut, (C, E) uint8, are C images of one patch:
    ``rows.view(C, patch_height, patch_width, channels)``; that is the fastest form.

    Args:
        pixels: uint8 (N, H, W, channels) contiguous, 1 or 3 channels.
        weight, bias: (D, E) with E = patch_height * patch_width * channels, and (D,); any floating
            dtype.
        position: (P, D), any floating dtype, or None.
        position_index: int32 (C,), clamped to the table (rows of padding); None: the patch's number
            within its image.
        mean, deviation: (channels,) in units of pixel / 255; used in fp32.
        patch_size: (height, width) of a patch; they divide H and W.
        dtype: of the products and tokens, fp32 or bf16 (fp16 on CUDA).
        out: contiguous (C, D) of ``dtype``, such as rows of a pack's tokens: written instead of
            a new tensor. The tensor returned shares its memory and carries the gradient; ``out``
            itself does not. Eager mode only.
        backend: for tests.

    Returns:
        (C, D) of ``dtype``. Weight, bias and position have gradients, in their dtypes.

    Raises:
        TypeError, ValueError: shapes, dtypes, strides or patches that do not fit; on the CPU, a
            deviation of zero.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"{NAME}: pixels are {pixels.dtype}; they must be uint8")
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise ValueError(
            f"{NAME}: pixels are {list(pixels.shape)}; they must be [images, height, width, "
            "channels] with 1 or 3 channels"
        )
    check_contiguous(NAME, pixels=pixels)
    _, height, width, channels = pixels.shape
    for size, patch, axis in zip((height, width), patch_size, ("height", "width"), strict=True):
        if patch < 1 or size < 1 or size % patch:
            raise ValueError(f"{NAME}: patches of {axis} {patch} do not divide the {axis} {size}")
    rows = _rows(pixels, *patch_size)
    elems = patch_size[0] * patch_size[1] * channels
    check_parameters(NAME, rows, elems, pixels, weight, bias, position, position_index, dtype, out)
    check_statistics(NAME, pixels, mean, deviation, channels)
    return _stem(
        backend, pixels, weight, bias, position, position_index, mean, deviation, *patch_size,
        dtype, out,
    )  # fmt: skip


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    N, H, W, channels, D = (shape[k] for k in ("N", "H", "W", "channels", "D"))
    patch_height, patch_width = shape["patch"]
    elems = patch_height * patch_width * channels
    places = (H // patch_height) * (W // patch_width)
    size = shape.get("P", places)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    index = torch.randint(size + 1, (N * places,), generator=generator, dtype=torch.int32)
    return {
        "pixels": torch.randint(256, (N, H, W, channels), generator=generator, dtype=torch.uint8),
        "weight": normal(D, elems) * elems**-0.5,
        "bias": normal(D),
        "position": normal(size, D),
        "position_index": index if "P" in shape else None,
        "mean": torch.tensor([0.5, 0.4, 0.3][:channels]),
        "deviation": torch.tensor([0.25, 0.2, 0.3][:channels]),
        "patch_size": (patch_height, patch_width),
        "dtype": dtype,
    }


def _sizes(shape: Shape) -> tuple[float, float, float]:
    """Pixels, elements of the weight, elements of the tokens."""
    patch = shape["patch"][0] * shape["patch"][1]
    pixels = shape["N"] * shape["H"] * shape["W"]
    elems = patch * shape["channels"]
    return pixels * shape["channels"], shape["D"] * elems, pixels / patch * shape["D"]


def _flops(shape: Shape) -> tuple[float, float]:
    pixels, _, _ = _sizes(shape)
    return 2 * pixels * shape["D"], 2 * pixels * shape["D"]


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Pixels and tokens (or their gradient) cross once, the fp32 weight or its gradient once."""
    pixels, weight, tokens = _sizes(shape)
    each = pixels + 4 * weight + size * tokens
    return each, each


SPEC = KernelSpec(
    name=NAME,
    function=image_stem,
    inputs=_inputs,
    gradients=("weight", "bias", "position"),
    tests={
        "no images": {"N": 0, "H": 4, "W": 4, "channels": 1, "patch": (2, 2), "D": 8},
        "one pixel": {"N": 1, "H": 1, "W": 1, "channels": 1, "patch": (1, 1), "D": 1},
        "lines of a prime, padding": {
            "N": 2, "H": 6, "W": 10, "channels": 3, "patch": (3, 5), "D": 37, "P": 3},
        "cut, more rows than a block": {
            "N": 150, "H": 4, "W": 4, "channels": 1, "patch": (4, 4), "D": 64, "P": 4},
        "more features than a block": {
            "N": 3, "H": 16, "W": 48, "channels": 3, "patch": (16, 16), "D": 65},
    },
    benches={
        "digits, cut": {
            "N": 4096, "H": 4, "W": 4, "channels": 1, "patch": (4, 4), "D": 64, "P": 4},
        "ViT-S/16, cut": {
            "N": 4096, "H": 16, "W": 16, "channels": 3, "patch": (16, 16), "D": 384, "P": 196},
        "ViT-S/16": {"N": 334, "H": 224, "W": 224, "channels": 3, "patch": (16, 16), "D": 384},
        "ViT-B/16": {"N": 334, "H": 224, "W": 224, "channels": 3, "patch": (16, 16), "D": 768},
    },
    aot={
        "digits, cut": {"N": 64, "H": 4, "W": 4, "channels": 1, "patch": (4, 4), "D": 64, "P": 4},
        "ViT-S/16, cut, few rows": {
            "N": 128, "H": 16, "W": 16, "channels": 3, "patch": (16, 16), "D": 384, "P": 196},
        "ViT-S/16, cut": {
            "N": 8192, "H": 16, "W": 16, "channels": 3, "patch": (16, 16), "D": 384, "P": 196},
        "ViT-B/16": {"N": 24, "H": 224, "W": 224, "channels": 3, "patch": (16, 16), "D": 768},
        "odd lines": {"N": 64, "H": 14, "W": 21, "channels": 3, "patch": (7, 7), "D": 150},
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
