"""RandAugment (Cubuk et al. 2019): operations and strengths of torchvision, on Pillow images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from uml_fast.data.augment.colour import autocontrast, posterize, recoloured, solarize
from uml_fast.data.augment.draws import Draws

if TYPE_CHECKING:
    from PIL import Image

MAGNITUDES = 31
"""Strengths 0..30."""
_SHEAR = 0.3
_TRANSLATE = 150 / 331
"""Part of the side."""
_ROTATE = 30.0
"""Degrees."""
_ENHANCE = 0.9


def randaugment(image: Image.Image, ops: int, magnitude: int, draws: Draws) -> Image.Image:
    """``ops`` operations, each drawn from ``OPERATIONS``, with strength ``magnitude`` of 0..30."""
    names = list(OPERATIONS)
    for _ in range(ops):
        name = names[draws.below(len(names))]
        part = magnitude / (MAGNITUDES - 1)
        if draws.chance(0.5) and name in _SIGNED:
            part = -part
        image = OPERATIONS[name](image, part)
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _sharpness(image: Image.Image, part: float) -> Image.Image:
    from PIL import ImageEnhance

    return ImageEnhance.Sharpness(image).enhance(1 + _ENHANCE * part)


def _equalize(image: Image.Image, part: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


OPERATIONS: Mapping[str, Callable[[Image.Image, float], Image.Image]] = MappingProxyType(
    {
        "identity": lambda image, part: image,
        "shear_x": lambda image, part: _affine(image, (1, _SHEAR * part, 0, 0, 1, 0)),
        "shear_y": lambda image, part: _affine(image, (1, 0, 0, _SHEAR * part, 1, 0)),
        "translate_x": lambda image, part: _affine(
            image, (1, 0, int(_TRANSLATE * part * image.width), 0, 1, 0)
        ),
        "translate_y": lambda image, part: _affine(
            image, (1, 0, 0, 0, 1, int(_TRANSLATE * part * image.height))
        ),
        "rotate": lambda image, part: image.rotate(_ROTATE * part),
        "brightness": lambda image, part: recoloured(image, brightness=1 + _ENHANCE * part),
        "color": lambda image, part: recoloured(image, saturation=1 + _ENHANCE * part),
        "contrast": lambda image, part: recoloured(image, contrast=1 + _ENHANCE * part),
        "sharpness": _sharpness,
        "posterize": lambda image, part: posterize(image, 8 - round(4 * part)),
        "solarize": lambda image, part: solarize(image, round(255 * (1 - part))),
        "autocontrast": lambda image, part: autocontrast(image),
        "equalize": _equalize,
    }
)
"""Name to (image, strength in -1..1); nearest pixels are taken, outside of the picture is black."""
_SIGNED = {
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    "brightness", "color", "contrast", "sharpness",
}  # fmt: skip
"""Operations whose strength has either sign."""
