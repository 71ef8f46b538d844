"""What part of its time a rank spends in exchanging weights and gradients (``comm_pct``).

FSDP2 takes its collectives from outside: these are its own with a clock around them. Over gloo they
hold the rank up, and nothing hides them. On a GPU they run on streams of their own: two events give
the time of each, whether computing hides it or not, and nobody waits to read them; a gather and a
scatter that run at once count both, up to 100 %. DDP samples itself (its first ten steps, then
every hundredth) and says what backward did not hide, as a mean over its samples since it began:
between two log lines there may be none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.nn.parallel import DistributedDataParallel


class Clock:
    """Seconds in which collectives ran."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: list[tuple[Any, Any]] = []
        """Events before and behind collectives on a GPU that were not read yet."""

    @contextlib.contextmanager
    def around(self, device: torch.device) -> Iterator[None]:
        """Count the collective that is called in the context, on the device's present stream."""
        if device.type == "cpu":
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._running.append((first, last))

    def take(self) -> float:
        """Seconds of the collectives that ended since the last call."""
        ended = [events for events in self._running if events[1].query()]
        self._running = [events for events in self._running if events not in ended]
        seconds = self._seconds + sum(a.elapsed_time(b) / 1000 for a, b in ended)
        self._seconds = 0.0
        return seconds


class _Clocked:
    """In front of a collective of FSDP2 among the bases: its calls are counted."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self.clock.around(named["input_tensor"].device):
            return super().__call__(*arguments, **named)  # type: ignore[misc]


class _Gather(_Clocked, DefaultAllGather):
    pass


class _Scatter(_Clocked, DefaultReduceScatter):
    pass


def put_clock(module: FSDPModule, clock: Clock) -> None:
    """Have ``clock`` count what an FSDP unit gathers and scatters."""
    module.set_custom_all_gather(_Gather(clock))
    module.set_custom_reduce_scatter(_Scatter(clock))


def exchange_pct(losses: nn.Module, clock: Clock, seconds: float) -> float | None:
    """Part of a rank's time that exchanging took, in %; None where it is not known.

    Under FSDP2 of ``seconds``; under DDP of forward and backward of all its samples so far.

    Args:
        losses: what ``distribute`` returned.
        clock: that of its FSDP units.
        seconds: of training since the last call, without validations and checkpoints.
    """
    if isinstance(losses, FSDPModule):
        return min(100.0, 100 * clock.take() / seconds)  # gathers and scatters may overlap
    if not isinstance(losses, DistributedDataParallel):
        return None
    seen = losses._get_ddp_logging_data()
    hidden = seen.get("avg_backward_compute_comm_overlap_time", 0)
    took = seen.get("avg_backward_comm_time", 0) - hidden
    computed = [seen.get(f"avg_{part}_compute_time", 0) for part in ("forward", "backward")]
    return 100 * took / (sum(computed) + took) if all(computed) else None
