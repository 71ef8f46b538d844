"""One optimiser step on the packs of every rank: forward, backward, clip, update, average.

The loss of a step is that of all packs of all ranks as one: per modality the mean over all their
samples. So each pack's means are weighted by its part of the samples, and gradients are summed over
packs and ranks (``distributed/parallel.py``).

Legend: K packs of a rank, M modalities of the run, P parameters.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.config import RunConfig
from uml_fast.distributed.exchange import exchange_pct
from uml_fast.distributed.parallel import Losses, LossFunction, choose, clip, distribute, summing
from uml_fast.distributed.ranks import ALONE, Ranks, talking
from uml_fast.model.compat import release_batch
from uml_fast.model.float8 import check_float8, to_float8
from uml_fast.model.objective import counts, losses, total
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch
from uml_fast.packing.schedule import hash64, stream_key
from uml_fast.runtime.profiling import phase
from uml_fast.training.graph import Replays, is_wanted
from uml_fast.training.optim import Average, build_optimizer, learning_rate, set_rate, update

_DROPOUT = stream_key("dropout masks")
"""Stream of dropout in ``hash64``; no modality has this name, which is not an identifier."""
_GRAPHS = 64
"""Most graphs of one function: a block has two (the first has no residual) in each network, for
each layout and for each set of frozen networks."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves on the device; reading it waits for the step."""

    loss: Tensor
    """() fp32 weighted total, of all packs and ranks."""
    parts: dict[str, Tensor]
    """Per modality () fp32, not weighted, of all packs and ranks; NaN where none of several had a
    sample."""
    grad_norm: Tensor | None
    """() norm of all gradients before clipping; None where nothing is clipped."""
    flags: Tensor | None
    """(k,) on how many of several ranks each of the step's flags was set."""

    def copied(self) -> StepResult:
        """The same scalars in memory of their own; one kernel."""
        own = [self.loss, *self.parts.values()]
        own += [] if self.grad_norm is None else [self.grad_norm]
        loss, *parts = torch.stack(own).unbind()
        norm = None if self.grad_norm is None else parts.pop()
        return StepResult(loss, dict(zip(self.parts, parts, strict=True)), norm, self.flags)


