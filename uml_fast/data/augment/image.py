"""Augmentation of images: crop, flip, RandAugment, colours; on uint8 pixels, with Pillow."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uml_fast.config import require
from uml_fast.data.augment.colour import recoloured
from uml_fast.data.augment.draws import Draws
from uml_fast.data.augment.randaugment import MAGNITUDES, randaugment
from uml_fast.modalities.image import ImageConfig

if TYPE_CHECKING:
    from PIL import Image

_TRIES = 10
"""Boxes that are drawn before the largest middle one is taken, as torchvision does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAugment:
    """Steps in the order of the fields; each is left out at its default."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: least and most part of the area that is kept; 0.08 1 is usual."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and most width over height of that crop."""
    pad: int = 0
    """Most pixels that the picture moves on either axis, its border mirrored; 4 of 32 is usual."""
    flip: float = 0.0
    """Probability of a mirror image."""
    randaugment_ops: int = 0
    """RandAugment: operations on each picture; 2 is usual."""
    randaugment_magnitude: int = 9
    """Their strength, 0..30; 0: none is done."""
    brightness: float = 0.0
    """Colour jitter: the factor of the brightness is drawn from 1 - x..1 + x."""
    contrast: float = 0.0
    """The factor of the contrast, likewise."""
    saturation: float = 0.0
    """The factor of the saturation, likewise."""
    hue: float = 0.0
    """Turn of the hue, drawn from -x..x circles; at most 0.5."""

    def __post_init__(self) -> None:
        name = "data.augment.image"
        low, high = self.scale
        require(0 < low <= high <= 1, f"{name}.scale is {self.scale}; 0 < least <= most <= 1")
        low, high = self.ratio
        require(0 < low <= high, f"{name}.ratio is {self.ratio}; 0 < least <= most")
        require(self.pad >= 0, f"{name}.pad is {self.pad}; it must be >= 0")
        require(0 <= self.flip <= 1, f"{name}.flip is {self.flip}; it must be in 0..1")
        require(
            self.randaugment_ops >= 0,
            f"{name}.randaugment_ops is {self.randaugment_ops}; it must be >= 0",
        )
        require(
            0 <= self.randaugment_magnitude < MAGNITUDES,
            f"{name}.randaugment_magnitude is {self.randaugment_magnitude}; "
            f"it must be in 0..{MAGNITUDES - 1}",
        )
        for what in ("brightness", "contrast", "saturation"):
            value = getattr(self, what)
            require(value >= 0, f"{name}.{what} is {value}; it must be >= 0")
        require(0 <= self.hue <= 0.5, f"{name}.hue is {self.hue}; it must be in 0..0.5")

    @property
    def is_off(self) -> bool:
        """Whether pictures stay as they are."""
        return not (self._crops or self.pad or self.flip or self._recolours)

    @property
    def _crops(self) -> bool:
        return self.scale != (1.0, 1.0)

    @property
    def _jitters(self) -> bool:
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    @property
    def _recolours(self) -> bool:
        return self._jitters or bool(self.randaugment_ops and self.randaugment_magnitude)

    def check(self, config: ImageConfig) -> None:
        """Raise ConfigError unless the modality's pictures can be changed so."""
        least = min(config.height, config.width)
        require(
            self.pad < least, f"data.augment.image.pad is {self.pad}; pictures have {least} pixels"
        )
        require(
            config.channels == 3 or not (self.saturation or self.hue),
            f"data.augment.image.saturation and hue need colours; {config.name} is grey",
        )

    def apply(self, pixels: np.ndarray, height: int, width: int, draws: Draws) -> np.ndarray:
        """uint8 (h, w, c) to (height, width, c); may be a view."""
        if self._crops:
            box = crop_box(pixels.shape[0], pixels.shape[1], self.scale, self.ratio, draws)
            pixels = resized(pixels, height, width, box)
        elif pixels.shape[:2] != (height, width):
            pixels = fitted(pixels, height, width)
        if self.pad:
            down, across = draws.below(2 * self.pad + 1), draws.below(2 * self.pad + 1)
            rows, columns = _mirrored(height, self.pad), _mirrored(width, self.pad)
            pixels = pixels.take(rows[down : down + height], 0)
            pixels = pixels.take(columns[across : across + width], 1)
        if self.flip and draws.chance(self.flip):
            pixels = pixels[:, ::-1]
        if not self._recolours:
            return pixels
        image = to_image(np.ascontiguousarray(pixels))
        if self.randaugment_ops and self.randaugment_magnitude:
            image = randaugment(image, self.randaugment_ops, self.randaugment_magnitude, draws)
        if self._jitters:
            image = self._jittered(image, draws)
        return np.asarray(image).reshape(pixels.shape)

    def _jittered(self, image: Image.Image, draws: Draws) -> Image.Image:
        brightness, contrast, saturation = (
            draws.uniform(max(0.0, 1 - x), 1 + x) if x else 1.0
            for x in (self.brightness, self.contrast, self.saturation)
        )
        turn = draws.uniform(-self.hue, self.hue) if self.hue else 0.0
        return recoloured(image, brightness, contrast, saturation, turn)


@functools.cache
def _mirrored(size: int, pad: int) -> np.ndarray:
    """Index of each place of an axis with ``pad`` mirrored ones at either end."""
    return np.pad(np.arange(size), pad, "reflect")


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (h, w, 1 or 3), contiguous, as a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def fitted(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (h, w, c) to (height, width, c): the largest middle part of that shape, resized."""
    from PIL import Image, ImageOps

    small = ImageOps.fit(to_image(pixels), (width, height), Image.Resampling.BILINEAR)
    return np.asarray(small).reshape(height, width, -1)


def resized(
    pixels: np.ndarray, height: int, width: int, box: tuple[int, int, int, int]
) -> np.ndarray:
    """uint8 (h, w, c) to (height, width, c): the part in ``box`` (left, top, right, bottom)."""
    from PIL import Image

    small = to_image(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small).reshape(height, width, -1)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom): its area uniform, the logarithm of its shape uniform."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * draws.uniform(*scale)
        shape = math.exp(draws.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = draws.below(width - w + 1), draws.below(height - h + 1)
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * shape)))
    h = min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
