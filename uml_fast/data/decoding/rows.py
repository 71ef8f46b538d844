"""From a decoded array to the rows of a pack, one writer per modality, whatever decoded it.

A writer knows how many rows a sample has from its length in the index, and writes exactly those.
An array that is not what the index promises raises DecodeError, which rejects that sample alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from uml_fast.config import ModalityConfig
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.augment.audio import AudioAugment
from uml_fast.data.augment.draws import Draws
from uml_fast.data.augment.image import ImageAugment, fitted
from uml_fast.data.augment.text import TextAugment
from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.source import DataError
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig, to_patches
from uml_fast.modalities.text import TextConfig


class Rows(Protocol):
    """Rows of one modality."""

    @property
    def kind(self) -> str:
        """Shards it reads: images, audio, text or features."""

    @property
    def row_elems(self) -> int:
        """Elements of a row."""

    @property
    def row_dtype(self) -> str:
        """numpy name of the elements."""

    def rows(self, length: np.ndarray) -> np.ndarray:
        """int64 (n,) rows of samples with these lengths (n, L) in the index."""

    @property
    def is_augmenting(self) -> bool:
        """Whether ``write`` makes use of draws."""

    def write(self, array: np.ndarray, out: np.ndarray, draws: Draws | None = None) -> None:
        """Write the rows of one decoded sample to ``out`` (rows, E). Threads may call it together.

        With ``draws`` the sample is augmented first, where the run asks for it.

        Raises:
            DecodeError: the array is not what the index promises.
        """


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Pixels to patches; other sizes are resized and cropped at the centre."""

    config: ImageConfig
    augment: ImageAugment
    kind = "images"
    row_dtype = "uint8"

    @property
    def row_elems(self) -> int:
        """Bytes of a patch."""
        c = self.config
        return c.patch_height * c.patch_width * c.channels

    @property
    def is_augmenting(self) -> bool:
        """Whether training samples are changed."""
        return not self.augment.is_off

    def rows(self, length: np.ndarray) -> np.ndarray:
        """One number for all: images of a run have one size."""
        return np.full(len(length), self.config.patches, np.int64)

    def write(self, array: np.ndarray, out: np.ndarray, draws: Draws | None = None) -> None:
        """See ``Rows``."""
        c = self.config
        if draws is not None:
            array = self.augment.apply(array, c.height, c.width, draws)
        elif array.shape[:2] != (c.height, c.width):
            array = fitted(array, c.height, c.width)
        to_patches(array[None], c.patch_height, c.patch_width, out)


