"""Augmentation of texts: token dropout. A text keeps the number of rows that the plan gave it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.config import require
from uml_fast.data.augment.draws import Draws

BLANK = 0
"""What stands for a missing token: the byte that no text holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAugment:
    """Steps in the order of the fields; each is left out at its default."""

    delete: float = 0.0
    """Probability that a token is deleted: those behind it move up, blanks (0) fill the end."""
    replace: float = 0.0
    """Probability that a token is replaced by a blank (0)."""

    def __post_init__(self) -> None:
        for what in ("delete", "replace"):
            value = getattr(self, what)
            require(0 <= value <= 1, f"data.augment.text.{what} is {value}; it must be in 0..1")

    @property
    def is_off(self) -> bool:
        """Whether texts stay as they are."""
        return not (self.delete or self.replace)

    def apply(self, tokens: np.ndarray, rows: int, draws: Draws) -> np.ndarray:
        """(n,) tokens to (rows,) of them; of a text longer than its rows more tokens move up."""
        if self.delete:
            kept = tokens[draws.array(len(tokens)) >= self.delete][:rows]
            tokens = np.full(rows, BLANK, tokens.dtype)
            tokens[: len(kept)] = kept
        tokens = tokens[:rows]
        if self.replace:
            tokens = np.where(draws.array(rows) < self.replace, tokens.dtype.type(BLANK), tokens)
        return tokens
