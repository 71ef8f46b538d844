"""The model: a stem per modality, the shared backbone, and what reads it.

Legend: T rows and S segment slots of a pack, D width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uml_fast.config import RunConfig
from uml_fast.modalities.base import Modality
from uml_fast.model.head import SharedHead
from uml_fast.pack import PackedBatch, RegionRows


@dataclass(frozen=True, slots=True)
class Encoded:
    """A pack after the backbone."""

    regions: tuple[RegionRows, ...]
    """The regions of the pack."""
    features: tuple[Tensor | None, ...]
    """Per region the features of its rows (C, F), where decoders predict them."""
    hidden_TD: Tensor
    """(T, D) what decoders read."""
    embedding_SE: Tensor
    """(S, E) fp32 embedding of each segment; zero for empty ones."""


class _Join(torch.autograd.Function):
    """The tokens of a pack from the parts that were written into them, without a copy."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, *parts: Tensor) -> Tensor:
        ctx.rows = [len(p) for p in parts]
        return tokens_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad_TD.split(ctx.rows)


class Uml(nn.Module):
    """Stems f_m, shared backbone h and decoders g_m or the shared head c of paper 1.1."""

    def __init__(self, config: RunConfig, dtype: torch.dtype = torch.float32) -> None:
        """Build with freshly drawn fp32 weights; ``dtype`` is that of the matrix products."""
        super().__init__()
        self.dtype = dtype
        self.width = config.backbone.width
        decode = config.objective.kind == "next_embedding"
        # the parts that every mode has are drawn first, so that the trials of a seed share them
        self.backbone = config.backbone.build()
        self.modalities = nn.ModuleDict()
        self.head: SharedHead | None = None
        for m in sorted(config.modalities, key=lambda m: m.name != config.target):
            self.modalities[m.name] = m.build(
                config.backbone.width, self.backbone.output_width, decode
            )
            if m.name == config.target and not decode:
                names = tuple(m.name for m in config.modalities)
                self.head = SharedHead(config.objective, self.backbone.embedding_width, names)

    def modality(self, name: str) -> Modality:
        """The stem and decoder of one modality."""
        found = self.modalities[name]
        assert isinstance(found, Modality)
        return found

    def forward(self, batch: PackedBatch, rng_key: Tensor | None = None) -> Encoded:
        """Encode a pack. ``rng_key`` int64 (1,) draws a step's dropout; None: no dropout."""
        regions = tuple(batch.region(i) for i in range(len(batch.layout.regions)))
        stems = [self.modality(r.name) for r in batch.layout.regions]
        decodes = self.head is None
        features = tuple(
            stem.features(rows) if decodes else None
            for stem, rows in zip(stems, regions, strict=True)
        )
        tokens_TD = self._embed(stems, regions, features)
        hidden_TD, embedding_SE = self.backbone(tokens_TD, batch, rng_key)
        return Encoded(regions, features, hidden_TD, embedding_SE.float())

    def _embed(
        self,
        stems: list[Modality],
        regions: tuple[RegionRows, ...],
        features: tuple[Tensor | None, ...],
    ) -> Tensor:
        """Tokens (T, D) of all regions; in eager mode each stem writes its rows of them."""
        parts = list(zip(stems, regions, features, strict=True))
        if torch.compiler.is_compiling():
            return torch.cat([s.embed(rows, f, self.dtype, None) for s, rows, f in parts])
        rows = regions[-1].rows.stop
        tokens_TD = regions[0].raw.new_empty(rows, self.width, dtype=self.dtype)
        # .data: the parts share memory but no version, so writing one leaves the others valid
        written = [s.embed(rows, f, self.dtype, tokens_TD[rows.rows].data) for s, rows, f in parts]
        joined: Tensor = _Join.apply(tokens_TD, *written)
        return joined

    def logits(self, embedding_SE: Tensor, modality: str) -> Tensor:
        """Logits (S, classes) of the shared head."""
        assert self.head is not None
        logits: Tensor = self.head(embedding_SE, modality)
        return logits
