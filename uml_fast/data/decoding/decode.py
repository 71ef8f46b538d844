"""From the stored bytes of samples to arrays: the part of reading that has several backends.

A backend decodes; what an array has to be for a run, and how it becomes rows, is ``rows.py``'s, so
that every backend gives the same rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from uml_fast.config import ModalityConfig
from uml_fast.data.shards.lengths import npy_layout
from uml_fast.data.source import DataError, reason
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig

Backend = Literal["webdataset", "dali", "dali_gpu"]
_JPEG = b"\xff\xd8"
_MOST_PIXELS = 1 << 28
"""Of an image; the header of a broken one can promise gigabytes."""


class DecodeError(ValueError):
    """A sample's bytes cannot be decoded; the message says what is wrong with them."""


class Decode(Protocol):
    """The arrays of samples of one modality.

    images: uint8 (h, w, c) at the stored size; an EXIF orientation is not applied (``prepare``
    applies it where it resizes). audio: int16 (n,), cut at the longest sound the run takes. text:
    uint8 (n,). features: float32 (rows, features).
    """

    def __call__(self, payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
        """One array for each payload, or what is wrong with it. Threads may call it together."""


@dataclass(frozen=True, slots=True)
class OneByOne:
    """Decodes each sample alone with the library of its format."""

    one: Callable[[bytes], np.ndarray]
    """The array of a payload; raises DecodeError."""

    def __call__(self, payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
        """See ``Decode``."""
        out: list[np.ndarray | DecodeError] = []
        for payload in payloads:
            try:
                out.append(self.one(payload))
            except DecodeError as e:
                out.append(e)
        return out


def decode_of(config: ModalityConfig, backend: Backend = "webdataset") -> Decode:
    """What decodes the samples of a modality.

    Raises:
        DataError: samples of the modality cannot be read from files.
        ConfigError: the backend needs a GPU and there is none.
        ModuleNotFoundError: a library of the backend is missing.
    """
    plain = _one_by_one(config)
    if backend == "webdataset":
        return plain
    from uml_fast.data.decoding.dali import batched

    return batched(config, plain, on_gpu=backend == "dali_gpu")


def _one_by_one(config: ModalityConfig) -> OneByOne:
    if isinstance(config, ImageConfig):
        return OneByOne(_image(config))
    if isinstance(config, AudioConfig):
        return OneByOne(_audio(config))
    if isinstance(config, TextConfig):
        return OneByOne(_text)
    if isinstance(config, FeaturesConfig):
        return OneByOne(_features)
    raise DataError(f"{config.name}: {type(config).__name__} is not read from files")


def _image(config: ImageConfig) -> Callable[[bytes], np.ndarray]:
    import simplejpeg
    from PIL import Image

    space = "GRAY" if config.channels == 1 else "RGB"
    mode = "L" if config.channels == 1 else "RGB"

    def decode(payload: bytes) -> np.ndarray:
        if payload[:2] == _JPEG:
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(payload)  # 1 us
                if height * width > _MOST_PIXELS:
                    raise ValueError(f"{height} x {width} pixels")
                pixels: np.ndarray = simplejpeg.decode_jpeg(payload, space, strict=True)
            except ValueError as e:
                raise DecodeError(f"broken JPEG: {e}") from None
            return pixels
        try:
            with Image.open(io.BytesIO(payload)) as image:
                converted = np.asarray(image.convert(mode))
        except Exception as e:  # whatever the parser of a broken file's format stumbles on
            raise DecodeError(f"broken image: {reason(e)}") from None
        return converted.reshape(*converted.shape[:2], config.channels)

    return decode


def _audio(config: AudioConfig) -> Callable[[bytes], np.ndarray]:
    import soundfile

    rate, most = config.sample_rate, config.positions * config.row_samples

    def decode(payload: bytes) -> np.ndarray:
        try:
            with soundfile.SoundFile(io.BytesIO(payload)) as sound:
                if sound.samplerate != rate or sound.channels != 1:
                    raise DecodeError(
                        f"{sound.samplerate} Hz with {sound.channels} channels; the run takes "
                        f"{rate} Hz mono: prepare with --sample-rate {rate}"
                    )
                samples: np.ndarray = sound.read(most, dtype="int16")
        except (soundfile.LibsndfileError, TypeError, ValueError) as e:
            if isinstance(e, DecodeError):
                raise
            raise DecodeError(f"broken sound: {e}") from None
        return samples

    return decode


def _text(payload: bytes) -> np.ndarray:
    return np.frombuffer(payload, np.uint8)


def _features(payload: bytes) -> np.ndarray:
    try:
        shape, is_fortran, dtype, start = npy_layout(payload)
    except DataError as e:
        raise DecodeError(f"broken array: {e}") from None
    if dtype.kind not in "fiub":
        raise DecodeError(f"dtype {dtype}; features are numbers")
    flat = np.frombuffer(payload, dtype, offset=start)
    values = flat.reshape(shape, order="F" if is_fortran else "C")
    return np.atleast_2d(values).astype(np.float32, copy=False)
