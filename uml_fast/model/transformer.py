"""The shared transformer over ragged segments, post-norm (the paper's) or pre-norm (ViT's).

Legend: T rows and S segment slots of a pack, D width, H heads. Matrix products take the dtype of
the tokens that enter; the residual stream is fp32 under pre-norm and in that dtype under post-norm
(docs/numerics.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from uml_fast.config import BackboneConfig, require
from uml_fast.kernels.add_layer_norm import add_layer_norm
from uml_fast.kernels.feed_forward import Activation, feed_forward, up_width
from uml_fast.kernels.segment_attention import packed_segment_attention
from uml_fast.kernels.segment_mean import segment_mean
from uml_fast.modalities.base import Linear
from uml_fast.model.backbone import Backbone
from uml_fast.pack import PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig(BackboneConfig):
    """A stack of attention and feed-forward blocks shared by all modalities."""

    layers: int
    """Blocks; 0: the tokens themselves."""
    heads: int
    """Attention heads; the width is a multiple of it."""
    feed_forward: int
    """Width of the hidden layer of the feed-forward network."""
    activation: Activation = "gelu"
    """Activation of the feed-forward network; swiglu is gated: half as many weights again."""
    norm: Literal["pre", "post"] = "pre"
    """Place of the layer norm; pre-norm has one more behind the last block."""
    dropout: float = 0.0
    """Probability of dropout on attention weights, the hidden layer and both residual branches."""
    causal: bool = False
    """Rows attend to earlier rows of their segment only."""
    input_projection: bool = False
    """A bias-free linear map before the blocks, for all modalities (paper: 1x1 convolution)."""
    positions: Literal["none", "learned", "sinusoid"] = "none"
    """Positions shared by all modalities, added in front of the blocks (besides the stems' own)."""
    max_positions: int = 128
    """Entries of the shared position table."""

    def __post_init__(self) -> None:
        require(self.layers >= 0, f"backbone.layers is {self.layers}; it must be >= 0")
        require(
            self.heads >= 1 and self.width % self.heads == 0,
            f"backbone.width {self.width} is not a multiple of backbone.heads {self.heads}",
        )
        require(0 <= self.dropout < 1, f"backbone.dropout is {self.dropout}; it must be in [0, 1)")

    def check(self, modality: str, longest: int) -> None:
        require(
            self.positions == "none" or longest <= self.max_positions,
            f"{modality}: the longest sample has {longest} rows, backbone.max_positions is "
            f"{self.max_positions}; raise it or cut the samples",
        )

    def build(self) -> Transformer:
        """The backbone with freshly drawn weights."""
        return Transformer(self)


def multibench(width: int, dropout: float = 0.1) -> TransformerConfig:
    """Preset for feature sequences (PAPER 1.2): 5 layers, 5 heads, FFN 2048, ReLU, post-norm."""
    return TransformerConfig(
        width=width, layers=5, heads=5, feed_forward=2048, activation="relu", norm="post",
        dropout=dropout, causal=True, input_projection=True,
    )  # fmt: skip


def vit(size: Literal["ti", "s", "b", "l"]) -> TransformerConfig:
    """Pre-norm encoders of the ViT family: Ti, S, B, L."""
    width, layers, heads = {
        "ti": (192, 12, 3),
        "s": (384, 12, 6),
        "b": (768, 12, 12),
        "l": (1024, 24, 16),
    }[size]
    return TransformerConfig(width=width, layers=layers, heads=heads, feed_forward=4 * width)


class Dropout(NamedTuple):
    """Dropout of one step: its probability and the key its masks are drawn from."""

    p: float
    rng_key: Tensor | None


class Block(nn.Module):
    """Attention and feed-forward with residuals; ``site`` numbers its places of dropout."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        d = config.width
        self.config = config
        self.site = site
        self.qkv = Linear(d, 3 * d)
        self.out = Linear(d, d)
        self.up = Linear(d, up_width(config.feed_forward, config.activation))
        self.down = Linear(config.feed_forward, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        if config.norm == "post":
            nn.init.xavier_uniform_(self.qkv.weight)
        else:
            for layer in (self.qkv, self.out, self.up, self.down):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, batch: PackedBatch, dropout: Dropout
    ) -> tuple[Tensor, Tensor | None]:
        """One block on (T, D); a unit of its own for FSDP: it reads no other block's weights.

        post-norm: x = norm1(x + attend(x)); x = norm2(x + transform(x)), and no residual.
        pre-norm: ``x_TD`` is the branch that was not added yet to ``residual_TD`` fp32, as each sum
        is fused with the norm that follows it; the tokens themselves where there is no residual.
        """
        if self.config.norm == "post":
            x = _add_norm(
                self.attend(x_TD, batch, dropout), x_TD, self.norm1, dropout, self.site + 2
            )
            return _add_norm(
                self.transform(x, dropout), x, self.norm2, dropout, self.site + 3
            ), None
        if residual_TD is None:
            norm, residual = self.norm1, x_TD.float()
            x = nn.functional.layer_norm(
                residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps
            ).to(x_TD.dtype)
        else:
            x, residual = _add_norm_sum(x_TD, residual_TD, self.norm1, dropout, self.site - 1)
        x, residual = _add_norm_sum(
            self.attend(x, batch, dropout), residual, self.norm2, dropout, self.site + 2
        )
        return self.transform(x, dropout), residual

    def attend(self, x_TD: Tensor, batch: PackedBatch, dropout: Dropout) -> Tensor:
        """Self-attention inside each segment, (T, D) -> (T, D)."""
        mixed = packed_segment_attention(
            self.qkv(x_TD).view(len(x_TD), 3, self.config.heads, -1),
            batch.offsets_S1, batch.max_len, is_causal=self.config.causal,
            dropout_p=dropout.p, rng_key=dropout.rng_key, site=self.site,
        )  # fmt: skip
        return self.out(mixed.flatten(1))

    def transform(self, x_TD: Tensor, dropout: Dropout) -> Tensor:
        """Feed-forward network, (T, D) -> (T, D)."""
        return feed_forward(
            x_TD, self.up.weight, self.up.bias, self.down.weight, self.down.bias,
            activation=self.config.activation,
            dropout_p=dropout.p, rng_key=dropout.rng_key, site=self.site + 1,
        )  # fmt: skip


class Transformer(Backbone):
    """The stack of blocks; decoders read its output, and it is pooled into embeddings."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.output_width = self.embedding_width = config.width
        self.input_projection = (
            Linear(config.width, config.width, bias=False) if config.input_projection else None
        )
        self.blocks = nn.ModuleList(Block(config, site=4 * i) for i in range(config.layers))
        self.final_norm = (
            nn.LayerNorm(config.width) if config.norm == "pre" and config.layers else None
        )
        if config.positions == "learned":
            self.position = nn.Parameter(torch.randn(config.max_positions, config.width))
        elif config.positions == "sinusoid":
            self.register_buffer(
                "position", sinusoids(config.max_positions, config.width), persistent=False
            )

    def forward(
        self, tokens_TD: Tensor, batch: PackedBatch, rng_key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden rows (T, D), and their mean (S, D) over each segment."""
        x = tokens_TD if self.input_projection is None else self.input_projection(tokens_TD)
        if self.config.positions != "none":
            x = x + self.position[
                batch.position_T.long().clamp(max=self.config.max_positions - 1)
            ].to(x.dtype)
        dropout = Dropout(0.0 if rng_key is None else self.config.dropout, rng_key)
        residual: Tensor | None = None
        for block in self.blocks:
            x, residual = block(x, residual, batch, dropout)
        if self.final_norm is not None:
            assert residual is not None
            site = 4 * len(self.blocks) - 1
            x, _ = _add_norm_sum(x, residual, self.final_norm, dropout, site)
        return x, segment_mean(x, batch.offsets_S1)


def _add_norm(branch: Tensor, x: Tensor, norm: nn.LayerNorm, dropout: Dropout, site: int) -> Tensor:
    return add_layer_norm(
        branch, x, norm.weight, norm.bias, norm.eps,
        dropout_p=dropout.p, rng_key=dropout.rng_key, site=site,
    )  # fmt: skip


def _add_norm_sum(
    branch: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: Dropout, site: int
) -> tuple[Tensor, Tensor]:
    return add_layer_norm(
        branch, residual, norm.weight, norm.bias, norm.eps,
        dropout_p=dropout.p, rng_key=dropout.rng_key, site=site, return_sum=True,
    )  # fmt: skip


def sinusoids(positions: int, width: int) -> Tensor:
    """Fixed positions (positions, width): sines in the first half, cosines in the second."""
    frequency = torch.exp(-torch.arange((width + 1) // 2) * (2 * math.log(10000.0) / width))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), 1)[:, :width]
