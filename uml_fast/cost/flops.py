"""Useful floating-point operations of a training step, and the rates they are compared with (MFU).

Counted are the matrix products of the model on unpadded rows, a multiply-add as two operations;
element-wise work, fixed transforms (mel spectrogram) and table look-ups (token embeddings) count
nothing. Causal attention counts the pairs a query may see. Backward costs twice the forward: one
product for the input's gradient and one for the weight's; the first layer on raw input has only the
latter.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence

import numpy as np
import torch


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """Forward operations of a linear map on ``rows`` rows: a stem, decoder, projection or head."""
    return 2 * rows * inputs * outputs


def transformer_flops(
    width: int, layers: int, ffn: int, lengths: Sequence[int] | np.ndarray, *, causal: bool = False,
    gated: bool = False, key_width: int | None = None,
) -> int:  # fmt: skip
    """Forward operations of the shared backbone on segments that attend within themselves.

    Args:
        width: features per token.
        layers: transformer layers, each with query, key, value and output maps and a two-layer
            feed-forward.
        ffn: hidden width of the feed-forward.
        lengths: unpadded rows of each segment.
        causal: a row sees itself and the rows before it, else all rows of its segment.
        gated: the feed-forward has a third map, for its gates.
        key_width: features of the keys, and of the values; None: ``width``.
    """
    n = np.asarray(lengths, np.int64)
    rows = int(n.sum())
    pairs = int((n * (n + 1) // 2).sum()) if causal else int((n * n).sum())
    projected = 2 * width + 2 * (width if key_width is None else key_width)
    maps = linear_flops(rows, width, projected) + (2 + gated) * linear_flops(rows, width, ffn)
    return layers * (maps + 4 * pairs * width)


def training_flops(
    forward: float, *, first_layer: float = 0.0, to_input: bool = True, to_weights: bool = True
) -> float:
    """Operations of forward and backward.

    Args:
        forward: forward operations of the whole model, ``first_layer`` among them.
        first_layer: forward operations of maps that read raw input (linear stems), which takes no
            gradient.
        to_input: whether the gradient goes on to what lies in front.
        to_weights: whether the weights are trained.
    """
    return (1 + to_input + to_weights) * forward - first_layer


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the device's best square matrix product, about 0.3 s to measure.

    Measured once per process; on a CPU it is the rate of the threads torch uses now.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _measured_peak(str(device), dtype, threads)


@functools.cache
def _measured_peak(device_name: str, dtype: torch.dtype, threads: int) -> float:
    device = torch.device(device_name)

    def seconds(a: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    best, size, deadline = 0.0, 256, time.perf_counter() + 0.3
    with torch.no_grad():
        while True:
            generator = torch.Generator(device).manual_seed(0)
            a = torch.randn(size, size, device=device, generator=generator).to(dtype)
            out = torch.empty_like(a)
            first = seconds(a, out, 1)
            best = max(best, 2 * size**3 / first)
            repeats = max(1, min(20, int(0.02 / first)))
            took = seconds(a, out, repeats)
            best = max(best, 2 * size**3 / took)
            if time.perf_counter() > deadline:
                return best
            if took < 0.01 and size < 8192:
                size *= 2


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes, the best of several."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


_TENSOR_AND_FP32_TFLOPS = {
    "B200": (2250.0, 75.0),
    "GB200": (2500.0, 80.0),
    "H200": (989.4, 66.9),
    "GH200": (989.4, 66.9),
    "H100": (989.4, 66.9),
    "H100 PCIE": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
}


def datasheet_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations per second the maker states for dense products; None where not listed.

    Args:
        device_name: as torch.cuda.get_device_name gives it.
        dtype: bfloat16 and float16 mean the tensor cores, float32 means full fp32 (not TF32).
    """
    words = re.findall(r"[A-Z0-9]+", device_name.upper())
    model = next((w for w in words if w in _TENSOR_AND_FP32_TFLOPS), None)
    if model is None:
        return None
    variants = [f"{model} {w}" for w in words]
    variant = next((v for v in variants if v in _TENSOR_AND_FP32_TFLOPS), model)
    tensor, fp32 = _TENSOR_AND_FP32_TFLOPS[variant]
    if dtype in (torch.bfloat16, torch.float16):
        return tensor * 1e12
    return fp32 * 1e12 if dtype == torch.float32 else None
