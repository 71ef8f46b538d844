"""Handwritten digits: the 1,797 scans of 8 x 8 pixels that scikit-learn carries, put side by side.

Scans are split before numbers are made of them, so a test image shows no stroke seen in training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from uml_fast.data.source import Source

SIDE = 8
"""Height and width of a digit in pixels."""
_SPLIT = 1
_PARTS = {"train": (0, 1000), "validation": (1000, 1300), "test": (1300, 1797)}


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "the handwritten digits come with scikit-learn: pip install scikit-learn",
            name="sklearn",
        ) from e
    digits = load_digits()
    pixels = np.rint(digits.data * (255 / 16)).astype(np.uint8)
    return pixels, digits.target.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Handwriting:
    """The scans of one part of a split."""

    pixels: np.ndarray
    """uint8 (n, 64), 0 is paper and 255 is ink."""
    digits: np.ndarray
    """int64 (n,) what each scan shows, 0..9."""

    def write(self, numbers: np.ndarray, places: int, rng: np.random.Generator) -> Source:
        """Images of ``numbers`` with leading zeros, one scan drawn at random for each place.

        Args:
            numbers: int (n,), below ``10 ** places``; they are the labels as well.
            places: digits per image; an image is one row (patch) of 8 x (8 * places) pixels.
            rng: draws the scans.
        """
        powers = 10 ** np.arange(places - 1, -1, -1)
        shown = numbers[:, None] // powers % 10
        scan = np.empty(shown.shape, np.int64)
        for digit in range(10):
            where = shown == digit
            scan[where] = rng.choice(np.flatnonzero(self.digits == digit), where.sum())
        side_by_side = self.pixels[scan].reshape(-1, places, SIDE, SIDE).swapaxes(1, 2)
        rows = np.ascontiguousarray(side_by_side).reshape(len(numbers), -1)
        offsets = np.arange(len(numbers) + 1, dtype=np.int64)
        keys = tuple(f"{n:0{places}d}" for n in numbers)
        return Source("image", rows, offsets, numbers.astype(np.int32), keys)


def handwriting(part: str, seed: int) -> Handwriting:
    """The scans of ``part``: train 1,000, validation 300, test 497; ``seed`` splits them.

    Raises:
        KeyError: another part.
        ModuleNotFoundError: scikit-learn is missing.
    """
    start, stop = _PARTS[part]
    pixels, digits = _scans()
    chosen = np.random.default_rng([seed, _SPLIT]).permutation(len(digits))[start:stop]
    return Handwriting(pixels[chosen], digits[chosen])
