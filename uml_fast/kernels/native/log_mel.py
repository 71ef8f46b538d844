"""CPU kernel of log_mel (csrc/cpu/log_mel.cpp) and the tables that it reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.kernels.log_mel import INT16_SCALE, hann, mel_filters
from uml_fast.kernels.native.library import CODES, library


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables of struct MelPlan in csrc/cpu/kernels.h, made in float64."""

    taper: np.ndarray
    points: int
    radices: np.ndarray
    place: np.ndarray
    fft_table: np.ndarray
    split: np.ndarray
    band_first: np.ndarray
    band_start: np.ndarray
    filters: np.ndarray


def _radices(points: int) -> list[int]:
    """Radices whose product is ``points``; those without twiddle factors, the first, are odd."""
    found = []
    for radix in (4, 2, 3, 5, 7):
        while points % radix == 0:
            found.append(radix)
            points //= radix
    radix = 11
    while points > 1:
        if radix * radix > points:
            radix = points
        while points % radix == 0:
            found.append(radix)
            points //= radix
        radix += 2
    return found[::-1]


def _places(radices: list[int]) -> np.ndarray:
    """Digit reversal: where each point must lie for passes of these radices."""
    place = np.zeros(1, np.int32)
    for radix in radices:
        # transforms of every radix-th point lie behind each other
        place = (place[:, None] + len(place) * np.arange(radix, dtype=np.int32)).ravel()
    return place


def _unit(turns: np.ndarray) -> np.ndarray:
    """e**(2 pi i turns) as pairs of cosine and sine."""
    angle = 2 * np.pi * turns
    return np.stack((np.cos(angle), np.sin(angle)), -1)


def _fft_table(radices: list[int]) -> np.ndarray:
    parts, length = [], 1
    for radix in radices:
        parts.append(_unit(np.arange(radix) / radix).ravel())
        j, q = np.arange(length)[:, None], np.arange(1, radix)[None, :]
        parts.append(_unit(-j * q / (radix * length)).ravel())
        length *= radix
    return np.concatenate([*parts, np.zeros(0)]).astype(np.float32)


@functools.lru_cache(maxsize=16)
def plan(
    window: int, sample_rate: int, mels: int, mel_scale: str, norm: str | None, is_int16: bool
) -> Plan:
    """The tables of one kind of features."""
    points = window if window % 2 else window // 2
    radices = _radices(points)
    filters = mel_filters(sample_rate, window, mels, mel_scale, norm).numpy().T
    # the kernel's power of an even window is four times too large
    filters = filters * (4 / window) ** 2 / (1 if window % 2 else 4)
    used = [np.flatnonzero(band) for band in filters]
    first = [u[0] if len(u) else 0 for u in used]
    stop = [u[-1] + 1 if len(u) else 0 for u in used]
    weights = [band[a:b] for band, a, b in zip(filters, first, stop, strict=True)]
    return Plan(
        taper=(hann(window).numpy() * (INT16_SCALE if is_int16 else 1)).astype(np.float32),
        points=points,
        radices=np.array(radices, np.int32),
        place=_places(radices),
        fft_table=_fft_table(radices),
        split=_unit(-np.arange(points // 2 + 1) / window).astype(np.float32),
        band_first=np.array(first, np.int32),
        band_start=np.cumsum([0, *map(len, weights)]).astype(np.int32),
        filters=np.concatenate(weights).astype(np.float32),
    )


def fwd(
    samples: Tensor, continues: Tensor, mean: Tensor, deviation: Tensor, frames: int, window: int,
    sample_rate: int, mels: int, mel_scale: str, norm: str | None, floor: float, out: Tensor,
) -> None:  # fmt: skip
    """Write the features to ``out`` (C, frames * mels)."""
    is_int16 = samples.dtype == torch.int16
    p = plan(window, sample_rate, mels, mel_scale, norm, is_int16)
    tables = (p.radices, p.place, p.fft_table, p.split, p.band_first, p.band_start, p.filters)
    library().log_mel(
        torch.get_num_threads(), len(samples), samples.shape[1], frames, window, mels, is_int16,
        CODES[out.dtype], floor, p.taper.ctypes.data, p.points, len(p.radices),
        max(p.radices, default=1), *(t.ctypes.data for t in tables), mean.data_ptr(),
        deviation.data_ptr(), samples.data_ptr(), continues.data_ptr(), out.data_ptr(),
    )  # fmt: skip
