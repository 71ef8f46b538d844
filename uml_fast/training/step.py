"""One optimiser step on one pack of every rank: forward, backward, clip, update.

The loss of a step is that of all ranks' packs as one: per modality the mean over all their samples.
So each rank weights its means by its part of the samples, and gradients are summed over ranks
(``distributed/parallel.py``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from uml_fast.config import RunConfig
from uml_fast.distributed.parallel import Losses, LossFunction, clip, distribute
from uml_fast.distributed.ranks import ALONE, Ranks, talking
from uml_fast.model.compat import release_batch
from uml_fast.model.objective import counts, losses, total
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch
from uml_fast.packing.schedule import hash64, stream_key
from uml_fast.runtime.profiling import phase
from uml_fast.training.optim import build_optimizer, learning_rate

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
    flags: Tensor | None
    """(k,) on how many of several ranks each of the step's flags was set."""


class TrainStep:
    """The model with its optimiser. A step is a function of (weights, pack, step) alone."""

    def __init__(self, model: Uml, config: RunConfig, seed: int, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.ranks = ranks
        self.config = config
        self.seed = seed
        device = next(model.parameters()).device
        self.rng_key = torch.zeros(1, dtype=torch.int64, device=device)
        self._programs: set[tuple[Layout, frozenset[str]]] = set()
        function: LossFunction = losses
        if config.compile:
            torch._dynamo.reset()
            function = torch.compile(losses, dynamic=False, fullgraph=True)
        self._own = Losses(model, config, function)
        self._losses = distribute(self._own, config, ranks, device)
        self.optimizer = build_optimizer(model, config.optim)
        self._names = [name for name, _ in model.named_parameters()]
        self._graphs_before = _graphs()
        self.waited_s = 0.0
        """Seconds in which this rank waited for the forward pass of slower ones (on CPUs)."""

    @property
    def communication_pct(self) -> float | None:
        """Part of backward in which gradients were summed and nothing computed; None: not known.

        DDP measures it now and then (its first ten steps, then every hundredth).
        """
        if not isinstance(self._losses, DistributedDataParallel):
            return None
        seen = self._losses._get_ddp_logging_data()
        took = seen.get("avg_backward_comm_time", 0) - seen.get(
            "avg_backward_compute_comm_overlap_time", 0
        )
        whole = seen.get("avg_backward_compute_time", 0) + took
        return 100 * took / whole if whole > 0 else None

    @property
    def recompiles(self) -> int:
        """Graphs compiled beyond one per layout and set of frozen networks; 0 as it should be."""
        return max(0, _graphs() - self._graphs_before - len(self._programs))

    def __call__(self, batch: PackedBatch, step: int, flags: tuple[bool, ...] = ()) -> StepResult:
        """Train on one pack. ``step`` counts from 0 and fixes learning rate and dropout masks.

        ``flags`` travel with the step's own sums (``StepResult.flags``), at no cost.

        Raises:
            RanksError: another rank is gone.
        """
        key = hash64(self.seed, _DROPOUT, self.ranks.rank, np.array([step]))
        self.rng_key.fill_(int(key[0] >> 1))
        if self.config.compat == "release":
            batch = release_batch(batch)
        self._freeze_for(step)
        self._programs.add((batch.layout, self.model.frozen))
        set_on = None
        if self.ranks.world == 1:
            with phase("forward"):
                parts = self._losses(batch, self.rng_key)
            with phase("backward"):
                loss = total(parts, self.config)
                loss.backward()
        else:
            with talking():
                loss, parts, set_on = self._over_ranks(batch, flags)
        with phase("optimizer"):
            norm = None
            if self.config.optim.clip_norm:
                norm = clip(self.model.parameters(), self.config.optim.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.config.steps, self.config.optim)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss.detach(), {k: v.detach() for k, v in parts.items()}, norm, set_on)

    def _freeze_for(self, step: int) -> None:
        """Freeze what the step does not train; ranks then sum gradients of the others alone."""
        before = self.model.frozen
        self.model.freeze_for(step)
        if self.model.frozen != before:
            self._losses = distribute(self._own, self.config, self.ranks, self.rng_key.device)

    def _over_ranks(
        self, batch: PackedBatch, flags: tuple[bool, ...]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Forward and backward of this rank's part of the step's loss.

        Returns loss and parts of all ranks, and on how many each flag is set. Counts are summed
        during forward and losses during backward, so that no step waits for either.
        """
        names = [m.name for m in self.config.modalities]
        own = counts(self.model, batch, self.config)
        none = torch.zeros((), device=self.rng_key.device)
        count_M = torch.stack([own.get(name, none).float() for name in names])
        sums = torch.cat([count_M, none.new_tensor([float(flag) for flag in flags])])
        wait = self.ranks.start_sum(sums)
        with phase("forward"):
            parts = self._losses(batch, self.rng_key)
        begin = time.perf_counter()
        wait()
        self.waited_s += time.perf_counter() - begin
        total_M, set_on = sums[: len(names)], sums[len(names) :]
        weight_M = count_M / total_M.clamp(min=1)
        weighted = {n: parts[n] * w for n, w in zip(names, weight_M, strict=True) if n in parts}
        part_M = torch.stack([weighted.get(name, none).detach() for name in names])
        unused = self._own.unused[batch.layout, self.model.frozen]
        needs_P = [float(n not in unused) for n in self._names]
        sums = torch.cat([part_M, none.new_tensor(needs_P)])
        wait = self.ranks.start_sum(sums)
        with phase("backward"):
            (total(weighted, self.config) * self._own.factor).backward()
        wait()
        part_M, users_P = sums[: len(names)], sums[len(names) :]
        if unused:
            parameters = dict(self.model.named_parameters())
            for name, users in zip(self._names, users_P.tolist(), strict=True):
                parameters[name].grad = parameters[name].grad if users else None
        all_parts = dict(zip(names, part_M, strict=True))
        found_M = torch.where(total_M > 0, part_M, torch.nan)
        return total(all_parts, self.config), dict(zip(names, found_M, strict=True)), set_on


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
