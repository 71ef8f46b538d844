"""Synthesised speech: the eSpeak NG library, driven through ctypes, with a cache of what it said.

The library comes in the wheel ``espeakng-loader``; nothing is downloaded. Its state is global and
what it says depends on what it said before, so ``spoken`` runs it in a fresh child process with
fixed seeds: equal requests give equal samples.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.runtime.files import cache_folder

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_UTF8, _POSITION_CHARACTER = 1, 1
_RATE, _PITCH = 1, 3
_RETURN_OK = 0
_SEED = 1
_MISSING = "speech needs the eSpeak NG library: pip install espeakng-loader"
_CACHE_FORMAT = 1
"""Part of the fingerprint: raised when what is done to the samples changes."""


class SpeechError(RuntimeError):
    """Speech that cannot be made; the message names the voice or text and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """How something is said."""

    name: str = "en-us"
    """eSpeak NG voice, with a variant behind ``+`` (``en-us+f2``)."""
    words_per_minute: int = 180
    """Speed, 80..450 words per minute."""
    pitch: int = 50
    """Base pitch, 0..100."""

    def __post_init__(self) -> None:
        if not 80 <= self.words_per_minute <= 450:
            raise SpeechError(
                f"voice {self.name}: words_per_minute is {self.words_per_minute}, not in 80..450"
            )
        if not 0 <= self.pitch <= 100:
            raise SpeechError(f"voice {self.name}: pitch is {self.pitch}, not in 0..100")


@dataclass(frozen=True, slots=True)
class _Engine:
    """The initialised library."""

    library: ctypes.CDLL
    sample_rate: int
    """Samples per second of what it says."""
    version: str


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_heard: list[np.ndarray] = []


@_Callback
def _collect(samples: Any, count: int, _events: int | None) -> int:
    if samples and count > 0:
        _heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0


@functools.cache
def _engine() -> _Engine:
    try:
        import espeakng_loader
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(_MISSING, name="espeakng_loader") from e
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    library.espeak_Info.restype = ctypes.c_char_p
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
        ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    folder = str(espeakng_loader.get_data_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, folder.encode(), _DONT_EXIT)
    if rate <= 0:
        raise SpeechError(
            f"eSpeak NG found no voice data in {folder}; "
            "pip install --force-reinstall espeakng-loader"
        )
    library.espeak_SetSynthCallback(_collect)
    # breath and flutter draw from C's generator, the rest from the library's own
    ctypes.CDLL(None).srand(_SEED)
    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    return _Engine(library, rate, library.espeak_Info(None).decode())


def synthesise(text: str, voice: Voice, sample_rate: int = 16000) -> np.ndarray:
    """Say ``text``: int16 (samples,), mono at ``sample_rate`` Hz, silence at both ends cut off.

    Not for two threads at once, and the samples vary a little with what the process said before.

    Raises:
        ModuleNotFoundError: the package ``espeakng_loader`` is missing.
        SpeechError: the library does not know the voice, or says nothing for the text.
    """
    from scipy.signal import resample_poly

    engine = _engine()
    library = engine.library
    if library.espeak_SetVoiceByName(voice.name.encode()) != _RETURN_OK:
        raise SpeechError(f"eSpeak NG {engine.version} has no voice {voice.name!r}; try 'en-us'")
    library.espeak_SetParameter(_RATE, voice.words_per_minute, 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)
    _heard.clear()
    encoded = text.encode()
    status = library.espeak_Synth(
        encoded, len(encoded) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None
    )
    if status != _RETURN_OK:
        raise SpeechError(f"eSpeak NG {engine.version} failed with status {status} on {text!r}")
    wave = np.concatenate(_heard) if _heard else np.zeros(0, np.int16)
    _heard.clear()
    divisor = np.gcd(sample_rate, engine.sample_rate)
    wave = resample_poly(
        wave.astype(np.float64), sample_rate // divisor, engine.sample_rate // divisor
    )
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max(initial=0.0))
    if len(loud) == 0:
        raise SpeechError(f"voice {voice.name!r} says nothing for the text {text!r}")
    trimmed = wave[loud[0] : loud[-1] + 1]
    return np.clip(np.rint(trimmed), -32768, 32767).astype(np.int16)


def spoken(
    texts: Sequence[str], voices: Sequence[Voice], sample_rate: int = 16000
) -> list[np.ndarray]:
    """``texts[i]`` said in ``voices[i]``: int16 (samples,) each, kept in ``cache_folder()``.

    Equal requests give equal samples. A damaged file is made again; a folder that cannot be written
    costs the time of the synthesis (about 5 ms a word), no more.

    Raises:
        ValueError: there are not as many voices as texts.
        ModuleNotFoundError: the package ``espeakng_loader`` is missing.
        SpeechError: see ``synthesise``.
    """
    if len(texts) != len(voices):
        raise ValueError(f"{len(texts)} texts but {len(voices)} voices; give one voice per text")
    try:
        version = importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError as e:
        raise ModuleNotFoundError(_MISSING, name="espeakng_loader") from e
    said = [(t, asdict(v)) for t, v in zip(texts, voices, strict=True)]
    request = json.dumps({"sample_rate": sample_rate, "said": said})
    fingerprint = hashlib.sha256(f"{_CACHE_FORMAT} {version} {request}".encode()).hexdigest()[:24]
    path = cache_folder() / f"speech-{fingerprint}.npz"
    try:
        cached = _unpack(path.read_bytes(), len(texts))
    except OSError:
        cached = None
    if cached is not None:
        return cached
    child = subprocess.run(
        [sys.executable, "-m", "uml_fast.data.speech"], input=request.encode(), capture_output=True
    )
    waves = _unpack(child.stdout, len(texts)) if child.returncode == 0 else None
    if waves is None:
        reason = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise SpeechError(f"speech synthesis ended with status {child.returncode}: {reason[0]}")
    _write(path, child.stdout)
    return waves


def _serve(request: bytes) -> bytes:
    """What the child process does: the samples of a request, as the bytes of an .npz file."""
    wanted = json.loads(request)
    waves = [synthesise(text, Voice(**v), wanted["sample_rate"]) for text, v in wanted["said"]]
    file = io.BytesIO()
    np.savez(file, samples=np.concatenate(waves), ends=np.cumsum([len(w) for w in waves]))
    return file.getvalue()


def _unpack(data: bytes, count: int) -> list[np.ndarray] | None:
    """The waveforms in the bytes of an .npz file, or None where they are damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            samples, ends = file["samples"], file["ends"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(ends) != count or samples.dtype != np.int16 or ends[-1] != len(samples):
        return None
    return np.split(samples, ends[:-1])


def _write(path: Path, data: bytes) -> None:
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdout.buffer.write(_serve(sys.stdin.buffer.read()))
