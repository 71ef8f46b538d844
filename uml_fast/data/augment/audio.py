"""Augmentation of sounds, on int16 samples: the stem makes log-mel frames of whatever it gets.

SpecAugment (Park et al. 2019) masks time and frequency of those frames. Here a masked time is
silence in the samples, and masked bands are taken out of their spectrum, so the frames have the
floor of the logarithm there; docs/design.md says why not in the stem.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from uml_fast.config import require
from uml_fast.data.augment.draws import Draws
from uml_fast.kernels.log_mel import mel_edges
from uml_fast.modalities.audio import AudioConfig

_NOISE_SAMPLES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioAugment:
    """Steps in the order of the fields; each is left out at its default."""

    shift_s: float = 0.0
    """Most seconds that a sound moves either way; what leaves one end comes in at the other."""
    gain_db: float = 0.0
    """The gain is drawn from -x..x decibels."""
    noise: float = 0.0
    """Probability that pink noise is mixed in."""
    noise_snr_db: tuple[float, float] = (10.0, 30.0)
    """Least and most decibels of the sound over that noise."""
    frequency_masks: int = 0
    """SpecAugment: stretches of mel bands that are taken out; 2 is usual."""
    frequency_mask_mels: int = 8
    """Most mel bands of each."""
    time_masks: int = 0
    """SpecAugment: stretches of silence; 2 is usual."""
    time_mask_s: float = 0.5
    """Most seconds of each."""

    def __post_init__(self) -> None:
        name = "data.augment.audio"
        for what in ("shift_s", "gain_db", "time_masks", "time_mask_s", "frequency_masks"):
            value = getattr(self, what)
            require(value >= 0, f"{name}.{what} is {value}; it must be >= 0")
        require(0 <= self.noise <= 1, f"{name}.noise is {self.noise}; it must be in 0..1")
        low, high = self.noise_snr_db
        require(low <= high, f"{name}.noise_snr_db is {self.noise_snr_db}; least <= most")
        require(
            self.frequency_mask_mels >= 0,
            f"{name}.frequency_mask_mels is {self.frequency_mask_mels}; it must be >= 0",
        )

    @property
    def is_off(self) -> bool:
        """Whether sounds stay as they are."""
        return not (
            self.shift_s or self.gain_db or self.noise or self._silences or self._masks_bands
        )

    @property
    def _silences(self) -> bool:
        return bool(self.time_masks and self.time_mask_s)

    @property
    def _masks_bands(self) -> bool:
        return bool(self.frequency_masks and self.frequency_mask_mels)

    def check(self, config: AudioConfig) -> None:
        """Raise ConfigError unless the modality's sounds can be changed so."""
        require(
            self.frequency_mask_mels <= config.mels,
            f"data.augment.audio.frequency_mask_mels is {self.frequency_mask_mels}; "
            f"{config.name} has {config.mels} bands",
        )

    def apply(self, samples: np.ndarray, config: AudioConfig, draws: Draws) -> np.ndarray:
        """int16 (n,) to the same, changed."""
        n, rate = len(samples), config.sample_rate
        if self.shift_s:
            most = min(round(self.shift_s * rate), n)
            samples = np.roll(samples, draws.below(2 * most + 1) - most)
        if not (self.gain_db or self.noise or self._silences or self._masks_bands):
            return samples
        wave = samples.astype(np.float32)
        if self.gain_db:
            wave *= 10 ** (draws.uniform(-self.gain_db, self.gain_db) / 20)
        if self.noise and draws.chance(self.noise):
            snr_db = draws.uniform(*self.noise_snr_db)
            start = draws.below(_NOISE_SAMPLES)
            add_noise(wave, 10 ** (-snr_db / 20), start)
        if self._masks_bands:
            bands = [
                _stretch(config.mels, self.frequency_mask_mels, draws)
                for _ in range(self.frequency_masks)
            ]
            wave = without_bands(wave, bands, config)
        if self._silences:
            most = min(round(self.time_mask_s * rate), n)
            for _ in range(self.time_masks):
                first, last = _stretch(n, most, draws)
                wave[first:last] = 0
        np.rint(wave, out=wave)
        return np.clip(wave, -32768, 32767, out=wave).astype(np.int16)


def _stretch(size: int, most: int, draws: Draws) -> tuple[int, int]:
    """First and last (exclusive) of 0..most consecutive places among ``size``."""
    width = draws.below(most + 1)
    first = draws.below(size - width + 1)
    return first, first + width


@functools.cache
def _noise() -> np.ndarray:
    """float32 (2**20,) pink noise of power 1: its power falls as 1 / frequency."""
    rng = np.random.Generator(np.random.Philox(key=0))
    spectrum = np.fft.rfft(rng.standard_normal(_NOISE_SAMPLES))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    wave = np.fft.irfft(spectrum)
    return (wave / wave.std()).astype(np.float32)


def add_noise(wave: np.ndarray, level: float, start: int) -> None:
    """Add noise of ``level`` times the wave's root mean square, from ``start`` of the noise on."""
    scale = np.float32(level * np.sqrt(np.mean(wave * wave, dtype=np.float64)))
    noise = _noise()
    at = 0
    while at < len(wave):
        part = noise[start : start + len(wave) - at]
        wave[at : at + len(part)] += scale * part
        at, start = at + len(part), 0


@functools.cache
def _edges_hz(sample_rate: int, mels: int) -> np.ndarray:
    return mel_edges(sample_rate / 2, mels, "htk").numpy()


def without_bands(
    wave: np.ndarray, bands: list[tuple[int, int]], config: AudioConfig
) -> np.ndarray:
    """float32 (n,) without the mel bands first..last - 1 of each of ``bands``."""
    n = len(wave)
    step = 1 << max(0, n.bit_length() - 4)
    padded = -(-n // step) * step  # a power of two times 8..16: other lengths can be slow
    spectrum = np.fft.rfft(wave, padded)
    edges_hz = _edges_hz(config.sample_rate, config.mels)
    for first, last in bands:
        if first == last:
            continue
        # band k of the filter bank rises from edge k and ends at edge k + 2
        low, high = edges_hz[[first, last + 1]] * padded / config.sample_rate
        spectrum[round(low) : round(high) + 1] = 0
    return np.fft.irfft(spectrum, padded)[:n].astype(np.float32, copy=False)
