"""Triton kernel of log_mel: the DFT as products on the tensor cores.

A program holds a block of frames. The Hann window and the DFT's cosines are even around the middle
of the window and its sines are odd, so a frame is folded as it is loaded, x[n] + x[N - n] and
x[n] - x[N - n], which halves the products. Folded frames meet the windowed basis (in the
second-level cache), the power of a block of bins meets the mel filters, and only log-mel values are
stored.
Operands are fp32 as three tf32 products ("tf32x3"): the logarithm of a quiet band would show the
rounding of a single one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uml_fast.kernels.log_mel import INT16_SCALE, hann, mel_filters
from uml_fast.kernels.triton.launch import launch
from uml_fast.kernels.triton.rounding import store_rounded


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile of one program: frames x bins x folded samples, mel bands."""

    block_frames: int
    block_bins: int
    block_samples: int
    block_mels: int
    num_warps: int


def launch_config(mels: int) -> LaunchConfig:
    """32 frames: each operand of a product is held as two tf32 parts in every warp that needs it,
    and 64 frames spill on sm_80 and sm_90. 8 warps, so that 128 bands fit."""
    return LaunchConfig(32, 64, 32, min(max(triton.next_power_of_2(mels), 16), 128), 8)


@functools.lru_cache(maxsize=16)
def _tables(
    window: int, sample_rate: int, mels: int, mel_scale: str, norm: str | None, is_int16: bool,
    block_bins: int, block_samples: int, block_mels: int, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Basis fp32 (2, folded, bins), cosines and sines, and filters fp32 (bins, mels); each
    dimension filled with zeros to whole blocks."""
    half = window // 2
    n, k = torch.arange(half + 1), torch.arange(half + 1)
    angle = 2 * torch.pi / window * (n[:, None] * k % window).double()
    taper = hann(window)[: half + 1, None] * (INT16_SCALE if is_int16 else 1)
    if window % 2 == 0:
        # the middle sample folds onto itself
        taper = torch.where((n == half)[:, None], taper / 2, taper)
    bins = triton.cdiv(half + 1, block_bins) * block_bins
    basis = torch.zeros(2, triton.cdiv(half + 1, block_samples) * block_samples, bins)
    basis[:, : half + 1, : half + 1] = torch.stack((taper * angle.cos(), taper * angle.sin()))
    filters = torch.zeros(bins, triton.cdiv(mels, block_mels) * block_mels)
    scale = (4 / window) ** 2
    filters[: half + 1, :mels] = scale * mel_filters(sample_rate, window, mels, mel_scale, norm)
    return basis.to(device), filters.to(device)


@triton.jit
def _log_mel_kernel(
    samples_ptr, continues_ptr, basis_ptr, filters_ptr, mean_ptr, deviation_ptr, out_ptr, frames,
    rows, frames_per_row, row_samples, hop, mels, mels_stride, bins, folded, floor,
    WINDOW: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = frame // frames_per_row
    offset = (frame - row * frames_per_row) * hop
    # A window ends in the next row at the latest, and rows of a sound lie one after another.
    goes_on = tl.load(continues_ptr + row, mask=row + 1 < rows, other=0) != 0
    valid = tl.where(goes_on, WINDOW, row_samples - offset)
    valid = tl.where(frame < frames, valid, 0)[:, None]
    start_ptr = samples_ptr + (row * row_samples + offset)[:, None]
    mel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for first_bin in range(0, bins, BLOCK_B):
        bin = first_bin + tl.arange(0, BLOCK_B)
        real = tl.zeros((BLOCK_F, BLOCK_B), tl.float32)
        imaginary = tl.zeros((BLOCK_F, BLOCK_B), tl.float32)
        for first in range(0, folded, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            left = n[None, :]
            right = WINDOW - left
            inside = (2 * left <= WINDOW) & (left < valid)
            a = tl.load(start_ptr + left, mask=inside, other=0).to(tl.float32)
            inside = (2 * left <= WINDOW) & (left > 0) & (right < valid)
            b = tl.load(start_ptr + right, mask=inside, other=0).to(tl.float32)
            at = n[:, None] * bins + bin[None, :]
            cosine = tl.load(basis_ptr + at)
            sine = tl.load(basis_ptr + folded * bins + at)
            real = tl.dot(a + b, cosine, real, input_precision="tf32x3")
            imaginary = tl.dot(a - b, sine, imaginary, input_precision="tf32x3")
        power = real * real + imaginary * imaginary
        weights = tl.load(filters_ptr + bin[:, None] * mels_stride + mel[None, :])
        total = tl.dot(power, weights, total, input_precision="tf32x3")
    mean = tl.load(mean_ptr + mel, mask=mel < mels, other=0.0)[None, :]
    deviation = tl.load(deviation_ptr + mel, mask=mel < mels, other=1.0)[None, :]
    out = (tl.log(total + floor) - mean) / deviation
    at = frame[:, None] * mels + mel[None, :]
    inside = (frame < frames)[:, None] & (mel < mels)[None, :]
    store_rounded(out_ptr + at, out, inside)


def fwd(
    samples: Tensor, continues: Tensor, mean: Tensor, deviation: Tensor, frames: int, window: int,
    sample_rate: int, mels: int, mel_scale: str, norm: str | None, floor: float, out: Tensor,
) -> None:  # fmt: skip
    """Write the features to ``out`` (C, frames * mels)."""
    rows, row_samples = samples.shape
    c = launch_config(mels)
    basis, filters = _tables(
        window, sample_rate, mels, mel_scale, norm, samples.dtype == torch.int16, c.block_bins,
        c.block_samples, c.block_mels, samples.device,
    )  # fmt: skip
    grid = (triton.cdiv(rows * frames, c.block_frames), triton.cdiv(mels, c.block_mels))
    launch(
        _log_mel_kernel, grid, samples, continues, basis, filters, mean, deviation, out,
        rows * frames, rows, frames, row_samples, row_samples // frames, mels, filters.shape[1],
        basis.shape[2], basis.shape[1], floor, WINDOW=window, BLOCK_F=c.block_frames,
        BLOCK_B=c.block_bins, BLOCK_M=c.block_mels, BLOCK_N=c.block_samples,
        num_warps=c.num_warps, num_stages=2,
    )  # fmt: skip