class TrainStep:
    """The model with its optimiser. A step is a function of (weights, packs, step) alone."""

    def __init__(self, model: Uml, config: RunConfig, seed: int, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.ranks = ranks
        self.config = config
        self.seed = seed
        device = next(model.parameters()).device
        self._device = device
        self._keys = [
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(config.optim.accumulate)
        ]
        self._programs: set[tuple[Layout, frozenset[str]]] = set()
        if config.float8:
            check_float8(device, model.dtype)
            to_float8(model)
        self.recompiles = 0
        """Graphs compiled in steps whose layouts and frozen networks had been seen; 0 is right."""
        function: LossFunction = losses
        if config.compile:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = _GRAPHS
            if choose(config.dist, model, ranks, device) == "ddp":
                function = torch.compile(losses, dynamic=False, fullgraph=True)
        self._own = Losses(model, config, function)
        self._losses = distribute(self._own, config, ranks, device)
        self.optimizer = build_optimizer(model, config.optim, ranks)
        self._names = [name for name, _ in model.named_parameters()]
        self.average = Average(model, config.optim.ema) if config.optim.ema else None
        self._replays: Replays[StepResult] | None = None
        if is_wanted(config, ranks, device):
            must = config.cuda_graph == "on"
            self._replays = Replays(self._step, self.optimizer.zero_grad, device, must)
        self.waited_s = 0.0
        """Seconds in which this rank waited for the forward pass of slower ones (on CPUs)."""

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The averages of the parameters, by name; none without ``optim.ema``."""
        return {} if self.average is None else self.average.tensors

    def exchange_pct(self, seconds: float) -> float | None:
        """Part in % of a rank's time that exchanging with others took (``exchange.py``)."""
        return exchange_pct(self._losses, self._own.clock, seconds)

    def __call__(
        self, batch: PackedBatch, step: int, flags: tuple[bool, ...] = (), *before: PackedBatch
    ) -> StepResult:
        """Train on one pack, or on several as one. Nothing waits for the device.

        Args:
            batch: the pack, or the last of the step's.
            step: counts from 0 and fixes learning rate and dropout masks.
            flags: travel with the step's own sums (``StepResult.flags``), at no cost.
            before: the step's packs before the last (``optim.accumulate``); every rank has as many.

        Raises:
            RanksError: another rank is gone.
        """
        packs = (*before, batch)
        if self.config.compat == "release":
            packs = tuple(release_batch(pack) for pack in packs)
        self._freeze_for(step)
        self._set_for(step)
        programs = {(pack.layout, self.model.frozen) for pack in packs}
        graphs_before = _graphs()
        if self._replays is not None:
            result = self._replays(packs, self.model.frozen)
        else:
            result = self._step(packs, flags)
        if programs <= self._programs:
            self.recompiles += _graphs() - graphs_before
        self._programs |= programs
        return result

    def _step(self, packs: Sequence[PackedBatch], flags: tuple[bool, ...] = ()) -> StepResult:
        """The step itself: all that a CUDA graph of it replays."""
        if len(packs) == self.ranks.world == 1:
            parts = self._forward(packs[0], self._keys[0])
            loss, set_on = total(parts, self.config), None
            with phase("backward"):
                loss.backward()
        else:
            with talking() if self.ranks.world > 1 else contextlib.nullcontext():
                loss, parts, set_on = self._over_ranks(packs, flags)
        with phase("optimizer"):
            norm = None
            if self.config.optim.clip_norm:
                norm = clip(self.model.parameters(), self.config.optim.clip_norm)
            update(self.optimizer)
            if self.average is not None:
                self.average.update()
        return StepResult(loss.detach(), {k: v.detach() for k, v in parts.items()}, norm, set_on)

    def _set_for(self, step: int) -> None:
        """Fill in what a step takes besides packs: a dropout key for each, the learning rate.

        A pack's key is that of a rank of its own.
        """
        first = self.ranks.rank * len(self._keys)
        for index, key in enumerate(self._keys):
            drawn = hash64(self.seed, _DROPOUT, first + index, np.array([step]))
            key.fill_(int(drawn[0] >> 1))
        set_rate(self.optimizer, learning_rate(step, self.config.steps, self.config.optim))

    def _forward(self, batch: PackedBatch, key: Tensor) -> dict[str, Tensor]:
        with phase("forward"):
            parts: dict[str, Tensor] = self._losses(batch, key)
        return parts

    def _freeze_for(self, step: int) -> None:
        """Freeze what the step does not train; ranks then sum gradients of the others alone."""
        before = self.model.frozen
        self.model.freeze_for(step)
        if self.model.frozen != before:
            self._losses = distribute(self._own, self.config, self.ranks, self._device)

    def _over_ranks(
        self, packs: Sequence[PackedBatch], flags: tuple[bool, ...]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Forward and backward of this rank's part of the step's loss, pack by pack.

        Returns loss and parts of all packs and ranks, and on how many ranks each flag is set.
        Counts are summed during the first forward and losses during the last backward, so that no
        step waits for either.
        """
        names = [m.name for m in self.config.modalities]
        none = torch.zeros((), device=self._device)
        counted = [counts(self.model, pack, self.config) for pack in packs]
        count_KM = torch.stack([_stack(own, names, none) for own in counted])
        flag_F = [none.new_full((1,), float(flag)) for flag in flags]
        sums = torch.cat([count_KM.sum(0), *flag_F])
        wait = self.ranks.start_sum(sums)
        part_M, weight_KM = torch.zeros_like(count_KM[0]), count_KM
        for k, (pack, key) in enumerate(zip(packs, self._keys, strict=True)):
            is_last = k == len(packs) - 1
            with summing(self._losses, is_last):
                parts = self._forward(pack, key)
                if k == 0:
                    begin = time.perf_counter()
                    wait()
                    self.waited_s += time.perf_counter() - begin
                    weight_KM = count_KM / sums[: len(names)].clamp(min=1)
                weight = dict(zip(names, weight_KM[k], strict=True))
                weighted = {name: loss * weight[name] for name, loss in parts.items()}
                part_M += _stack({n: x.detach() for n, x in weighted.items()}, names, none)
                if is_last:
                    waits = self.ranks.start_sum(part_M), self._start_use(packs)
                with phase("backward"):
                    (total(weighted, self.config) * self._own.factor).backward()
        for wait in waits:
            wait()
        loss = total(dict(zip(names, part_M, strict=True)), self.config)
        found_M = torch.where(sums[: len(names)] > 0, part_M, torch.nan)
        set_on = sums[len(names) :] if self.ranks.world > 1 else None
        return loss, dict(zip(names, found_M, strict=True)), set_on

    def _start_use(self, packs: Sequence[PackedBatch]) -> Callable[[], None]:
        """Begin to ask all ranks which parameters the step needs; returns what ends it.

        Those that no rank needs are left without a gradient. Only layouts decide, which the host
        knows, so ranks tell each other beside backward and not through the device. Packs of policy
        ``joint`` have one layout on all ranks, so there is nothing to tell.
        """
        if self.ranks.world == 1:
            return lambda: None
        program = self.model.frozen
        unused = frozenset.intersection(*(self._own.unused[p.layout, program] for p in packs))
        need_P = torch.tensor([float(name not in unused) for name in self._names])
        tells = self.config.mix.policy != "joint"
        wait = self.ranks.start_sum(need_P) if tells else lambda: None

        def end() -> None:
            wait()
            if unused:
                for parameter, users in zip(self.model.parameters(), need_P.tolist(), strict=True):
                    parameter.grad = parameter.grad if users else None

        return end


def _stack(values: Mapping[str, Tensor], names: Sequence[str], none: Tensor) -> Tensor:
    """fp32 (M,) of scalars by name; ``none`` where there is no value."""
    return torch.stack([values.get(name, none).float() for name in names])


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
