"""Options of a step's end: optimiser, learning-rate schedule, accumulation and averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uml_fast.networks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    kind: Literal["adam", "adamw"] = "adamw"
    """adam adds weight decay to the gradient, adamw decouples it."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms, positions and scales get none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moment estimates."""
    schedule: Literal["constant", "cosine", "release"] = "cosine"
    """Shape after the warm-up; cosine ends at zero. release: that of the authors' code (1.4): 1e-5
    at step 0, then a warm-up to lr, then a cosine that ends warmup_steps short of zero."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    accumulate: int = 1
    """Packs of each rank in a step: a larger batch in the memory of one pack. Its loss is that of
    all of them as one, as if each were a rank's; ``steps`` and schedules count optimiser steps."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then what is evaluated and exported: of
    about 1 / (1 - ema) steps, so 0.999 of the last thousand. 0: the weights themselves."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr is {self.lr}; it must be positive")
        require(
            all(0 <= b < 1 for b in self.betas),
            f"optim.betas is {self.betas}; both must be in [0, 1)",
        )
        require(self.weight_decay >= 0, "optim.weight_decay must not be negative")
        require(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")
        require(self.clip_norm >= 0, "optim.clip_norm must not be negative")
        require(
            self.accumulate >= 1, f"optim.accumulate is {self.accumulate}; it must be >= 1 packs"
        )
        require(0 <= self.ema < 1, f"optim.ema is {self.ema}; it must be in [0, 1)")
