"""What a user would call instead of each op: the strongest of stock PyTorch, same arguments.

Every op but attention has ``eager`` and ``compile``, the same under ``torch.compile``. Masks of
dropout are PyTorch's own here: a counter-based mask in plain PyTorch would be a straw man.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uml_fast.kernels.log_mel import hann, mel_filters

Provider = Callable[..., Any]


def dropout(input: Tensor, p: float, **_: Any) -> Tensor:
    """F.dropout."""
    return F.dropout(input, p)


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float,
    return_sum: bool, **_: Any,
) -> Any:  # fmt: skip
    """Sum in the residual's dtype, then F.layer_norm in it, then the input's dtype."""
    summed = residual + (F.dropout(input, dropout_p) if dropout_p else input)
    dtype = summed.dtype
    normed = F.layer_norm(summed, summed.shape[-1:], weight.to(dtype), bias.to(dtype))
    normed = normed.to(input.dtype)
    return (normed, summed) if return_sum else normed


def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, dropout_p: float, return_sum: bool, **_: Any
) -> Any:
    """Sum in the residual's dtype, then F.rms_norm in it, then the input's dtype."""
    summed = residual + (F.dropout(input, dropout_p) if dropout_p else input)
    normed = F.rms_norm(summed, summed.shape[-1:], weight.to(summed.dtype)).to(input.dtype)
    return (normed, summed) if return_sum else normed


def feed_forward(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor,
    activation: str, dropout_p: float, **_: Any,
) -> Tensor:  # fmt: skip
    """Linear, activation, F.dropout, linear, under autocast for bf16."""
    with torch.autocast(input.device.type, input.dtype, enabled=input.dtype != torch.float32):
        hidden = F.linear(input, weight_up, bias_up)
        if activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden)
        hidden = F.dropout(hidden, dropout_p) if dropout_p else hidden
        return F.linear(hidden, weight_down, bias_down)


def text_stem(
    ids: Tensor, weight: Tensor, position: Tensor, position_index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Two F.embedding of the fp32 masters, their sum, a cast."""
    index = position_index.clamp(0, len(position) - 1)
    return (F.embedding(ids, weight) + F.embedding(index, position)).to(dtype)


