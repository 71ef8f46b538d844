"""What every modality provides: features of raw rows, a stem, and the next-embedding loss.

Legend: C rows of a region, E elements of a raw row, F features of a row, D width of the backbone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uml_fast.config import ConfigError, ModalityConfig
from uml_fast.kernels.cast_linear import linear
from uml_fast.kernels.next_embedding_loss import next_embedding_loss
from uml_fast.packing.pack import RegionRows


class Linear(nn.Linear):
    """nn.Linear whose fp32 master weights follow the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Modality(nn.Module):
    """Stem and decoder of one modality. Subclasses define ``features`` and ``describe``.

    The stem is ``tokens = Linear(features(rows)) + position``, as in paper 1.2; the decoder is
    ``Linear(D -> F)`` and predicts the features of the next row (or, for single vectors, of the row
    itself).
    """

    row_elems: int
    """Elements E of a raw row."""
    row_dtype: str
    """numpy name of the raw element type."""

    def __init__(
        self,
        config: ModalityConfig,
        *,
        features: int,
        width: int,
        output_width: int,
        positions: int = 0,
        decode: bool = False,
        autoencode: bool = False,
    ) -> None:
        super().__init__()
        self.name = config.name
        self.max_positions = positions
        self.autoencode = autoencode
        self.stem: nn.Module = Linear(features, width)
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02) if positions else None
        self.decoder = Linear(output_width, features) if decode else None
        self.class_token: nn.Parameter | None = None
        """(D,) a row in front of each sample's tokens, where the modality has one."""

    def fit(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        """Set normalisation statistics from the raw rows of the training samples."""

    def features(self, region: RegionRows) -> Tensor:
        """Raw rows to float features (C, F) fp32: target of the decoder."""
        raise NotImplementedError

    def describe(self, sample: np.ndarray) -> dict[str, Any]:
        """A sample as a person sees it: ``kind`` with ``png``, ``wav``, ``text`` or ``values``."""
        raise NotImplementedError

    def check(self, longest: int, row_elems: int, dtype: str) -> None:
        """Raise ConfigError unless samples of this shape fit the stem."""
        if (row_elems, dtype) != (self.row_elems, self.row_dtype):
            raise ConfigError(
                f"{self.name}: the data has rows of {dtype}[{row_elems}], "
                f"the stem takes {self.row_dtype}[{self.row_elems}]"
            )
        if self.max_positions and longest > self.max_positions:
            raise ConfigError(
                f"{self.name}: the longest sample has {longest} rows, but {self.name}.positions is "
                f"{self.max_positions}; raise it or cut the samples"
            )

    def embed(
        self, region: RegionRows, features: Tensor | None, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        """Tokens (C, D) in ``dtype``, from the raw rows.

        Args:
            region: the rows.
            features: what ``features`` gives for them, where something else needs it too.
            dtype: of the products and tokens.
            out: rows of the pack's tokens that are written and returned; None: a new tensor.
        """
        raise NotImplementedError

    def stem_arguments(
        self, region: RegionRows
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Weight, bias, positions and the position of each row, as the stem ops take them."""
        assert isinstance(self.stem, nn.Linear)
        index = region.position_C if self.position is not None else None
        return self.stem.weight, self.stem.bias, self.position, index

    def prediction_loss(self, hidden_CD: Tensor, features: Tensor, region: RegionRows) -> Tensor:
        """Mean squared error of the next row's features, over rows that have one (paper 1.2)."""
        assert self.decoder is not None
        return next_embedding_loss(
            hidden_CD, self.decoder.weight, self.decoder.bias, features, self.predicts_C(region),
            shift=0 if self.autoencode else 1,
        )  # fmt: skip

    def predicts_C(self, region: RegionRows) -> Tensor:
        """bool (C,) rows that predict: those with a next row, or all if a row predicts itself."""
        return region.valid_C if self.autoencode else region.continues_C()
