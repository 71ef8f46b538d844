"""From the stored bytes of a sample to its raw rows, one decoder per modality.

A decoder knows how many rows a sample has from the lengths in the index, and writes exactly those.
What cannot be decoded raises DecodeError, which rejects that sample alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from uml_fast.config import ModalityConfig
from uml_fast.data.source import DataError
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig, to_patches
from uml_fast.modalities.text import TextConfig

_JPEG = b"\xff\xd8"


class DecodeError(ValueError):
    """A sample's bytes cannot be decoded; the message says what is wrong with them."""


class Decoder(Protocol):
    """Rows of one modality."""

    kind: str
    """Shards it reads: images, audio, text or features."""
    row_elems: int
    row_dtype: str

    def rows(self, length: np.ndarray) -> np.ndarray:
        """int64 (n,) rows of samples with these lengths (n, L) in the index."""

    def decode(self, payload: bytes, out: np.ndarray) -> None:
        """Write the rows of one sample to ``out`` (rows, E). Threads may call it together.

        Raises:
            DecodeError: the bytes are not what the index promises.
        """


@dataclass(frozen=True, slots=True)
class ImageDecoder:
    """JPEG, PNG or WebP to patches; other sizes are resized and cropped at the centre."""

    config: ImageConfig
    kind = "images"
    row_dtype = "uint8"

    @property
    def row_elems(self) -> int:
        """Bytes of a patch."""
        c = self.config
        return c.patch_height * c.patch_width * c.channels

    def rows(self, length: np.ndarray) -> np.ndarray:
        return np.full(len(length), self.config.patches, np.int64)

    def decode(self, payload: bytes, out: np.ndarray) -> None:
        c = self.config
        out[:] = to_patches(self._pixels(payload)[None], c.patch_height, c.patch_width)[0]

    def _pixels(self, payload: bytes) -> np.ndarray:
        """uint8 (height, width, channels)."""
        c = self.config
        if payload[:2] == _JPEG:
            import simplejpeg

            try:
                space = "GRAY" if c.channels == 1 else "RGB"
                pixels = simplejpeg.decode_jpeg(payload, space, strict=True)
            except ValueError as e:
                raise DecodeError(f"broken JPEG: {e}") from None
            if pixels.shape[:2] == (c.height, c.width):
                return pixels
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(payload)) as image:
                converted = image.convert("L" if c.channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as e:
            raise DecodeError(f"broken image: {e}") from None
        fitted = ImageOps.fit(converted, (c.width, c.height), Image.Resampling.BILINEAR)
        return np.asarray(fitted)


@dataclass(frozen=True, slots=True)
class AudioDecoder:
    """FLAC, WAV or Ogg of the run's sample rate to rows of samples; the last one ends in silence.

    Sounds longer than the position table are cut.
    """

    config: AudioConfig
    kind = "audio"
    row_dtype = "int16"

    @property
    def row_elems(self) -> int:
        """Samples of a row."""
        return self.config.row_samples

    def rows(self, length: np.ndarray) -> np.ndarray:
        whole = -(-length[:, 0].astype(np.int64) // self.config.row_samples)
        return np.minimum(whole, self.config.positions)

    def decode(self, payload: bytes, out: np.ndarray) -> None:
        import soundfile

        flat = out.reshape(-1)
        try:
            with soundfile.SoundFile(io.BytesIO(payload)) as sound:
                if sound.samplerate != self.config.sample_rate or sound.channels != 1:
                    raise DecodeError(
                        f"{sound.samplerate} Hz with {sound.channels} channels; the run takes "
                        f"{self.config.sample_rate} Hz mono: prepare with --sample-rate "
                        f"{self.config.sample_rate}"
                    )
                samples = sound.read(len(flat), dtype="int16")
        except soundfile.LibsndfileError as e:
            raise DecodeError(f"broken sound: {e}") from None
        if -(-len(samples) // self.row_elems) != len(out):
            raise DecodeError(f"{len(samples)} samples; the index promises {len(out)} rows")
        flat[: len(samples)] = samples
        flat[len(samples) :] = 0


@dataclass(frozen=True, slots=True)
class TextDecoder:
    """UTF-8 text to one row per byte; ids are the bytes. Longer texts are cut."""

    config: TextConfig
    kind = "text"
    row_elems = 1
    row_dtype = "int32"

    def rows(self, length: np.ndarray) -> np.ndarray:
        return np.minimum(length[:, 0].astype(np.int64), self.config.positions)

    def decode(self, payload: bytes, out: np.ndarray) -> None:
        if len(payload) < len(out):
            raise DecodeError(f"{len(payload)} bytes; the index promises {len(out)} rows")
        out[:, 0] = np.frombuffer(payload, np.uint8)[: len(out)]


@dataclass(frozen=True, slots=True)
class FeaturesDecoder:
    """A .npy array of feature rows, or of a single vector."""

    config: FeaturesConfig
    kind = "features"
    row_dtype = "float32"

    @property
    def row_elems(self) -> int:
        """Features of a row."""
        return self.config.size

    def rows(self, length: np.ndarray) -> np.ndarray:
        return length[:, 0].astype(np.int64)

    def decode(self, payload: bytes, out: np.ndarray) -> None:
        try:
            values: np.ndarray = np.load(io.BytesIO(payload), allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DecodeError(f"broken array: {e}") from None
        values = np.atleast_2d(values)
        if values.shape != out.shape:
            raise DecodeError(f"shape {list(values.shape)}, the run takes {list(out.shape)}")
        out[:] = values
        if not np.isfinite(out).all():
            raise DecodeError("NaN or infinity among the features")


def decoder_of(config: ModalityConfig) -> Decoder:
    """The decoder of a modality.

    Raises:
        DataError: samples of the modality cannot be read from files, or its vocabulary has no
            place for every byte.
    """
    kinds: dict[type, Any] = {
        ImageConfig: ImageDecoder,
        AudioConfig: AudioDecoder,
        TextConfig: TextDecoder,
        FeaturesConfig: FeaturesDecoder,
    }
    if type(config) not in kinds:
        raise DataError(f"{config.name}: {type(config).__name__} is not read from files")
    if isinstance(config, TextConfig) and config.vocabulary < 256:
        raise DataError(f"{config.name}.vocabulary is {config.vocabulary}; bytes need 256")
    decoder: Decoder = kinds[type(config)](config)
    return decoder
