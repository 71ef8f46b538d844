"""Log-mel features of waveforms cut into rows, from raw samples to normalised values in one pass.

    frame  = hann * samples[start : start + window]              a frame every hop = R / frames
    out    = (log(mel(|DFT(frame)|^2) * (4 / window)^2 + floor) - mean) / deviation

Legend: C rows of R samples, F frames of all rows, N samples of a window, B = N // 2 + 1 bins, M mel
bands. Samples are int16 (scaled by 1 / 32768) or fp32 of full scale 1; a full-scale sine at a bin's
centre has power (N / 4)^2 under the Hann window, so it comes out as about log(1 + floor).
Arithmetic is fp32. Traffic: one read of the samples and one write of F * M values; frames, spectrum
and power stay on the chip. FLOPs: about 5 N log2(N) a frame by FFT (CPU), 2 N (N + 2) by products
that use the symmetry of the window (CUDA). There is no gradient: samples are data.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import (
    FLOATING,
    check_contiguous,
    check_floating,
    check_same,
    check_shape,
)
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "log_mel"

MelScale = Literal["htk", "slaney"]

INT16_SCALE = 1 / 32768
"""Full scale of int16 samples is 1."""


def mel_edges(top_hz: float, mels: int, mel_scale: str) -> Tensor:
    """Frequencies in Hz, float64 (mels + 2,), equally spaced in mel from 0 to ``top_hz``.

    "htk" is 2595 log10(1 + f / 700) (Young et al., The HTK Book); "slaney" is linear to 1 kHz with
    200 / 3 Hz a mel and logarithmic above, 27 mels to 6.4 kHz (Slaney, Auditory Toolbox, 1998).
    """
    if mel_scale == "htk":
        top = 2595 * math.log10(1 + top_hz / 700)
        mel = torch.linspace(0, top, mels + 2, dtype=torch.float64)
        return 700 * (10 ** (mel / 2595) - 1)
    step_hz, corner_hz, log_step = 200 / 3, 1000.0, math.log(6.4) / 27
    corner = corner_hz / step_hz
    top = (
        top_hz / step_hz if top_hz < corner_hz else corner + math.log(top_hz / corner_hz) / log_step
    )
    mel = torch.linspace(0, top, mels + 2, dtype=torch.float64)
    above = corner_hz * torch.exp(log_step * (mel - corner))
    return torch.where(mel < corner, step_hz * mel, above)


def mel_filters(
    sample_rate: int, window: int, mels: int, mel_scale: str = "htk", norm: str | None = None
) -> Tensor:
    """Triangular mel filters float64 (window // 2 + 1, mels) from 0 to sample_rate / 2 Hz.

    Peak 1, or with ``norm="slaney"`` equal area: 2 / (width of the band in Hz).
    """
    hertz = torch.arange(window // 2 + 1, dtype=torch.float64) * sample_rate / window
    edges = mel_edges(sample_rate / 2, mels, mel_scale)
    rising = (hertz[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0)
    if norm == "slaney":
        filters = filters * 2 / (edges[2:] - edges[:-2])
    return filters


def hann(window: int) -> Tensor:
    """Periodic Hann window, float64 (window,)."""
    n = torch.arange(window, dtype=torch.float64)
    return 0.5 - 0.5 * torch.cos(2 * torch.pi * n / window)


def windowed_dft(window: int) -> Tensor:
    """Hann window and real DFT: float64 (window, 2 * (window // 2 + 1)), cosines, then -sines."""
    n = torch.arange(window)
    k = torch.arange(window // 2 + 1)
    # reduced modulo the window first: a large angle would lose bits
    angle = 2 * torch.pi / window * (n[:, None] * k % window).double()
    return hann(window)[:, None] * torch.cat((angle.cos(), -angle.sin()), 1)


@functools.lru_cache(maxsize=16)
def _reference_tables(
    sample_rate: int, window: int, mels: int, mel_scale: str, norm: str | None,
    device: torch.device, wide: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    filters = mel_filters(sample_rate, window, mels, mel_scale, norm)
    return windowed_dft(window).to(device, wide), filters.to(device, wide)


def log_mel_reference(
    samples: Tensor, continues: Tensor, *, frames: int, window: int, sample_rate: int, mels: int,
    mel_scale: str, norm: str | None, floor: float, mean: Tensor | None, deviation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Plain torch definition; float64 samples or statistics make all of it float64."""
    wide = _wide(samples, mean, dtype)
    hop = samples.shape[1] // frames
    overlap = window - hop
    scaled = samples.to(wide) * (1.0 if samples.is_floating_point() else INT16_SCALE)
    # rows of another sound, which may hold NaN, count as silence
    goes_on = continues[:-1, None]
    following = torch.zeros_like(scaled[:, :overlap])
    following[:-1] = torch.where(goes_on, scaled[1:, :overlap], 0.0)
    x_CFN = torch.cat((scaled, following), 1).unfold(1, window, hop)
    dft, filters = _reference_tables(
        sample_rate, window, mels, mel_scale, norm, samples.device, wide
    )
    real, imaginary = (x_CFN @ dft).chunk(2, -1)
    power = real.square() + imaginary.square()
    out_CFM = (power @ filters * (4 / window) ** 2 + floor).log()
    if mean is not None and deviation is not None:
        out_CFM = (out_CFM - mean.to(wide)) / deviation.to(wide)
    return out_CFM.flatten(1).to(torch.float64 if wide == torch.float64 else dtype)


def _wide(samples: Tensor, mean: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    dtypes = (samples.dtype, None if mean is None else mean.dtype, dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _choose(backend: Backend, samples: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Choice:
    floating = [samples.new_empty(0, dtype=dtype)]
    floating += [t for t in (samples, mean) if t is not None and t.is_floating_point()]
    return choose(NAME, backend, *floating)


def _fwd(
    choice: Choice, samples: Tensor, continues: Tensor, mean: Tensor | None,
    deviation: Tensor | None, frames: int, window: int, sample_rate: int, mels: int,
    mel_scale: str, norm: str | None, floor: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if deviation is not None and deviation.device.type == "cpu" and not (deviation > 0).all():
        band = int((~(deviation > 0)).int().argmax())
        raise ValueError(
            f"{NAME}: deviation[{band}] is {deviation[band].item()}; it must be above 0"
        )
    if choice == "reference":
        return log_mel_reference(
            samples, continues, frames=frames, window=window, sample_rate=sample_rate, mels=mels,
            mel_scale=mel_scale, norm=norm, floor=floor, mean=mean, deviation=deviation,
            dtype=dtype,
        )  # fmt: skip
    out = samples.new_empty(len(samples), frames * mels, dtype=dtype)
    if mean is None or deviation is None:
        mean, deviation = out.new_zeros(mels, dtype=torch.float32), None
    wide_deviation = torch.ones_like(mean) if deviation is None else deviation.float()
    implementation(NAME, choice).fwd(
        samples, continues, mean.float(), wide_deviation, frames, window, sample_rate, mels,
        mel_scale, norm, floor, out,
    )  # fmt: skip
    return out


@torch.library.custom_op("uml_fast::log_mel", mutates_args=())
def _fwd_op(
    samples: Tensor, continues: Tensor, mean: Tensor | None, deviation: Tensor | None,
    frames: int, window: int, sample_rate: int, mels: int, mel_scale: str, norm: str | None,
    floor: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _fwd(
        _choose("auto", samples, mean, dtype), samples, continues, mean, deviation, frames, window,
        sample_rate, mels, mel_scale, norm, floor, dtype,
    )  # fmt: skip


@_fwd_op.register_fake
def _(samples, continues, mean, deviation, frames, window, sample_rate, mels, mel_scale, norm,
      floor, dtype):  # fmt: skip
    dtype = torch.float64 if _wide(samples, mean, dtype) == torch.float64 else dtype
    return samples.new_empty(samples.shape[0], frames * mels, dtype=dtype)


def check_frames(row_samples: int, frames: int, window: int) -> None:
    """Raise ValueError unless rows divide into frames and windows reach one row ahead at most."""
    if frames < 1 or row_samples < 1 or row_samples % frames:
        raise ValueError(
            f"{NAME}: rows of {row_samples} samples do not divide into {frames} frames"
        )
    hop = row_samples // frames
    if not hop <= window <= row_samples + hop:
        raise ValueError(
            f"{NAME}: window is {window}; it must lie in {hop}..{row_samples + hop} "
            "(hop to row samples + hop)"
        )


def _check(
    samples: Tensor, continues: Tensor, mean: Tensor | None, deviation: Tensor | None,
    frames: int, window: int, sample_rate: int, mels: int, mel_scale: str, norm: str | None,
    floor: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    if samples.dtype not in (torch.int16, torch.float32, torch.float64):
        raise TypeError(f"{NAME}: samples are {samples.dtype}; they must be int16 or float32")
    if samples.ndim != 2:
        raise ValueError(f"{NAME}: samples are {list(samples.shape)}; they must be [rows, samples]")
    if samples.requires_grad:
        raise ValueError(f"{NAME}: samples require a gradient; there is none")
    if continues.dtype != torch.bool:
        raise TypeError(f"{NAME}: continues is {continues.dtype}; it must be bool")
    check_shape(NAME, "continues", continues, tuple(samples.shape[:1]))
    check_frames(samples.shape[1], frames, window)
    if sample_rate < 1 or mels < 1:
        raise ValueError(f"{NAME}: sample_rate {sample_rate} and mels {mels} must be at least 1")
    if mel_scale not in ("htk", "slaney"):
        raise ValueError(f"{NAME}: mel_scale is {mel_scale!r}; it must be 'htk' or 'slaney'")
    if norm not in (None, "slaney"):
        raise ValueError(f"{NAME}: norm is {norm!r}; it must be None or 'slaney'")
    if not torch.finfo(torch.float32).tiny <= floor < math.inf:
        raise ValueError(
            f"{NAME}: floor is {floor}; it must be positive, so that silence has a log"
        )
    if dtype not in FLOATING:
        raise TypeError(f"{NAME}: dtype is {dtype}; it must be a floating one")
    if (mean is None) != (deviation is None):
        raise ValueError(f"{NAME}: mean and deviation must be given together")
    tensors = {"samples": samples, "continues": continues}
    if mean is not None and deviation is not None:
        check_floating(NAME, mean=mean, deviation=deviation)
        check_shape(NAME, "mean", mean, (mels,))
        check_shape(NAME, "deviation", deviation, (mels,))
        tensors |= {"mean": mean, "deviation": deviation}
    check_same(NAME, "device", **tensors)
    check_contiguous(NAME, **tensors)


@torch.no_grad()
def log_mel(
    samples: Tensor, continues: Tensor, *, frames: int, window: int, sample_rate: int = 16000,
    mels: int = 40, mel_scale: MelScale = "htk", norm: Literal["slaney"] | None = None,
    floor: float = 1e-6, mean: Tensor | None = None, deviation: Tensor | None = None,
    dtype: torch.dtype = torch.float32, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Log-mel features of each row's frames.

    A frame starts every ``R / frames`` samples and may reach into the next row of the same sound;
    behind the last row there is silence, so a sound's features depend on that sound alone.

    Args:
        samples: (C, R) contiguous, int16 or float32 of full scale 1. A NaN makes the frames that
            it is in NaN. Float64 is computed by the reference.
        continues: bool (C,), True where the next row belongs to the same sound; that of the last
            row is not looked at.
        frames: per row.
        window: samples of the Hann window and the DFT, from R / frames to R + R / frames.
        sample_rate: samples per second.
        mels: bands from 0 to half the sample rate.
        mel_scale, norm: of the bands' centres and heights, see ``mel_filters``.
        floor: power added to each band before the logarithm; 1e-6 is -60 dB of full scale.
        mean, deviation: (mels,) both or neither; the result is (x - mean) / deviation. Deviations
            on CUDA are not looked at: one of zero makes its band infinite or NaN.
        dtype: of the result. Float64 statistics give a float64 result.
        backend: for tests.

    Returns:
        (C, frames * mels), frame after frame. No gradient.

    Raises:
        TypeError, ValueError: shapes, dtypes, strides or sizes that do not fit; on the CPU, a
            deviation that is not above zero.
    """
    options = (frames, window, sample_rate, mels, mel_scale, norm, floor, dtype)
    _check(samples, continues, mean, deviation, *options)
    if torch.compiler.is_compiling():
        out: Tensor = _fwd_op(samples, continues, mean, deviation, *options)
        return out
    return _fwd(
        _choose(backend, samples, mean, dtype), samples, continues, mean, deviation, *options
    )


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Sounds of five rows, noise under a falling envelope: loud and nearly silent frames."""
    C, R, M = shape["C"], shape["R"], shape["M"]
    noise = torch.randn(C, R, generator=generator) * 0.3
    samples = noise * 10 ** (-4 * torch.rand(C, 1, generator=generator))
    statistics = torch.randn(2, M, generator=generator)
    rows = torch.arange(C)
    is_int16 = shape.get("samples", "int16") == "int16"
    return {
        "samples": (samples * 32767).round().clamp(-32768, 32767).short() if is_int16 else samples,
        "continues": rows % 5 != 4,
        "frames": shape["F"],
        "window": shape["N"],
        "mels": M,
        "mel_scale": shape.get("mel_scale", "htk"),
        "norm": shape.get("norm"),
        "mean": statistics[0] - 5,
        "deviation": statistics[1].abs() + 0.5,
        "dtype": dtype,
    }


def _flops(shape: Shape) -> tuple[float, float]:
    """5 N log2(N) / 2 of a real FFT, 3 a bin for its power, 4 for the two bands of a bin."""
    N = shape["N"]
    frame = 2.5 * N * math.log2(max(N, 2)) + 7 * (N / 2 + 1)
    return shape["C"] * shape["F"] * frame, 0.0


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """One read of the samples, one write of the features."""
    sample = 2 if shape.get("samples", "int16") == "int16" else 4
    return float(shape["C"] * (sample * shape["R"] + size * shape["F"] * shape["M"])), 0.0


SPEC = KernelSpec(
    name=NAME,
    function=log_mel,
    inputs=_inputs,
    gradients=(),
    tests={
        "no rows": {"C": 0, "R": 32, "F": 2, "N": 16, "M": 4},
        "one row, one frame, one band": {"C": 1, "R": 16, "F": 1, "N": 16, "M": 1},
        "default, a block and one row": {"C": 17, "R": 640, "F": 4, "N": 400, "M": 40},
        "fp32, a power of two, Slaney": {
            "C": 3, "R": 256, "F": 2, "N": 256, "M": 23, "samples": "fp32", "mel_scale": "slaney",
            "norm": "slaney",
        },
        "a prime window, a frame longer than a row": {"C": 7, "R": 60, "F": 2, "N": 89, "M": 7},
    },
    benches={
        "default": {"C": 1600, "R": 640, "F": 4, "N": 400, "M": 40},
        "long": {"C": 65536, "R": 640, "F": 4, "N": 400, "M": 40},
        "Whisper": {"C": 16384, "R": 320, "F": 2, "N": 400, "M": 80, "mel_scale": "slaney",
                    "norm": "slaney"},
    },
    aot={
        "default": {"C": 64, "R": 640, "F": 4, "N": 400, "M": 40},
        "fp32 samples, 128 bands": {
            "C": 64, "R": 1024, "F": 4, "N": 1024, "M": 128, "samples": "fp32",
        },
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
