"""Text: int32 token ids, one row per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uml_fast.config import ModalityConfig, require
from uml_fast.kernels.linear_cross_entropy import linear_cross_entropy
from uml_fast.kernels.text_stem import text_stem
from uml_fast.modalities.base import Modality
from uml_fast.packing.pack import RegionRows


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(ModalityConfig):
    """Token ids below ``vocabulary``."""

    vocabulary: int
    """Number of token ids."""
    positions: int = 512
    """Entries of the learned position table: the longest text in tokens. 0: no table."""

    def __post_init__(self) -> None:
        ModalityConfig.__post_init__(self)
        require(
            self.vocabulary >= 2, f"{self.name}.vocabulary is {self.vocabulary}; it must be >= 2"
        )
        require(self.positions >= 0, f"{self.name}.positions must not be negative")

    def build(self, width: int, output_width: int, decode: bool) -> Text:
        """The stem and decoder for a backbone of this width."""
        return Text(self, width, output_width, decode)


class Text(Modality):
    """``tokens = Embedding(ids) + position``; the target is the next id (cross-entropy)."""

    row_elems = 1
    row_dtype = "int32"

    def __init__(self, config: TextConfig, width: int, output_width: int, decode: bool) -> None:
        super().__init__(
            config, features=config.vocabulary, width=width, output_width=output_width,
            positions=config.positions, decode=decode,
        )  # fmt: skip
        self.vocabulary = config.vocabulary
        self.stem = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.stem.weight, std=0.02)

    def fit(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        """Check that every id is in the vocabulary."""
        low, high = int(rows.min()), int(rows.max())
        require(
            low >= 0 and high < self.vocabulary,
            f"{self.name}: token ids run from {low} to {high}, "
            f"the vocabulary has {self.vocabulary}",
        )

    def features(self, region: RegionRows) -> Tensor:
        """Token ids int32 (C,)."""
        return region.raw[:, 0]

    def embed(
        self, region: RegionRows, features: Tensor | None, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        assert isinstance(self.stem, nn.Embedding)
        index = region.position_C if self.position is not None else None
        return text_stem(
            region.raw[:, 0], self.stem.weight, self.position, index, dtype=dtype, out=out
        )

    def prediction_loss(self, hidden_CD: Tensor, features: Tensor, region: RegionRows) -> Tensor:
        """Cross-entropy of the next id, over rows that have one (paper 1.1)."""
        assert self.decoder is not None
        return linear_cross_entropy(
            hidden_CD, self.decoder.weight, self.decoder.bias, features, self.predicts_C(region)
        )  # fmt: skip

    def describe(self, sample: np.ndarray) -> dict[str, Any]:
        return {"kind": "text", "text": " ".join(map(str, sample[:, 0].tolist()))}
