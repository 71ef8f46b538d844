from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.rng import check_dropout, keep_mask, keep_scale


def segment_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, *, is_causal: bool = False,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch definition, one segment at a time; differentiable, any floating dtype."""
    T, H, D = query.shape
    scale = D**-0.5 if scale is None else scale
    bounds = offsets.tolist()
    heads = torch.arange(H, device=query.device).view(H, 1, 1)
    out = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        if start == end:
            continue
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        score = q @ k.transpose(1, 2) * scale
        at = torch.arange(end - start, device=query.device)
        if is_causal:
            score = score.masked_fill(at > at.unsqueeze(1), float("-inf"))
        prob = score.softmax(-1)
        if dropout_p > 0:
            row = (start + at.view(1, -1, 1)) * H + heads
            prob = prob * keep_mask(rng_key, site, row, at, max_len, dropout_p) * keep_scale(dropout_p)
        out.append((prob @ v).transpose(0, 1))
    return torch.cat(out) if out else query * 0


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_len: int, *, is_causal: bool = False,
    dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention inside each segment."""
    check_dropout("segment_attention", dropout_p, rng_key)
    return segment_attention_reference(
        query, key, value, offsets, max_len, is_causal=is_causal, dropout_p=dropout_p, rng_key=rng_key, site=site,
        scale=scale,
    )  # fmt: skip