@functools.cache
def _mel_tables(
    window: int, mels: int, mel_scale: str, norm: str | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    filters = mel_filters(16000, window, mels, mel_scale, norm) * (4 / window) ** 2
    return hann(window).float().to(device), filters.float().to(device)


def log_mel(
    samples: Tensor, continues: Tensor, frames: int, window: int, mels: int, mel_scale: str,
    norm: str | None, mean: Tensor, deviation: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch.fft.rfft of overlapping windows; on a CPU faster than a product at window 400."""
    taper, filters = _mel_tables(window, mels, mel_scale, norm, samples.device)
    hop = samples.shape[1] // frames
    scaled = samples if samples.is_floating_point() else samples.float() / 32768
    following = torch.zeros_like(scaled[:, : window - hop])
    following[:-1] = scaled[1:, : window - hop] * continues[:-1, None]
    windows = torch.cat((scaled, following), 1).unfold(1, window, hop) * taper
    spectrum = torch.fft.rfft(windows)
    power = spectrum.real.square() + spectrum.imag.square()
    return (((power @ filters + 1e-6).log() - mean) / deviation).flatten(1).to(dtype)


def segment_mean(input: Tensor, offsets: Tensor) -> Tensor:
    """torch.segment_reduce."""
    return torch.segment_reduce(input, "mean", offsets=offsets.long(), axis=0, initial=0)


def next_embedding_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    **_: Any,
) -> Tensor:  # fmt: skip
    """F.linear, error in fp32, mean over the rows that count."""
    dtype, rows = hidden.dtype, len(hidden) - shift
    predicted = F.linear(hidden[:rows], weight.to(dtype), bias.to(dtype)).float()
    error = (predicted - target[shift:]).square().mean(1)
    counts = predicts[:rows]
    return torch.where(counts, error, 0.0).sum() / counts.sum().clamp(min=1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
    **_: Any,
) -> Tensor:  # fmt: skip
    """F.linear, then F.cross_entropy in fp32 with ignored rows."""
    dtype, rows = hidden.dtype, len(hidden) - shift
    logits = F.linear(hidden[:rows], weight.to(dtype), bias.to(dtype)).float()
    ids = torch.where(predicts[:rows], target[shift:].long(), -100)
    return F.cross_entropy(logits, ids)


def sdpa_loop(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, is_causal: bool = False,
    dropout_p: float = 0.0, **_: Any,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention of each segment; lengths are known to the host.

    Split and not sliced: the backward of a slice fills a gradient of the whole input with zeros.
    """
    lengths = [end - start for start, end in itertools.pairwise(offsets.tolist())]
    out = []
    for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        out.append(mixed[0].transpose(0, 1))
    return torch.cat(out)


def sdpa_padded(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int,
    is_causal: bool = False, dropout_p: float = 0.0, **_: Any,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention of all segments, padded to the longest, with a mask."""
    lengths = (offsets[1:] - offsets[:-1]).long()
    at = torch.arange(max_len, device=query.device)
    valid = at < lengths.unsqueeze(1)
    place = valid.flatten().nonzero()[:, 0]
    mask = valid[:, None, None]
    if is_causal:
        mask = mask & (at <= at.unsqueeze(1))

    def pad(x: Tensor) -> Tensor:
        full = x.new_zeros(len(lengths) * max_len, *x.shape[1:]).index_copy(0, place, x)
        return full.view(len(lengths), max_len, *x.shape[1:]).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), attn_mask=mask, dropout_p=dropout_p
    )
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, place)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int,
    is_causal: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen (FlashAttention 2); CUDA, bf16 and fp16, no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    causal = {"window_size": (-1, 0)} if is_causal else {}
    out: Tensor = varlen_attn(query, key, value, offsets, offsets, max_len, max_len, **causal)
    return out


def batched(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int,
    is_causal: bool = False, dropout_p: float = 0.0, **_: Any,
) -> Tensor:  # fmt: skip
    """cuDNN or FlashAttention on a regular batch; segments of one length."""
    q, k, v = (x.unflatten(0, (-1, max_len)).transpose(1, 2) for x in (query, key, value))
    backends = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    with torch.nn.attention.sdpa_kernel(backends):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout_p)
    return mixed.transpose(1, 2).flatten(0, 1)


EAGER: dict[str, Provider] = {
    "add_layer_norm": add_layer_norm,
    "add_rms_norm": add_rms_norm,
    "dropout": dropout,
    "feed_forward": feed_forward,
    "linear_cross_entropy": linear_cross_entropy,
    "log_mel": log_mel,
    "next_embedding_loss": next_embedding_loss,
    "segment_mean": segment_mean,
    "text_stem": text_stem,
}
"""The plain form of each op but attention; where it has no entry its reference is what a user
would write."""

ATTENTION: dict[str, Provider] = {"loop": sdpa_loop, "padded": sdpa_padded}
ATTENTION_CUDA: dict[str, Provider] = {"varlen": varlen, "cudnn": batched}


def names(op: str, cuda: bool) -> tuple[str, ...]:
    """Baselines of an op, some of which may not be able to do a shape."""
    if op == "segment_attention":
        return (*ATTENTION, *(ATTENTION_CUDA if cuda else ()))
    return ("eager", "compile")


def providers(op: str, reference: Provider, inputs: Mapping[str, Any]) -> dict[str, Provider]:
    """The baselines of an op that can do these inputs, by name."""
    if op != "segment_attention":
        eager = EAGER.get(op, reference)
        return {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    found = dict(ATTENTION)
    query, offsets, max_len = inputs["query"], inputs["offsets"], inputs["max_len"]
    if query.is_cuda and query.dtype != torch.float32:
        if not inputs.get("dropout_p"):
            found["varlen"] = varlen
        if len(query) == (len(offsets) - 1) * max_len:
            found["cudnn"] = batched
    return found
