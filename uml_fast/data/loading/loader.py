"""The loader: packs made ahead of the step by native threads, in an order no timing can change.

A slot is one block of memory that holds a whole pack. The tensors of a batch are views of its slot,
made once; a batch is therefore valid until the next one is asked for (or until ``release``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import numpy as np
import torch

from uml_fast.config import MixConfig, require
from uml_fast.data.loading.packs import NativePacks, Packs, ReferencePacks, assemble, planner_args
from uml_fast.data.source import Samples
from uml_fast.packing.layout import Stream, make_layouts, make_rules
from uml_fast.packing.pack import Layout, PackedBatch
from uml_fast.packing.resume import Generation, State, continue_from, join, rank_state
from uml_fast.packing.schedule import (
    STATE_HEADER,
    STREAM_STATE,
    Planner,
    check_ranks,
    sequential_plan,
)
from uml_fast.runtime import native
from uml_fast.runtime.device import reader_count
from uml_fast.runtime.trace import Trace

_SLOT_BYTES = 256 << 20
"""Memory for the packs of a loader, on the host and again on a device of its own."""
_MOST_SLOTS = 32


def streams_of(
    sources: Sequence[Samples], shares: Mapping[str, float] | None = None, target: str | None = None
) -> tuple[Stream, ...]:
    """What the planner knows of the sources; shares not given are 1, the target is the first."""
    target = sources[0].name if target is None else target
    return tuple(
        Stream(
            name=s.name,
            lengths=s.lengths,
            share=1.0 if shares is None else shares.get(s.name, 1.0),
            is_target=s.name == target,
            row_elems=s.row_elems,
            dtype=s.row_dtype,
        )
        for s in sources
    )


def layouts_of(
    sources: Sequence[Samples],
    mix: MixConfig,
    shares: Mapping[str, float] | None = None,
    target: str | None = None,
) -> tuple[Layout, ...]:
    """The layouts of a run over these sources (``schedule.make_layouts``)."""  # fmt: skip
    return make_layouts(streams_of(sources, shares, target), mix)


def look_ahead(layouts: Sequence[Layout]) -> int:
    """Slots of a loader: as many of the largest pack as the memory for them holds, 2 to 32.

    Measured in docs/design.md: slots beyond those that jitter needs cost nothing but memory.
    """
    largest = max(
        sum(r.rows * r.row_elems * np.dtype(r.dtype).itemsize for r in layout.regions)
        for layout in layouts
    )
    return int(np.clip(_SLOT_BYTES // largest, 2, _MOST_SLOTS))


def iterate_once(
    source: Samples, layout: Layout, device: str | torch.device = "cpu"
) -> Iterator[PackedBatch]:
    """Every sample of ``source`` once and in order, in its region of ``layout``; for evaluation.

    Raises:
        ConfigError: the layout has no region for the source, or one too small for a sample.
    """
    names = [r.name for r in layout.regions]
    require(source.name in names, f"the layout has no region for {source.name!r}, only for {names}")
    m = names.index(source.name)
    none = np.empty(0, np.int64)
    for index in sequential_plan(source.lengths, layout.regions[m]):
        samples = [index if k == m else none for k in range(len(names))]
        empty = {name: source for name in names}
        yield assemble(layout, empty, samples).to(torch.device(device))


class Loader:
    """An endless iterator of ``(PackedBatch, layout index)``.

    Args:
        sources: the samples of each modality.
        layouts: shapes of the packs (``layouts_of``).
        mix: how modalities share the packs.
        seed: the order of samples is a function of (seed, modality, epoch) and of nothing else.
        shares: part of each modality in the token mix; 1 where not given.
        target: the target modality, which policy ``warmup`` needs to know; None: the first source.
        device: where the batches are.
        slots: packs that can exist at a time, the one in use among them; None: ``look_ahead``.
        threads: native threads that make packs.
        readers: threads that read sources which are not in memory; None: one for each core.
        rank: takes every ``world``-th sample of the common order.
        world: number of ranks.
        timeout_s: seconds after which a pack that does not come is an error.
        trace: takes the events of the packs.

    Raises:
        ConfigError: a sample does not fit its region, or a modality has fewer samples than ranks.
        TimeoutError: (from ``next``) no pack within ``timeout_s``; names the stage that hangs.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        layouts: Sequence[Layout],
        mix: MixConfig,
        seed: int,
        *,
        shares: Mapping[str, float] | None = None,
        target: str | None = None,
        device: str | torch.device = "cpu",
        slots: int | None = None,
        threads: int = 1,
        readers: int | None = None,
        rank: int = 0,
        world: int = 1,
        timeout_s: float = 60.0,
        trace: Trace | None = None,
    ) -> None:
        require(0 <= seed < 1 << 63, f"seed is {seed}; it must be in 0..2**63 - 1")
        slots = look_ahead(layouts) if slots is None else slots
        readers = reader_count() if readers is None else readers
        require(
            min(slots, threads, readers) >= 1,
            "a loader needs at least one slot, one thread and one reader",
        )
        self._streams = streams_of(sources, shares, target)
        self._seed, self._rank, self._world = seed, rank, world
        self._dealt = [-1] * len(self._streams)
        self._before: list[Generation] = []
        self._slots = slots
        check_ranks(self._streams, rank, world)
        rules = make_rules(self._streams, layouts, mix)
        where = torch.device(device)
        extension = native.module()
        self._packs: Packs
        if extension is None:
            planner = Planner(self._streams, layouts, mix, seed, rank, world)
            self._packs = ReferencePacks(planner, sources, layouts, where)
        else:
            args = planner_args(self._streams, rules, seed, rank, world)
            self._packs = NativePacks(
                extension, args, sources, layouts, where, slots, threads, readers, timeout_s, trace
            )
        self._layouts = layouts
        self._finalizer = weakref.finalize(self, self._packs.close)
        self._stall_s = 0.0
        self._handed = self._occupied = self._rows = self._valid_rows = 0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[PackedBatch, int]:
        if not self._finalizer.alive:
            raise RuntimeError("the loader is closed")
        before = self._total_rows()
        self._occupied += self._packs.ready()
        start = time.perf_counter()
        batch, layout = self._packs.next()
        self._stall_s += time.perf_counter() - start
        self._handed += 1
        self._rows += self._layouts[layout].rows
        self._valid_rows += self._total_rows() - before
        return batch, layout

    def _streams_state(self) -> np.ndarray:
        return self._packs.state[STATE_HEADER:].reshape(len(self._streams), STREAM_STATE)

    def _total_rows(self) -> int:
        return int(self._streams_state()[:, 7].sum())

    def release(self) -> None:
        """Give the last batch's slot back before the next is asked for; ends the batch."""
        self._packs.release()

    def state_dict(self) -> State:
        """The state after the last pack handed out; packs made ahead are not in it.

        With several ranks, that of this rank: ``resume.join`` makes one of all.
        """
        state = rank_state(self._packs.state.tolist(), self._dealt, self._before)
        return join([state]) if self._world == 1 else state

    def load_state_dict(self, state: Mapping[str, list[Generation]]) -> None:
        """Continue after the packs at which ``state_dict`` was taken; batches become invalid.

        ``state`` is that of all ranks. Another number of ranks, slots or threads may have saved it.

        Raises:
            ValueError: the state is of other data or another seed, or lacks ranks; says which.
        """
        place = continue_from(state, self._streams, self._seed, self._rank, self._world)
        self._packs.load(np.array(place.values, np.int64), place.deals)
        self._dealt, self._before = place.dealt, place.before

    def epochs(self) -> dict[str, float]:
        """Passes over each modality up to the last pack handed out, over all ranks together."""
        samples = self._streams_state()[:, 6].tolist()
        return {
            s.name: n * self._world / len(s.lengths)
            for s, n in zip(self._streams, samples, strict=True)
        }

    def stats(self) -> dict[str, float]:
        """What the loader did since it was made.

        ``stall_s`` seconds the consumer waited, ``packs`` handed out, ``occupancy`` mean part of
        the slots that was ready when one was asked for, ``fill`` rows of samples per row; and since
        the start of the run, resumed parts included, ``samples/<name>`` and ``tokens/<name>``.
        The loader's ``packs.Times`` are there as ``<group>_s/<name>``.
        """
        out = {
            "stall_s": self._stall_s,
            "packs": float(self._handed),
            "occupancy": self._occupied / max(1, self._handed * self._slots),
            "fill": self._valid_rows / max(1, self._rows),
        }
        for s, row in zip(self._streams, self._streams_state().tolist(), strict=True):
            out[f"samples/{s.name}"], out[f"tokens/{s.name}"] = float(row[6]), float(row[7])
        for group, seconds in self._packs.times().items():
            out |= {f"{group}_s/{name}": s for name, s in seconds.items()}
        return out

    def close(self) -> None:
        """Stop the threads. Any number of times; batches stay readable."""
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
