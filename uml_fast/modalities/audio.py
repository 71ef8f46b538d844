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
from uml_fast.modalities.base import Modality
from uml_fast.pack import RegionRows

_FLOOR = 1e-6
"""Added to the mel power before the logarithm: -60 dB of full scale."""


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


def mel_filters(sample_rate: int, window: int, mels: int) -> Tensor:
    """Triangular HTK-scale mel filters (window // 2 + 1, mels): peak 1, 0 to sample_rate / 2 Hz."""
    hertz = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    rising = (hertz[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def windowed_dft(window: int) -> Tensor:
    """Periodic Hann and real DFT: (window, 2 * (window // 2 + 1)), cosines, then sines."""
    n = torch.arange(window, dtype=torch.float64)
    k = torch.arange(window // 2 + 1, dtype=torch.float64)
    angle = 2 * torch.pi * n[:, None] * k[None, :] / window
    hann = 0.5 - 0.5 * torch.cos(2 * torch.pi * n / window)
    return (hann[:, None] * torch.cat((angle.cos(), -angle.sin()), 1)).float()


class Audio(Modality):
    """``tokens = Linear((log(mel(|DFT(frames)|^2) + 1e-6) - mean) / deviation) + position``.

    A frame starts every hop and may reach into the next row of the same sound; behind the last row
    there is silence, so a sound's features depend on that sound alone.
    """

    row_dtype = "int16"
    dft: Tensor
    filters: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: AudioConfig, width: int, output_width: int, decode: bool) -> None:
        super().__init__(
            config, features=config.frames * config.mels, width=width, output_width=output_width,
            positions=config.positions, decode=decode,
        )  # fmt: skip
        self.config = config
        self.row_elems = config.row_samples
        self.register_buffer("dft", windowed_dft(config.window), persistent=False)
        filters = mel_filters(config.sample_rate, config.window, config.mels)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("mean", torch.zeros(config.mels))
        self.register_buffer("deviation", torch.ones(config.mels))

    def log_mel(self, raw: Tensor, continues: Tensor) -> Tensor:
        """int16 (C, row_samples) to log-mel (C, frames, mels) fp32, not normalised.

        ``continues`` is bool (C,), True where the next row belongs to the same sound.
        """
        c = self.config
        overlap = c.window - c.hop
        samples = raw.float() / 32768
        following = torch.zeros_like(samples[:, :overlap])
        following[:-1] = samples[1:, :overlap] * continues[:-1, None]
        frames = torch.cat((samples, following), 1).unfold(1, c.window, c.hop)
        real, imaginary = (frames @ self.dft).chunk(2, -1)
        power = real.square() + imaginary.square()
        # a full-scale sine at a bin's centre has power (window / 4)^2 under the Hann window
        return (power @ self.filters * (4 / c.window) ** 2 + _FLOOR).log()

    def fit(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        continues = torch.ones(len(rows), dtype=torch.bool)
        continues[torch.from_numpy(offsets[1:] - 1)] = False
        mel = self.log_mel(torch.from_numpy(rows), continues).flatten(0, 1)
        self.mean.copy_(mel.mean(0))
        self.deviation.copy_(mel.std(0).clamp(min=1e-3))

    def features(self, region: RegionRows) -> Tensor:
        mel = self.log_mel(region.raw, region.continues_C())
        return ((mel - self.mean) / self.deviation).flatten(1)

    def describe(self, sample: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(self.config.sample_rate)
            out.writeframes(np.ascontiguousarray(sample).tobytes())
        return {"kind": "audio", "wav": base64.b64encode(file.getvalue()).decode()}
