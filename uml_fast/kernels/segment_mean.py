from __future__ import annotations

import torch
from torch import Tensor


def segment_mean_reference(input: Tensor, offsets: Tensor) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    offsets = offsets.long()
    length = offsets[1:] - offsets[:-1]
    rows = torch.arange(input.shape[0], device=input.device)
    segment = torch.searchsorted(offsets[1:], rows, right=True)
    total = input.new_zeros(length.shape[0], input.shape[1], dtype=wide).index_add(0, segment, input.to(wide))
    return (total / length.clamp(min=1).unsqueeze(1)).to(input.dtype)


def segment_mean(input: Tensor, offsets: Tensor) -> Tensor:
    """Mean of the rows of each segment: (T, d) and int32 (S + 1,) to (S, d); empty segments give zeros."""
    return segment_mean_reference(input, offsets)
