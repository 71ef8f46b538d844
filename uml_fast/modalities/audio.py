"""Audio: int16 samples, one row per token; log-mel frames of a row make its features."""

from __future__ import annotations

import base64
import io
import wave
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uml_fast.config import ModalityConfig, require
from uml_fast.kernels.feature_stem import feature_stem
from uml_fast.kernels.log_mel import log_mel
from uml_fast.modalities.base import Modality
from uml_fast.packing.pack import RegionRows


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig(ModalityConfig):
    """Mono waveforms cut into rows of ``row_samples`` samples."""

    sample_rate: int = 16000
    """Samples per second."""
    row_samples: int = 640
    """Samples per row (token)."""
    frames: int = 4
    """Log-mel frames per row; the hop is ``row_samples / frames`` samples."""
    window: int = 400
    """Hann window and DFT length in samples; it may reach into the next row."""
    mels: int = 40
    """Mel bands (HTK scale) from 0 to half the sample rate."""
    positions: int = 256
    """Entries of the learned position table: the longest sound in rows."""

    def __post_init__(self) -> None:
        ModalityConfig.__post_init__(self)
        require(self.frames >= 1, f"{self.name}.frames is {self.frames}; it must be >= 1")
        require(
            self.row_samples % self.frames == 0,
            f"{self.name}: row_samples {self.row_samples} is not a multiple of frames "
            f"{self.frames}",
        )
        require(
            self.hop <= self.window <= self.row_samples + self.hop,
            f"{self.name}: window {self.window} must lie in "
            f"{self.hop}..{self.row_samples + self.hop} (hop to row_samples + hop)",
        )

    @property
    def hop(self) -> int:
        """Samples between frames."""
        return self.row_samples // self.frames

    def build(self, width: int, output_width: int, decode: bool) -> Audio:
        """The stem and decoder for a backbone of this width."""
        return Audio(self, width, output_width, decode)


def to_rows(waveform: np.ndarray, row_samples: int) -> np.ndarray:
    """int16 (samples,) to rows (n, row_samples); the end is filled with silence to a whole row."""
    n = -(-len(waveform) // row_samples)
    rows = np.zeros(n * row_samples, np.int16)
    rows[: len(waveform)] = waveform
    return rows.reshape(n, row_samples)


class Audio(Modality):
    """``tokens = Linear((log(mel(|DFT(frames)|^2) + 1e-6) - mean) / deviation) + position``.

    A frame starts every hop and may reach into the next row of the same sound; behind the last row
    there is silence, so a sound's features depend on that sound alone.
    """

    row_dtype = "int16"
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: AudioConfig, width: int, output_width: int, decode: bool) -> None:
        super().__init__(
            config, features=config.frames * config.mels, width=width, output_width=output_width,
            positions=config.positions, decode=decode,
        )  # fmt: skip
        self.config = config
        self.row_elems = config.row_samples
        self.register_buffer("mean", torch.zeros(config.mels))
        self.register_buffer("deviation", torch.ones(config.mels))

    def log_mel(
        self,
        raw: Tensor,
        continues: Tensor,
        mean: Tensor | None = None,
        deviation: Tensor | None = None,
    ) -> Tensor:
        """int16 (C, row_samples) to log-mel (C, frames * mels) fp32.

        ``continues`` is bool (C,), True where the next row belongs to the same sound; with ``mean``
        and ``deviation`` the bands are normalised.
        """
        c = self.config
        return log_mel(
            raw, continues, frames=c.frames, window=c.window, sample_rate=c.sample_rate,
            mels=c.mels, mean=mean, deviation=deviation,
        )  # fmt: skip

    def fit(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        continues = torch.ones(len(rows), dtype=torch.bool)
        continues[torch.from_numpy(offsets[1:] - 1)] = False
        mel = self.log_mel(torch.from_numpy(rows), continues).view(-1, self.config.mels)
        self.mean.copy_(mel.mean(0))
        self.deviation.copy_(mel.std(0).clamp(min=1e-3))

    def features(self, region: RegionRows) -> Tensor:
        return self.log_mel(region.raw, region.continues_C(), self.mean, self.deviation)

    def embed(
        self, region: RegionRows, features: Tensor | None, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        features = self.features(region) if features is None else features
        return feature_stem(
            features, *self.stem_arguments(region), None, None, None, dtype=dtype, out=out
        )

    def describe(self, sample: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(self.config.sample_rate)
            out.writeframes(np.ascontiguousarray(sample).tobytes())
        return {"kind": "audio", "wav": base64.b64encode(file.getvalue()).decode()}
