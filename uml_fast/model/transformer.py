"""The shared transformer over ragged segments, post-norm (the paper's) or pre-norm (ViT's).

Legend: T rows and S segment slots of a pack, D width, H heads. Matrix products take the dtype of
the tokens that enter; the residual stream is fp32 under pre-norm and in that dtype under post-norm
(docs/numerics.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uml_fast.config import BackboneConfig, require
from uml_fast.kernels.feed_forward import Activation
from uml_fast.kernels.segment_mean import segment_mean
from uml_fast.modalities.base import Linear
from uml_fast.model.backbone import Backbone
from uml_fast.model.blocks import SITES, Block, Dropout, add_norm_sum, build_norm, norm_rows
from uml_fast.model.positions import rotations, sinusoids
from uml_fast.packing.pack import PackedBatch


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
    """Place of the norm; pre-norm has one more behind the last block."""
    norm_kind: Literal["layer", "rms"] = "layer"
    """Layer norm, or RMS norm, which takes off no mean and has no bias."""
    eps: float = 1e-5
    """Added to the variance (or the mean square) in the norms."""
    input_norm: bool = False
    """A norm of the tokens in front of the blocks (BERT's embeddings, CLIP's images)."""
    key_heads: int = 0
    """Heads of keys and values, which divide ``heads``; each serves several queries. 0: all."""
    bias: bool = True
    """Whether the linear maps of the blocks have biases."""
    layer_scale: float = 0.0
    """First value of the learned factors of each branch's features (DINOv2); 0: no factors."""
    dropout: float = 0.0
    """Probability of dropout on attention weights, the hidden layer and both residual branches."""
    causal: bool = False
    """Rows attend to earlier rows of their segment only."""
    input_projection: bool = False
    """A bias-free linear map before the blocks, for all modalities (paper: 1x1 convolution)."""
    positions: Literal["none", "learned", "sinusoid", "rotary"] = "none"
    """Positions shared by all modalities, added in front of the blocks (besides the stems' own);
    rotary: queries and keys are rotated."""
    max_positions: int = 128
    """Entries of the shared position table, learned or sinusoid."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """The embedding of a sample: the mean of its rows, the first (class token) or the last."""
    embedding: int = 0
    """Width of a bias-free linear map behind the pooling (CLIP's projection); 0: none."""
    recompute: bool = False
    """Keep only the blocks' inputs for backward and compute the blocks again there: memory of one
    block in place of all, for a third more products."""
    init_from: str | None = None
    """Checkpoint the weights start from: a local folder, or a name on the Hugging Face hub."""

    def __post_init__(self) -> None:
        require(self.layers >= 0, f"backbone.layers is {self.layers}; it must be >= 0")
        require(
            self.heads >= 1 and self.width % self.heads == 0,
            f"backbone.width {self.width} is not a multiple of backbone.heads {self.heads}",
        )
        require(
            self.key_heads >= 0 and self.heads % (self.key_heads or 1) == 0,
            f"backbone.heads {self.heads} is not a multiple of backbone.key_heads {self.key_heads}",
        )
        require(0 <= self.dropout < 1, f"backbone.dropout is {self.dropout}; it must be in [0, 1)")
        require(self.eps > 0, f"backbone.eps is {self.eps}; it must be positive")
        require(self.embedding >= 0, "backbone.embedding must not be negative")
        require(
            self.positions != "rotary" or self.width // self.heads % 2 == 0,
            f"rotary positions need heads of even width; it is {self.width // self.heads}",
        )

    def given_width(self, pooled: bool) -> int:
        return (self.embedding if pooled else 0) or self.width

    def from_scratch(self) -> TransformerConfig:
        return dataclasses.replace(self, init_from=None)

    @property
    def heads_of_keys(self) -> int:
        """Heads of keys and values."""
        return self.key_heads or self.heads

    def check(self, modality: str, longest: int) -> None:
        require(
            self.positions in ("none", "rotary") or longest <= self.max_positions,
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


class Transformer(Backbone):
    """The stack of blocks; decoders read its output, and it is pooled into embeddings."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.output_width = config.width
        self.embedding_width = config.embedding or config.width
        self.input_projection = (
            Linear(config.width, config.width, bias=False) if config.input_projection else None
        )
        self.input_norm = build_norm(config) if config.input_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = build_norm(config) if config.norm == "pre" and config.layers else None
        if config.positions == "learned":
            self.position = nn.Parameter(torch.randn(config.max_positions, config.width))
        elif config.positions == "sinusoid":
            self.register_buffer(
                "position", sinusoids(config.max_positions, config.width), persistent=False
            )
        self.embedding = (
            Linear(config.width, config.embedding, bias=False) if config.embedding else None
        )

    def units(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    def forward(
        self, tokens_TD: Tensor, batch: PackedBatch, rng_key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden rows (T, D), and one embedding (S, E) for each segment."""
        config = self.config
        x = tokens_TD if self.input_projection is None else self.input_projection(tokens_TD)
        rotation = None
        if config.positions == "rotary":
            rotation = rotations(batch.position_T, config.width // config.heads, config.rotary_base)
        elif config.positions != "none":
            x = x + self.position[batch.position_T.long().clamp(max=config.max_positions - 1)].to(
                x.dtype
            )
        if self.input_norm is not None:
            x = norm_rows(x.float(), self.input_norm).to(x.dtype)
        dropout = Dropout(0.0 if rng_key is None else config.dropout, rng_key)
        residual: Tensor | None = None
        for i, block in enumerate(self.blocks):
            own = dropout.after(SITES * i - 1)
            if config.recompute and torch.is_grad_enabled():
                x, residual = checkpoint(
                    block, x, residual, batch, own, rotation,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                x, residual = block(x, residual, batch, own, rotation)
        if self.final_norm is not None:
            assert residual is not None
            site = SITES * len(self.blocks) - 1
            x, _ = add_norm_sum(x, residual, self.final_norm, dropout, site)
        pooled = pool(x, batch.offsets_S1, config.pooling)
        return x, pooled if self.embedding is None else self.embedding(pooled)


def pool(x_TD: Tensor, offsets_S1: Tensor, pooling: str) -> Tensor:
    """One row (S, D) for each segment: the mean of its rows, the first or last; zero if empty."""
    if pooling == "mean":
        return segment_mean(x_TD, offsets_S1)
    first_S, end_S = offsets_S1[:-1], offsets_S1[1:]
    index_S = first_S if pooling == "first" else end_S - 1
    is_empty_S = first_S == end_S
    rows_SD = x_TD[index_S.clamp(0, len(x_TD) - 1).long()]
    return rows_SD.masked_fill(is_empty_S[:, None], 0.0)
