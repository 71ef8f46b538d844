"""Feature rows: float vectors from an encoder or sensor (MultiBench style), or single vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uml_fast.config import ModalityConfig, require
from uml_fast.kernels.feature_stem import feature_stem
from uml_fast.modalities.base import Modality
from uml_fast.packing.pack import RegionRows


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig(ModalityConfig):
    """A sequence of float vectors, or one vector per sample."""

    size: int
    """Features per row; 0: as many as the data has (``uml_fast.training.complete``)."""
    vector: bool = False
    """One row per sample: the self-supervised target is the row itself (paper 1.2, T = 1)."""
    standardise: bool = False
    """Subtract the training mean and divide by the training deviation, per feature."""
    positions: int = 0
    """Entries of the learned position table; 0: none."""
    identity: bool = False
    """Rows are tokens as they are, without a stem: size must be the width (t of paper 1.4)."""

    def __post_init__(self) -> None:
        ModalityConfig.__post_init__(self)
        require(self.size >= 0, f"{self.name}.size is {self.size}; it must not be negative")

    def build(self, width: int, output_width: int, decode: bool) -> Features:
        """The stem and decoder for a backbone of this width."""
        require(
            not self.identity or (self.size == width and not self.positions),
            f"{self.name}.identity: rows of {self.size} features cannot be tokens of width {width} "
            "as they are; make the widths equal and positions 0, or leave identity off",
        )
        return Features(self, width, output_width, decode)


class Features(Modality):
    """``tokens = Linear((rows - mean) / deviation) + position``; with ``identity`` no Linear."""

    row_dtype = "float32"
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: FeaturesConfig, width: int, output_width: int, decode: bool) -> None:
        super().__init__(
            config, features=config.size, width=width, output_width=output_width,
            positions=config.positions, decode=decode, autoencode=config.vector,
        )  # fmt: skip
        self.row_elems = config.size
        if config.identity:
            self.stem = nn.Identity()
        self.standardise = config.standardise
        if config.standardise:
            self.register_buffer("mean", torch.zeros(config.size))
            self.register_buffer("deviation", torch.ones(config.size))

    def fit(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        if self.standardise:
            deviation = rows.std(0, dtype=np.float64)
            deviation[rows.max(0) == rows.min(0)] = 1.0  # rounding leaves it just above zero
            self.mean.copy_(torch.from_numpy(rows.mean(0, dtype=np.float64)))
            self.deviation.copy_(torch.from_numpy(deviation))

    def features(self, region: RegionRows) -> Tensor:
        rows = region.raw
        return (rows - self.mean) / self.deviation if self.standardise else rows

    def embed(
        self, region: RegionRows, features: Tensor | None, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        if isinstance(self.stem, nn.Identity):
            rows = self.features(region).to(dtype)
            return rows if out is None else out.copy_(rows)
        mean, deviation = (self.mean, self.deviation) if self.standardise else (None, None)
        return feature_stem(
            region.raw, *self.stem_arguments(region), mean, deviation, region.valid_C, dtype=dtype,
            out=out,
        )  # fmt: skip

    def describe(self, sample: np.ndarray) -> dict[str, Any]:
        return {"kind": "features", "values": np.round(sample[:8, :16].astype(float), 3).tolist()}