@dataclass(frozen=True, slots=True)
class AudioRows:
    """Samples to rows; the last one ends in silence. Sounds longer than the positions are cut."""

    config: AudioConfig
    augment: AudioAugment
    kind = "audio"
    row_dtype = "int16"

    @property
    def row_elems(self) -> int:
        """Samples of a row."""
        return self.config.row_samples

    @property
    def is_augmenting(self) -> bool:
        """Whether training samples are changed."""
        return not self.augment.is_off

    def rows(self, length: np.ndarray) -> np.ndarray:
        """Begun rows, at most the positions of the run."""
        whole = -(-length[:, 0].astype(np.int64) // self.config.row_samples)
        return np.minimum(whole, self.config.positions)

    def write(self, array: np.ndarray, out: np.ndarray, draws: Draws | None = None) -> None:
        """See ``Rows``."""
        flat = out.reshape(-1)
        samples = array[: len(flat)]
        if -(-len(samples) // self.row_elems) != len(out):
            raise DecodeError(f"{len(samples)} samples; the index promises {len(out)} rows")
        if draws is not None:
            samples = self.augment.apply(samples, self.config, draws)
        flat[: len(samples)] = samples
        flat[len(samples) :] = 0


@dataclass(frozen=True, slots=True)
class TextRows:
    """UTF-8 text to one row per byte; ids are the bytes. Longer texts are cut.

    Raises:
        DataError: the vocabulary has no place for every byte.
    """

    config: TextConfig
    augment: TextAugment
    kind = "text"
    row_elems = 1
    row_dtype = "int32"

    def __post_init__(self) -> None:
        if self.config.vocabulary < 256:
            raise DataError(
                f"{self.config.name}.vocabulary is {self.config.vocabulary}; bytes need 256"
            )

    @property
    def is_augmenting(self) -> bool:
        """Whether training samples are changed."""
        return not self.augment.is_off

    def rows(self, length: np.ndarray) -> np.ndarray:
        """Bytes, at most the positions of the run, if it has any."""
        return _cut(length, self.config)

    def write(self, array: np.ndarray, out: np.ndarray, draws: Draws | None = None) -> None:
        """See ``Rows``."""
        if len(array) < len(out):
            raise DecodeError(f"{len(array)} bytes; the index promises {len(out)} rows")
        try:
            array.tobytes().decode()
        except UnicodeDecodeError as e:
            raise DecodeError(f"no UTF-8 at byte {e.start}; store it as UTF-8") from None
        if draws is not None:
            array = self.augment.apply(array, len(out), draws)
        out[:, 0] = array[: len(out)]


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Stored token ids, one row each. Longer texts are cut."""

    config: TextConfig
    augment: TextAugment
    kind = "tokens"
    row_elems = 1
    row_dtype = "int32"

    @property
    def is_augmenting(self) -> bool:
        """Whether training samples are changed."""
        return not self.augment.is_off

    def rows(self, length: np.ndarray) -> np.ndarray:
        """Tokens, at most the positions of the run, if it has any."""
        return _cut(length, self.config)

    def write(self, array: np.ndarray, out: np.ndarray, draws: Draws | None = None) -> None:
        """See ``Rows``."""
        if len(array) < 4 * len(out):
            raise DecodeError(f"{len(array)} bytes; the index promises {len(out)} tokens")
        ids = np.frombuffer(array.tobytes(), "<i4")
        vocabulary = self.config.vocabulary
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise DecodeError(
                f"token ids run from {ids.min()} to {ids.max()}, {self.config.name}.vocabulary is "
                f"{vocabulary}"
            )
        if draws is not None:
            ids = self.augment.apply(ids, len(out), draws)
        out[:, 0] = ids[: len(out)]


def _cut(length: np.ndarray, config: TextConfig) -> np.ndarray:
    rows = length[:, 0].astype(np.int64)
    return np.minimum(rows, config.positions) if config.positions else rows


@dataclass(frozen=True, slots=True)
class FeaturesRows:
    """Feature rows as they are, or a single vector as one."""

    config: FeaturesConfig
    kind = "features"
    row_dtype = "float32"
    is_augmenting = False

    @property
    def row_elems(self) -> int:
        """Features of a row."""
        return self.config.size

    def rows(self, length: np.ndarray) -> np.ndarray:
        """Rows of the array."""
        return length[:, 0].astype(np.int64)

    def write(self, array: np.ndarray, out: np.ndarray, draws: Draws | None = None) -> None:
        """See ``Rows``."""
        if array.shape != out.shape:
            raise DecodeError(f"shape {list(array.shape)}, the run takes {list(out.shape)}")
        if not np.isfinite(array).all():
            raise DecodeError("NaN or infinity among the features")
        out[:] = array


def rows_of(
    config: ModalityConfig, augment: AugmentConfig | None = None, kind: str = "text"
) -> Rows:
    """What writes the rows of a modality.

    ``augment``: how training samples are changed; None: not at all. ``kind``: what shards of texts
    hold, text or tokens.

    Raises:
        DataError: samples of the modality cannot be read from files, or its vocabulary has no
            place for every byte.
        ConfigError: the modality's samples cannot be changed in the way that is asked.
    """
    augment = augment or AugmentConfig()
    if isinstance(config, ImageConfig):
        augment.image.check(config)
        return ImageRows(config, augment.image)
    if isinstance(config, AudioConfig):
        augment.audio.check(config)
        return AudioRows(config, augment.audio)
    if isinstance(config, TextConfig):
        return (TokenRows if kind == "tokens" else TextRows)(config, augment.text)
    if isinstance(config, FeaturesConfig):
        return FeaturesRows(config)
    raise DataError(f"{config.name}: {type(config).__name__} is not read from files")
