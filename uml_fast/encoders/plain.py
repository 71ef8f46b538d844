"""Features that were computed elsewhere: the mean of each sample's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.data.source import DataError
from uml_fast.encoders.extraction import Encoder
from uml_fast.modalities.features import FeaturesConfig


class PlainEncoder(Encoder):
    """Averages the rows of ``.npy`` samples.

    Args:
        first: bytes of one of them; all others have as many features.

    Raises:
        DataError: they cannot be decoded.
    """

    kind = "features"

    def __init__(self, first: bytes) -> None:
        self.facts = {"name": "mean of rows"}
        self._decode = decode_of(FeaturesConfig(name="features", size=1))
        (rows,) = self._decode([first])
        if isinstance(rows, DecodeError):
            raise DataError(f"the first sample cannot be read: {rows}")
        self.width = int(rows.shape[-1])

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        """fp32 (D,) of each sample; see ``Encoder``."""
        return [self._mean(rows) for rows in self._decode(payloads)]

    def _mean(self, rows: np.ndarray | DecodeError) -> np.ndarray | DecodeError:
        if isinstance(rows, DecodeError):
            return rows
        if not len(rows) or rows.shape[1:] != (self.width,) or not np.isfinite(rows).all():
            return DecodeError(
                f"shape {list(rows.shape)}; features are finite rows of {self.width} numbers"
            )
        return rows.mean(0)

    def encode(self, prepared: Sequence[Any]) -> Tensor:
        """fp32 (b, D); see ``Encoder``."""
        return torch.from_numpy(np.stack(prepared))
