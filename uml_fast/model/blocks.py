"""A transformer block: attention and feed-forward with residuals, post-norm or pre-norm.

Legend: T rows of a pack, D width, H heads, K features of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uml_fast.kernels.add_layer_norm import add_layer_norm
from uml_fast.kernels.add_rms_norm import add_rms_norm
from uml_fast.kernels.cast_linear import linear
from uml_fast.kernels.feed_forward import feed_forward, up_width
from uml_fast.kernels.rng import shift_sites
from uml_fast.kernels.segment_attention import packed_segment_attention, segment_attention
from uml_fast.modalities.base import Linear
from uml_fast.model.positions import rotate
from uml_fast.packing.pack import PackedBatch

if TYPE_CHECKING:
    from uml_fast.model.transformer import TransformerConfig

Norm = nn.LayerNorm | nn.RMSNorm


class Dropout(NamedTuple):
    """Dropout of one step: its probability and the key its masks are drawn from."""

    p: float
    rng_key: Tensor | None

    def after(self, sites: int) -> Dropout:
        """The same, with sites counted from ``sites``."""
        if self.rng_key is None or not self.p:
            return self
        return Dropout(self.p, shift_sites(self.rng_key, sites))


SITES = 4
"""Places of dropout that a block adds to those before it."""
_BEFORE, _ATTENTION, _HIDDEN, _ATTENDED, _TRANSFORMED = range(SITES + 1)
"""A block's sites, the last branch of the block before first: the same numbers in all blocks, so
that one compiled block is all of them."""


class Block(nn.Module):
    """Attention and feed-forward with residuals."""

    no_bias: Tensor
    """Zeros that feed_forward takes as biases where there are none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.width
        self.config = config
        self.qkv = Linear(
            d, d // config.heads * (config.heads + 2 * config.heads_of_keys), bias=config.bias
        )
        self.out = Linear(d, d, bias=config.bias)
        self.up = Linear(d, up_width(config.feed_forward, config.activation), bias=config.bias)
        self.down = Linear(config.feed_forward, d, bias=config.bias)
        self.norm1 = build_norm(config)
        self.norm2 = build_norm(config)
        layers = (self.qkv, self.out, self.up, self.down)
        if config.norm == "post":
            nn.init.xavier_uniform_(self.qkv.weight)
        else:
            for layer in layers:
                nn.init.trunc_normal_(layer.weight, std=0.02)
        for layer in layers if config.norm == "pre" else layers[:2]:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if not config.bias:
            zeros = torch.zeros(max(self.up.out_features, d))
            self.register_buffer("no_bias", zeros, persistent=False)
        if config.layer_scale:
            self.scale1 = nn.Parameter(torch.full((d,), config.layer_scale))
            self.scale2 = nn.Parameter(torch.full((d,), config.layer_scale))

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        batch: PackedBatch,
        dropout: Dropout,
        rotation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block on (T, D); a unit of its own for FSDP: it reads no other block's weights.

        post-norm: x = norm1(x + attend(x)); x = norm2(x + transform(x)), and no residual.
        pre-norm: ``x_TD`` is the branch that was not added yet to ``residual_TD`` fp32, as each sum
        is fused with the norm that follows it; the tokens themselves where there is no residual.
        ``dropout`` counts sites from the last branch of the block before (``Dropout.after``).
        ``rotation``: of ``rotations``, for rotary positions.
        """
        if self.config.norm == "post":
            x = add_norm(
                self.attend(x_TD, batch, dropout, rotation), x_TD, self.norm1, dropout, _ATTENDED
            )
            return add_norm(self.transform(x, dropout), x, self.norm2, dropout, _TRANSFORMED), None
        if residual_TD is None:
            residual = x_TD.float()
            x = norm_rows(residual, self.norm1).to(x_TD.dtype)
        else:
            x, residual = add_norm_sum(x_TD, residual_TD, self.norm1, dropout, _BEFORE)
        x, residual = add_norm_sum(
            self.attend(x, batch, dropout, rotation), residual, self.norm2, dropout, _ATTENDED
        )
        return self.transform(x, dropout), residual

    def attend(
        self, x_TD: Tensor, batch: PackedBatch, dropout: Dropout, rotation: Tensor | None
    ) -> Tensor:
        """Self-attention inside each segment, (T, D) -> (T, D)."""
        c = self.config
        qkv = self.qkv(x_TD)
        if rotation is None and c.heads_of_keys == c.heads:
            mixed_THK = packed_segment_attention(
                qkv.view(len(x_TD), 3, c.heads, -1), batch.offsets_S1, batch.max_len,
                is_causal=c.causal, dropout_p=dropout.p, rng_key=dropout.rng_key, site=_ATTENTION,
            )  # fmt: skip
        else:
            heads = qkv.view(len(x_TD), c.heads + 2 * c.heads_of_keys, -1)
            q, k, v = heads.split((c.heads, c.heads_of_keys, c.heads_of_keys), 1)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            k, v = (t.repeat_interleave(c.heads // c.heads_of_keys, 1) for t in (k, v))
            mixed_THK = segment_attention(
                q.contiguous(), k, v, batch.offsets_S1, batch.max_len, is_causal=c.causal,
                dropout_p=dropout.p, rng_key=dropout.rng_key, site=_ATTENTION,
            )  # fmt: skip
        mixed_TD = mixed_THK.flatten(1)
        if not c.layer_scale:
            out: Tensor = self.out(mixed_TD)
            return out
        weight, bias = _scaled(self.out, self.scale1)
        return linear(mixed_TD, weight, bias)

    def transform(self, x_TD: Tensor, dropout: Dropout) -> Tensor:
        """Feed-forward network, (T, D) -> (T, D)."""
        c = self.config
        weight, bias = (
            _scaled(self.down, self.scale2) if c.layer_scale else (self.down.weight, self.down.bias)
        )
        if bias is None:
            up_bias, bias = self.no_bias[: len(self.up.weight)], self.no_bias[: c.width]
        else:
            up_bias = self.up.bias
        return feed_forward(
            x_TD, self.up.weight, up_bias, weight, bias, activation=c.activation,
            dropout_p=dropout.p, rng_key=dropout.rng_key, site=_HIDDEN,
        )  # fmt: skip


def build_norm(config: TransformerConfig) -> Norm:
    """A norm of the stream, freshly initialised."""
    kind = nn.LayerNorm if config.norm_kind == "layer" else nn.RMSNorm
    return kind(config.width, config.eps)


def norm_rows(x_TD: Tensor, norm: Norm) -> Tensor:
    """The norm of rows that nothing is added to."""
    shape = list(norm.normalized_shape)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x_TD, shape, norm.weight, norm.eps)
    return F.layer_norm(x_TD, shape, norm.weight, norm.bias, norm.eps)


def add_norm(branch: Tensor, x: Tensor, norm: Norm, dropout: Dropout, site: int) -> Tensor:
    """``norm(x + dropout(branch))``."""
    if isinstance(norm, nn.RMSNorm):
        return add_rms_norm(
            branch, x, norm.weight, norm.eps or 0.0,
            dropout_p=dropout.p, rng_key=dropout.rng_key, site=site,
        )  # fmt: skip
    return add_layer_norm(
        branch, x, norm.weight, norm.bias, norm.eps,
        dropout_p=dropout.p, rng_key=dropout.rng_key, site=site,
    )  # fmt: skip


def add_norm_sum(
    branch: Tensor, residual: Tensor, norm: Norm, dropout: Dropout, site: int
) -> tuple[Tensor, Tensor]:
    """``add_norm`` and the sum that was normed."""
    if isinstance(norm, nn.RMSNorm):
        return add_rms_norm(
            branch, residual, norm.weight, norm.eps or 0.0,
            dropout_p=dropout.p, rng_key=dropout.rng_key, site=site, return_sum=True,
        )  # fmt: skip
    return add_layer_norm(
        branch, residual, norm.weight, norm.bias, norm.eps,
        dropout_p=dropout.p, rng_key=dropout.rng_key, site=site, return_sum=True,
    )  # fmt: skip


def _scaled(layer: Linear, scale_D: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``scale * layer(x)``: D rows are scaled instead of T."""
    bias = None if layer.bias is None else layer.bias * scale_D
    return layer.weight * scale_D[:, None], bias
