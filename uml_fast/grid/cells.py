"""What is searched: the cells of a grid and the schedule they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from uml_fast.config import require

_MOST = 16
"""Modalities of a cell that the kernels have room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One head on frozen features: what it sees and how it is trained.

    The head lives in the space of the last modality of ``modalities``. Every other one has a
    bias-free projection into that space, or none where ``project`` is False.
    """

    modalities: tuple[str, ...] = ("image", "text")
    """Target first, then the auxiliaries; ("image",) is the unimodal baseline."""
    lr: float = 1e-3
    """Largest learning rate."""
    weight_decay: float = 0.0
    """Decay of AdamW."""
    batch: int = 32
    """Samples of the target in a step."""
    alpha: float = 1.0
    """Weight of the loss of each auxiliary."""
    ratio: float = 1.0
    """Samples of each auxiliary for one of the target in a step (paper E.11); at least one."""
    shots: int = 0
    """Training samples of each class of the target, drawn with the seed; 0: all."""
    auxiliary_shots: int = 0
    """Training samples of each class of every auxiliary, drawn with the seed; 0: all."""
    seed: int = 1
    """Draws the shots, the first weights and the order of samples."""
    learn_scale: bool = True
    """Learn a logit scale per modality."""
    scale: float = 1.0
    """Logit scale of every modality, at first where it is learned; 100 for CLIP."""
    init: str = "random"
    """"random", or the modality whose L2-normalised class means start the head ("Ours (init)")."""
    project: bool = True
    """False: encoders that are aligned, as CLIP's; all modalities have one width."""

    def __post_init__(self) -> None:
        names = self.modalities
        require(
            0 < len(names) <= _MOST and len(set(names)) == len(names) and "random" not in names,
            f"modalities are {names}; they must be 1 to {_MOST} different names, the target first",
        )
        require(0 < self.lr < math.inf, f"lr is {self.lr}; it must be positive and finite")
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}; it must be finite and not negative",
        )
        require(self.batch >= 1, f"batch is {self.batch}; it must be >= 1")
        require(0 <= self.alpha < math.inf, f"alpha is {self.alpha}; it must be finite and >= 0")
        require(0 < self.ratio < math.inf, f"ratio is {self.ratio}; it must be positive and finite")
        for name in ("shots", "auxiliary_shots"):
            shots = getattr(self, name)
            require(shots >= 0, f"{name} is {shots}; it must be >= 0")
        require(0 <= self.seed < 1 << 63, f"seed is {self.seed}; it must be in 0..2**63 - 1")
        require(0 < self.scale < math.inf, f"scale is {self.scale}; it must be positive and finite")
        require(
            self.init in ("random", names[-1]) or not self.project,
            f"init is {self.init}; with projections the head starts random or from {names[-1]}, "
            "the last modality, in whose space it lives",
        )

    def batch_of(self, modality: str) -> int:
        """Samples of a modality in a step."""
        if modality == self.modalities[0]:
            return self.batch
        return max(1, round(self.ratio * self.batch))

    def weight_of(self, modality: str) -> float:
        """Weight of a modality's loss."""
        return 1.0 if modality == self.modalities[0] else self.alpha

    def shots_of(self, modality: str) -> int:
        """Training samples of each class of a modality; 0: all."""
        return self.shots if modality == self.modalities[0] else self.auxiliary_shots

    def is_projected(self, modality: str) -> bool:
        """Whether a modality reaches the head through a projection."""
        return self.project and modality != self.modalities[-1]


def product(**axes: Sequence[Any]) -> list[Cell]:
    """Every combination of the given values; fields that are not given keep their default.

        product(lr=(1e-3, 1e-4), alpha=(0.3, 1.0), shots=(1, 4, 16), seed=(1, 2, 3))

    Raises:
        TypeError: a name that is no field of ``Cell``.
        ConfigError: a value that it refuses.
    """
    return [
        Cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


Precision = Literal["highest", "high"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSchedule:
    """Length and learning rate of every cell (paper 1.4, table 5)."""

    steps: int = 12_800
    """Most steps of a cell."""
    warmup_steps: int = 50
    """Steps of the linear warm-up; the first step has ``warmup_lr``."""
    warmup_lr: float = 1e-5
    """Learning rate of step 0."""
    eval_every: int = 100
    """Steps between looks at the validation samples; the first is before step 0."""
    patience: int = 10
    """Looks without a better validation accuracy after which a cell stops."""
    precision: Precision = "high"
    """Of the products in a step. high: fp32 values as sums of two bf16 halves on a CPU with AMX,
    errors some 1e-5 of the largest terms (torch's float32_matmul_precision of this name), fp32
    elsewhere; highest: fp32 everywhere."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps is {self.steps}; it must be >= 1")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must be >= 0")
        require(self.eval_every >= 1, f"eval_every is {self.eval_every}; it must be >= 1")
        require(self.patience >= 1, f"patience is {self.patience}; it must be >= 1")

    def rates(self, lr: float, begin: int, end: int) -> np.ndarray:
        """float32 (end - begin,) learning rate of each step.

        Step 0 has ``warmup_lr``, step t of the warm-up ``lr * t / warmup_steps``, then a cosine
        that would reach 0 after ``steps`` more.
        """
        t = np.arange(begin, end, dtype=np.float64)
        after = np.maximum(t - self.warmup_steps, 0)
        rates = 0.5 * lr * (1 + np.cos(np.pi * np.minimum(after / self.steps, 1)))
        warm = lr * t / max(self.warmup_steps, 1)
        rates = np.where(t < self.warmup_steps, np.where(t == 0, self.warmup_lr, warm), rates)
        return rates.astype(np.float32)
