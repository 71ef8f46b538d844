"""Sounds: checked by decoding them whole; bytes stay as they are where rate and channels fit."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uml_fast.data.prepare.items import BadSample, Converter, Item, Moments, Sample
from uml_fast.data.source import DataError, reason

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
"""Files that are taken as sounds."""

_STORED = {"WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "OGG": "ogg"}
_PROBED = 100

MAX_RATE = 384_000
"""Highest rate in Hz; a broken header's rate would make a filter of any length."""


@dataclass(frozen=True, slots=True)
class AudioConverter(Converter):
    """Passes mono wav, flac and ogg of the right rate on; all else is stored as 16-bit flac."""

    sample_rate: int
    """Samples per second of every stored sound."""
    resamples: bool
    """Whether sounds of another rate are resampled; else they are refused."""

    def convert(self, item: Item) -> Sample:
        """See ``Converter``."""
        content = item.read()
        if not content:
            raise BadSample("empty file", "0 bytes; take it out")
        wave_NC, rate, stored = _decoded(content)
        notes = []
        wave = wave_NC[:, 0]
        if wave_NC.shape[1] > 1:
            wave = wave_NC.mean(1)
            notes.append("stereo mixed down")
        if rate != self.sample_rate:
            if not self.resamples:
                raise BadSample(
                    "wrong sample rate",
                    f"{rate} Hz, most others have {self.sample_rate} Hz; --sample-rate resamples",
                )
            wave = _resampled(wave, rate, self.sample_rate)
            notes.append(f"resampled from {rate} Hz")
        if notes or stored is None:
            content, stored, is_clipped = _flac(wave, self.sample_rate)
            notes += ["clipped"] if is_clipped else []
            notes.append("stored as flac")
        return Sample(content, stored, (len(wave),), Moments.of(wave[:, None]), tuple(notes))


def usual_rate(items: Sequence[Item]) -> int:
    """The rate of most of the first hundred sounds that can be read.

    Raises:
        DataError: none can be read.
    """
    import soundfile

    rates: Counter[int] = Counter()
    for item in items[:_PROBED]:
        try:
            rates[soundfile.info(io.BytesIO(item.read())).samplerate] += 1
        except (BadSample, soundfile.LibsndfileError, TypeError):
            continue
    if not rates:
        first = items[0].name if items else "none"
        raise DataError(f"none of the first {min(len(items), _PROBED)} sounds can be read: {first}")
    return max(rates, key=lambda rate: (rates[rate], rate))


def _decoded(content: bytes) -> tuple[np.ndarray, int, str | None]:
    """float32 (samples, channels), rate, and the extension the bytes can be stored under."""
    import soundfile

    _refuse_truncated(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            wave = file.read(dtype="float32", always_2d=True)
            expected, rate, form = file.frames, file.samplerate, file.format
    except (soundfile.LibsndfileError, TypeError, ValueError) as e:
        raise BadSample("broken sound", reason(e)) from e
    if not 1 <= rate <= MAX_RATE:
        raise BadSample("wrong sample rate", f"{rate} Hz, more than {MAX_RATE} Hz")
    if len(wave) == 0:
        raise BadSample("empty sound", "it has no samples")
    if len(wave) < expected:
        raise BadSample("truncated sound", f"{len(wave)} of {expected} samples can be read")
    if not np.isfinite(wave).all():
        raise BadSample("not finite", "samples are NaN or infinite")
    return wave, rate, _STORED.get(form)


def _refuse_truncated(content: bytes) -> None:
    """libsndfile shortens cut wav and ogg files without a word; their own headers tell."""
    if content[:4] == b"RIFF":
        said = int.from_bytes(content[4:8], "little") + 8
        if 8 < said < 2**32 - 1 and said > len(content) + 1:
            raise BadSample("truncated sound", f"{len(content)} of {said} bytes are there")
    elif content[:4] == b"OggS":
        page = content.rfind(b"OggS")
        segments = content[page + 26] if page + 26 < len(content) else 0
        end = page + 27 + segments + sum(content[page + 27 : page + 27 + segments])
        if len(content) < max(end, page + 27):
            raise BadSample("truncated sound", "its last page is cut off")


def _resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(wave, wanted // common, rate // common), np.float32)


def _flac(wave: np.ndarray, rate: int) -> tuple[bytes, str, bool]:
    import soundfile

    peak = float(np.abs(wave).max())
    file = io.BytesIO()
    soundfile.write(file, wave.clip(-1, 1), rate, format="FLAC", subtype="PCM_16")
    return file.getvalue(), "flac", peak > 1
