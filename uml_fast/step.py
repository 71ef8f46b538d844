"""One optimiser step on one pack: forward, backward, clip, update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.config import RunConfig
from uml_fast.model.uml import Uml
from uml_fast.objective import losses, total
from uml_fast.optim import build_optimizer, learning_rate
from uml_fast.pack import Layout, PackedBatch
from uml_fast.schedule import hash64, stream_key

_DROPOUT = stream_key("dropout masks")
"""Stream of dropout in ``hash64``; no modality has this name, which is not an identifier."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves on the device; reading it waits for the step."""

    loss: Tensor
    """() fp32 weighted total."""
    parts: dict[str, Tensor]
    """Per modality () fp32, not weighted."""
    grad_norm: Tensor | None
    """() norm of all gradients before clipping; None where nothing is clipped."""


class TrainStep:
    """The model with its optimiser. A step is a function of (weights, pack, step) alone."""

    def __init__(self, model: Uml, config: RunConfig, seed: int) -> None:
        self.model = model
        self.config = config
        self.seed = seed
        self.optimizer = build_optimizer(model, config.optim)
        device = next(model.parameters()).device
        self.rng_key = torch.zeros(1, dtype=torch.int64, device=device)
        self._losses = losses
        self._layouts: set[Layout] = set()
        if config.compile:
            torch._dynamo.reset()
            self._losses = torch.compile(losses, dynamic=False, fullgraph=True)
        self._graphs_before = _graphs()

    @property
    def recompiles(self) -> int:
        """Graphs compiled beyond one per layout; 0 unless a shape or constant changed."""
        return max(0, _graphs() - self._graphs_before - len(self._layouts))

    def __call__(self, batch: PackedBatch, step: int) -> StepResult:
        """Train on one pack. ``step`` counts from 0 and fixes learning rate and dropout masks."""
        self.rng_key.fill_(int(hash64(self.seed, _DROPOUT, 0, np.array([step]))[0] >> 1))
        self._layouts.add(batch.layout)
        parts = self._losses(self.model, batch, self.config, self.rng_key)
        loss = total(parts, self.config)
        loss.backward()
        norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.steps, self.config.optim)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss.detach(), {k: v.detach() for k, v in parts.items()}, norm)

    def _clip(self) -> Tensor | None:
        if not self.config.optim.clip_norm:
            return None
        return torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optim.clip_norm
        ).detach()


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
