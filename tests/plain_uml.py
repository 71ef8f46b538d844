"""UML as paper 1.2 describes it, in stock PyTorch: oracle of the tests, baseline of the bench.

It knows nothing of packs: samples are padded with zeros to the longest of their batch, each
modality is forwarded on its own, and everything is ``torch.nn``. ``loss="release"`` counts padded
positions, as the authors' release does; ``loss="valid"`` leaves them out, which is what the sum
over samples in the paper means.

Legend: L rows of the longest sample, N samples, E features of a row, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Loss = Literal["release", "valid"]


def pad(samples: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Samples of (rows, E) to zero-padded (L, N, E) and their lengths, int64 (N,)."""
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(s) for s in samples])
    return padded, torch.tensor([len(s) for s in samples])


def valid_mask(lengths: Tensor, longest: int) -> Tensor:
    """bool (L, N), True where a sample has a row."""
    return torch.arange(longest, device=lengths.device)[:, None] < lengths


class PlainUml(nn.Module):
    """Per modality a linear stem and decoder; shared: a bias-free 1x1 convolution, an encoder."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        width: int,
        layers: int = 5,
        heads: int = 5,
        hidden: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({m: nn.Linear(e, width) for m, e in sizes.items()})
        self.decoders = nn.ModuleDict({m: nn.Linear(width, e) for m, e in sizes.items()})
        self.conv = nn.Conv1d(width, width, 1, bias=False)
        layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for parameters in (layer.parameters() for layer in self.encoder.layers[1:]):
            for p in parameters:  # the layers start as copies of one; draw their matrices anew
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)

    def encode(self, modality: str, x_LNE: Tensor) -> Tensor:
        """Hidden states (L, N, D) of every position, padded ones too."""
        x = self.stems[modality](x_LNE)
        x = self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), x.device, x.dtype)
        hidden: Tensor = self.encoder(x, mask, is_causal=True)
        return hidden

    def loss(self, modality: str, x_LNE: Tensor, lengths_N: Tensor, kind: Loss) -> Tensor:
        """Mean squared error of the next row, or of the row itself if every sample is one row."""
        predicted = self.decoders[modality](self.encode(modality, x_LNE))
        if len(x_LNE) == 1:
            return nn.functional.mse_loss(predicted, x_LNE)
        error = (predicted[:-1] - x_LNE[1:]).square()
        if kind == "release":
            return error.mean()
        return error[valid_mask(lengths_N, len(x_LNE))[1:]].mean()

    def embedding(self, modality: str, x_LNE: Tensor, lengths_N: Tensor, kind: Loss) -> Tensor:
        """(N, D) mean of hidden states: all positions ("release") or the sample's own ("valid")."""
        hidden = self.encode(modality, x_LNE)
        if kind == "release":
            return hidden.mean(0)
        mask = valid_mask(lengths_N, len(x_LNE))[..., None]
        return (hidden * mask).sum(0) / lengths_N[:, None]

    def total_loss(
        self,
        batch: Mapping[str, tuple[Tensor, Tensor]],
        kind: Loss,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of weight x loss over the modalities, and the loss of each."""
        losses = {m: self.loss(m, x, lengths, kind) for m, (x, lengths) in batch.items()}
        total = torch.stack([(weights or {}).get(m, 1.0) * v for m, v in losses.items()]).sum()
        return total, losses


def adam(model: nn.Module, lr: float = 1e-4) -> torch.optim.Adam:
    """The release's optimiser: Adam, constant rate, no weight decay, no clipping."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8)


def uml_fast_state(plain: PlainUml) -> dict[str, Tensor]:
    """The same weights under the names ``uml_fast.model.uml.Uml`` gives them."""
    state = {"backbone.input_projection.weight": plain.conv.weight[..., 0]}
    for name, module in (("stem", plain.stems), ("decoder", plain.decoders)):
        state |= {
            f"modalities.{m}.{name}.{k}": v for m in module for k, v in module[m].named_parameters()
        }
    renamed = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    for i, layer in enumerate(plain.encoder.layers):
        for key, value in layer.named_parameters():
            old = next(k for k in renamed if key.startswith(k))
            state[f"backbone.blocks.{i}.{renamed[old]}{key.removeprefix(old)}"] = value
    return state
