"""Features of sounds that need no learning: statistics of their log-mel bands over time.

Mean, deviation and deviation of the change from frame to frame of each band, so that length and
place of a sound in its clip do not matter. Nothing is fitted to data, so nothing of one fold can
reach another one.

Legend: b sounds of a batch, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.encoders.extraction import Encoder
from uml_fast.kernels.log_mel import log_mel
from uml_fast.modalities.audio import AudioConfig, to_rows

_FRAMES = 4
"""Frames of a row."""
_SCALE = 1 / 30
"""Brings the statistics of one sound to an L2 norm of about 1 to 3 (log-mel values are 0..-14)."""


class SoundEncoder(Encoder):
    """Features of sounds, fp32 (b, 3 M).

    Args:
        sample_rate: samples a second; sounds must have it.
        seconds: what is behind this in a longer sound is not heard.
        mels: M.
        hop: samples between frames.
        window: samples of a frame.
    """

    kind = "audio"

    def __init__(
        self, *, sample_rate: int = 16000, seconds: float = 30.0, mels: int = 64, hop: int = 320,
        window: int = 1024,
    ) -> None:  # fmt: skip
        self.facts = {
            "name": "mel statistics", "sample_rate": sample_rate, "seconds": seconds, "mels": mels,
            "hop": hop, "window": window,
        }  # fmt: skip
        self.width, self._hop = 3 * mels, hop
        row = _FRAMES * hop
        config = AudioConfig(
            name="audio", sample_rate=sample_rate, row_samples=row, frames=_FRAMES, window=window,
            mels=mels, positions=max(1, round(seconds * sample_rate / row)),
        )  # fmt: skip
        self._config, self._decode = config, decode_of(config)

    def prepare(self, payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
        """int16 (samples,) of each sound; see ``Encoder``."""
        sounds = self._decode(payloads)
        silent = DecodeError("a sound without samples")
        return [s if isinstance(s, DecodeError) or len(s) else silent for s in sounds]

    def encode(self, prepared: Sequence[np.ndarray]) -> Tensor:
        """fp32 (b, 3 M)."""
        return torch.stack([self._statistics(sound) for sound in prepared])

    def _statistics(self, sound: np.ndarray) -> Tensor:
        config = self._config
        rows = torch.from_numpy(to_rows(sound, config.row_samples))
        continues = torch.ones(len(rows), dtype=torch.bool)
        continues[-1] = False
        bands = log_mel(
            rows, continues, frames=_FRAMES, window=config.window, sample_rate=config.sample_rate,
            mels=config.mels,
        ).view(-1, config.mels)[: max(1, len(sound) // self._hop)]  # fmt: skip
        change = bands.diff(dim=0) if len(bands) > 1 else torch.zeros_like(bands)
        parts = (bands.mean(0), bands.std(0, correction=0), change.std(0, correction=0))
        return torch.cat(parts) * _SCALE
