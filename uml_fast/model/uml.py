"""The model: a stem per modality, the shared backbone, and what reads it.

Legend: T rows and S segment slots of a pack, D width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uml_fast.config import RunConfig
from uml_fast.kernels.segment_mean import segment_mean
from uml_fast.modalities.base import Modality
from uml_fast.model.head import SharedHead
from uml_fast.pack import PackedBatch, RegionRows


@dataclass(frozen=True, slots=True)
class Encoded:
    """A pack after the backbone."""

    regions: tuple[RegionRows, ...]
    """The regions of the pack."""
    features: tuple[Tensor, ...]
    """Per region the features of its rows (C, F)."""
    hidden_TD: Tensor
    """(T, D) what decoders read."""
    embedding_SE: Tensor
    """(S, E) fp32 mean over each segment's rows; zero for empty segments."""


class Uml(nn.Module):
    """Stems f_m, shared backbone h and decoders g_m or the shared head c of paper 1.1."""

    def __init__(self, config: RunConfig, dtype: torch.dtype = torch.float32) -> None:
        """Build with freshly drawn fp32 weights; ``dtype`` is that of the matrix products."""
        super().__init__()
        self.dtype = dtype
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
        features = tuple(stem.features(rows) for stem, rows in zip(stems, regions, strict=True))
        tokens = [
            stem.embed(rows, f, self.dtype)
            for stem, rows, f in zip(stems, regions, features, strict=True)
        ]
        tokens_TD = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
        hidden_TD, pooled_TE = self.backbone(tokens_TD, batch, rng_key)
        return Encoded(
            regions, features, hidden_TD, segment_mean(pooled_TE, batch.offsets_S1).float()
        )

    def logits(self, embedding_SE: Tensor, modality: str) -> Tensor:
        """Logits (S, classes) of the shared head."""
        assert self.head is not None
        logits: Tensor = self.head(embedding_SE, modality)
        return logits
