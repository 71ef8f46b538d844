"""One optimiser step on one pack of every rank: forward, backward, clip, update.

The loss of a step is that of all ranks' packs as one: per modality the mean over all their samples.
So each rank weights its means by its part of the samples, and gradients are summed over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.compat import release_batch
from uml_fast.config import RunConfig
from uml_fast.distributed import ALONE, Ranks
from uml_fast.model.uml import Uml
from uml_fast.objective import counts, losses, total
from uml_fast.optim import build_optimizer, learning_rate
from uml_fast.pack import Layout, PackedBatch
from uml_fast.profiling import phase
from uml_fast.schedule import hash64, stream_key

_DROPOUT = stream_key("dropout masks")
"""Stream of dropout in ``hash64``; no modality has this name, which is not an identifier."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves on the device; reading it waits for the step."""

    loss: Tensor
    """() fp32 weighted total, of all ranks."""
    parts: dict[str, Tensor]
    """Per modality () fp32, not weighted, of all ranks; NaN where none of several had a sample."""
    grad_norm: Tensor | None
    """() norm of all gradients before clipping; None where nothing is clipped."""


class TrainStep:
    """The model with its optimiser. A step is a function of (weights, pack, step) alone."""

    def __init__(self, model: Uml, config: RunConfig, seed: int, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.ranks = ranks
        self.config = config
        self.seed = seed
        self.optimizer = build_optimizer(model, config.optim)
        device = next(model.parameters()).device
        self.rng_key = torch.zeros(1, dtype=torch.int64, device=device)
        self._losses = losses
        self._programs: set[tuple[Layout, frozenset[str]]] = set()
        if config.compile:
            torch._dynamo.reset()
            self._losses = torch.compile(losses, dynamic=False, fullgraph=True)
        self._graphs_before = _graphs()

    @property
    def recompiles(self) -> int:
        """Graphs compiled beyond one per layout and set of frozen networks; 0 as it should be."""
        return max(0, _graphs() - self._graphs_before - len(self._programs))

    def __call__(self, batch: PackedBatch, step: int) -> StepResult:
        """Train on one pack. ``step`` counts from 0 and fixes learning rate and dropout masks."""
        key = hash64(self.seed, _DROPOUT, self.ranks.rank, np.array([step]))
        self.rng_key.fill_(int(key[0] >> 1))
        if self.config.compat == "release":
            batch = release_batch(batch)
        self.model.freeze_for(step)
        self._programs.add((batch.layout, self.model.frozen))
        with phase("forward"):
            parts = self._losses(self.model, batch, self.config, self.rng_key)
        with phase("backward"):
            if self.ranks.world == 1:
                loss = total(parts, self.config)
                loss.backward()
            else:
                loss, parts = self._backward_over_ranks(parts, batch)
        with phase("optimizer"):
            norm = self._clip()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.config.steps, self.config.optim)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss.detach(), {k: v.detach() for k, v in parts.items()}, norm)

    def _backward_over_ranks(
        self, parts: dict[str, Tensor], batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Backward of this rank's part of the step's loss; loss, parts and gradients of all ranks.

        A parameter that no rank has a gradient of is left without one, as it is in one process.
        """
        names = [m.name for m in self.config.modalities]
        own = counts(self.model, batch, self.config)
        none = torch.zeros((), device=self.rng_key.device)
        count_M = torch.stack([own.get(name, none).float() for name in names])
        total_M = count_M.clone()
        self.ranks.sum([total_M])
        weight_M = count_M / total_M.clamp(min=1)
        weighted = {n: parts[n] * w for n, w in zip(names, weight_M, strict=True) if n in parts}
        total(weighted, self.config).backward()
        part_M = torch.stack([weighted.get(name, none).detach() for name in names])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        has_grad_P = none.new_tensor([p.grad is not None for p in trained])
        is_whole = bool(all(p.grad is not None for p in trained))
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.sum([part_M, has_grad_P, *(p.grad for p in trained if p.grad is not None)])
        if not is_whole:
            for p, ranks in zip(trained, has_grad_P.tolist(), strict=True):
                p.grad = p.grad if ranks else None
        all_parts = dict(zip(names, part_M, strict=True))
        found_M = torch.where(total_M > 0, part_M, torch.nan)
        return total(all_parts, self.config), dict(zip(names, found_M, strict=True))

    def _clip(self) -> Tensor | None:
        if not self.config.optim.clip_norm:
            return None
        return torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optim.clip_norm
        ).detach()


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
