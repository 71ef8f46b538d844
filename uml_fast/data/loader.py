"""The loader: packs made ahead of the training step by native threads, in an order that no timing can change.

A slot is one block of memory that holds a whole pack. The tensors of a batch are views of its slot, made once;
a batch is therefore valid until the next one is asked for (or until ``release``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from uml_fast import native
from uml_fast.config import MixConfig, require
from uml_fast.data.source import Source
from uml_fast.pack import Layout, PackedBatch, pack_samples
from uml_fast.schedule import (
    STATE_FORMAT,
    STATE_HEADER,
    STREAM_STATE,
    Planner,
    Rules,
    Stream,
    check_ranks,
    check_state,
    make_layouts,
    make_rules,
    sequential_plan,
    stream_key,
)

_POLL_S = 0.2
"""Seconds between looks at Ctrl-C while a pack is awaited."""


def streams_of(
    sources: Sequence[Source], shares: Mapping[str, float] | None = None, target: str | None = None
) -> tuple[Stream, ...]:
    """What the planner knows of the sources; a share that is not given is 1, the first source is the target."""
    target = sources[0].name if target is None else target
    return tuple(
        Stream(
            name=s.name,
            lengths=s.lengths,
            share=1.0 if shares is None else shares.get(s.name, 1.0),
            is_target=s.name == target,
            row_elems=s.rows.shape[1],
            dtype=s.rows.dtype.name,
        )
        for s in sources
    )


def layouts_of(
    sources: Sequence[Source],
    mix: MixConfig,
    shares: Mapping[str, float] | None = None,
    target: str | None = None,
) -> tuple[Layout, ...]:
    """The layouts of a run over these sources (``schedule.make_layouts``)."""  # fmt: skip
    return make_layouts(streams_of(sources, shares, target), mix)


def planner_args(
    streams: Sequence[Stream], rules: Rules, seed: int, rank: int, world: int
) -> dict[str, Any]:
    """The planner's arguments in the form the extension takes."""

    def offsets(s: Stream) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(s.lengths)]).astype(np.int64)

    layouts = [
        (
            [(r.stream, r.rows, r.slots, r.max_len, r.reserve, r.close) for r in layout.regions],
            list(layout.order),
            layout.pace,
        )
        for layout in rules.layouts
    ]
    return {
        "streams": [(stream_key(s.name), offsets(s), s.share) for s in streams],
        "layouts": layouts,
        "policy": rules.policy,
        "first_side": list(rules.first_side),
        "warmup_epochs": rules.warmup_epochs,
        "seed": seed,
        "rank": rank,
        "world": world,
    }


def assemble(
    layout: Layout, sources: Mapping[str, Source], samples: Sequence[np.ndarray]
) -> PackedBatch:
    """The pack of the given samples (per region int64 indices), in newly allocated memory."""
    names = [r.name for r in layout.regions]
    chosen = dict(zip(names, samples, strict=True))
    batch = pack_samples(
        layout,
        {name: [sources[name].sample(i) for i in index] for name, index in chosen.items()},
        {name: sources[name].labels[index].tolist() for name, index in chosen.items()},
    )
    for m, index in enumerate(samples):
        first = layout.slot_slice(m).start
        batch.sample_S[first : first + len(index)] = torch.from_numpy(index)
    return batch


def iterate_once(
    source: Source, layout: Layout, device: str | torch.device = "cpu"
) -> Iterator[PackedBatch]:
    """Every sample of ``source`` once and in order, packed into its region of ``layout``; for evaluation.

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


class _Packs(Protocol):
    """Where packs come from: the native loader or the reference."""

    state: np.ndarray
    """int64, the planner's state after the last pack handed out."""

    def next(self) -> tuple[PackedBatch, int]: ...
    def release(self) -> None: ...
    def load(self, state: np.ndarray) -> None: ...
    def ready(self) -> int: ...
    def close(self) -> None: ...


class _ReferencePacks:
    """Packs made when they are asked for."""

    def __init__(
        self,
        planner: Planner,
        sources: Sequence[Source],
        layouts: Sequence[Layout],
        device: torch.device,
    ):
        self._planner, self._layouts, self._device = planner, layouts, device
        self._sources = {s.name: s for s in sources}
        self.state = np.array(planner.state_dict()["planner"], np.int64)

    def next(self) -> tuple[PackedBatch, int]:
        plan = self._planner.next()
        batch = assemble(self._layouts[plan.layout], self._sources, plan.samples)
        self.state = np.array(self._planner.state_dict()["planner"], np.int64)
        return batch.to(self._device), plan.layout

    def release(self) -> None:
        """Nothing to give back: each batch has its own memory."""

    def load(self, state: np.ndarray) -> None:
        self._planner.load_state_dict({"planner": state.tolist()})
        self.state = state

    def ready(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to stop."""


class _DeviceBytes:
    """A slot's memory on a CUDA device, in the form torch reads without copying."""

    def __init__(self, address: int, size: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


class _NativePacks:
    """Packs made ahead by the extension's threads."""

    def __init__(
        self, extension: ModuleType, args: dict[str, Any], sources: Sequence[Source], layouts: Sequence[Layout],
        device: torch.device, slots: int, threads: int, timeout_s: float,
    ) -> None:  # fmt: skip
        self._layouts, self._device, self._timeout_s = layouts, device, timeout_s
        cuda = native.cuda_module() if device.type == "cuda" else None
        self._is_direct = cuda is not None or device.type == "cpu"
        index = device.index if device.index is not None else 0
        self._loader = extension.Loader(
            **args,
            sources=[(s.rows.view(np.uint8).reshape(-1), s.labels) for s in sources],
            device=extension.HostDevice() if cuda is None else cuda.CudaDevice(index),
            slots=slots,
            threads=threads,
        )
        self._on_cuda = cuda is not None
        self._batches: dict[tuple[int, int], PackedBatch] = {}
        self._held: int | None = None
        self.state = np.empty(STATE_HEADER + len(sources) * STREAM_STATE, np.int64)
        self._loader.save(self.state)

    def next(self) -> tuple[PackedBatch, int]:
        self.release()
        deadline = time.monotonic() + self._timeout_s
        while (slot := self._loader.acquire(_POLL_S, self._stream())) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no pack for {self._timeout_s:g} s; the loader is in stage: {self._loader.stage()}"
                )
        self._held = slot
        self._loader.copy_state(slot, self.state)
        layout = self._loader.layout(slot)
        batch = self._batches.get((slot, layout))
        if batch is None:
            batch = self._batches[slot, layout] = self._view(slot, layout)
        return batch if self._is_direct else batch.to(self._device, non_blocking=False), layout

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._on_cuda else 0

    def _view(self, slot: int, index: int) -> PackedBatch:
        host = self._loader.memory(slot)
        if self._on_cuda:
            memory = torch.as_tensor(
                _DeviceBytes(self._loader.device_address(slot), len(host), host),
                device=self._device,
            )
        else:
            memory = torch.from_numpy(host)
        layout = self._layouts[index]
        parts = [memory[first : first + size] for first, size in self._loader.fields(index)]

        def raw(part: Tensor, dtype: str, elems: int) -> Tensor:
            return part.view(getattr(torch, dtype)).view(-1, elems)

        count = len(layout.regions)
        rows = tuple(
            raw(p, r.dtype, r.row_elems) for p, r in zip(parts, layout.regions, strict=False)
        )
        offsets, modality, label, sample, position, segment = parts[count:]
        int32, int64 = torch.int32, torch.int64
        return PackedBatch(
            layout, rows, offsets.view(int32), modality.view(int32), label.view(int32), sample.view(int64),
            position.view(int32), segment.view(int32),
        )  # fmt: skip

    def release(self) -> None:
        if self._held is not None:
            slot, self._held = self._held, None
            self._loader.release(slot, self._stream())

    def load(self, state: np.ndarray) -> None:
        self._held = None
        self._loader.load(state)
        self.state = state

    def ready(self) -> int:
        return self._loader.ready()

    def close(self) -> None:
        self._loader.close()


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
        slots: packs that can exist at a time, the one in use among them.
        threads: native threads that make packs.
        rank: takes every ``world``-th sample of the common order.
        world: number of ranks.
        timeout_s: seconds after which a pack that does not come is an error.

    Raises:
        ConfigError: a sample does not fit its region, or a modality has fewer samples than there are ranks.
        TimeoutError: (from ``next``) no pack within ``timeout_s``; names the stage that hangs.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        layouts: Sequence[Layout],
        mix: MixConfig,
        seed: int,
        *,
        shares: Mapping[str, float] | None = None,
        target: str | None = None,
        device: str | torch.device = "cpu",
        slots: int = 4,
        threads: int = 1,
        rank: int = 0,
        world: int = 1,
        timeout_s: float = 60.0,
    ) -> None:
        require(0 <= seed < 1 << 63, f"seed is {seed}; it must be in 0..2**63 - 1")
        require(slots >= 1 and threads >= 1, "a loader needs at least one slot and one thread")
        self._streams = streams_of(sources, shares, target)
        self._identity = (STATE_FORMAT, seed, rank, world)
        self._slots = slots
        check_ranks(self._streams, rank, world)
        rules = make_rules(self._streams, layouts, mix)
        where = torch.device(device)
        extension = native.module()
        self._packs: _Packs
        if extension is None:
            planner = Planner(self._streams, layouts, mix, seed, rank, world)
            self._packs = _ReferencePacks(planner, sources, layouts, where)
        else:
            args = planner_args(self._streams, rules, seed, rank, world)
            self._packs = _NativePacks(
                extension, args, sources, layouts, where, slots, threads, timeout_s
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
        """Give the slot of the last batch back before the next is asked for; the batch is invalid from here."""
        self._packs.release()

    def state_dict(self) -> dict[str, list[int]]:
        """The state after the last pack handed out; packs made ahead are not in it."""
        return {"planner": self._packs.state.tolist()}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Continue after the pack at which ``state_dict`` was taken; batches in use become invalid.

        Raises:
            ValueError: the state is of other data, another seed or another rank; the message says which.
        """
        values = check_state(state, self._streams, self._identity)
        self._packs.load(np.array(values, np.int64))

    def epochs(self) -> dict[str, float]:
        """Passes over each modality up to the last pack handed out, in epochs of all ranks together."""
        samples = self._streams_state()[:, 6].tolist()
        world = self._identity[3]
        return {
            s.name: n * world / len(s.lengths) for s, n in zip(self._streams, samples, strict=True)
        }

    def stats(self) -> dict[str, float]:
        """What the loader did since it was made.

        ``stall_s`` seconds the consumer waited; ``packs`` handed out; ``occupancy`` mean part of the slots
        that was ready when one was asked for; ``fill`` rows of samples per row; and since the start of the
        run (resumed ones included) ``samples/<modality>`` and ``tokens/<modality>``.
        """
        out = {
            "stall_s": self._stall_s,
            "packs": float(self._handed),
            "occupancy": self._occupied / max(1, self._handed * self._slots),
            "fill": self._valid_rows / max(1, self._rows),
        }
        for s, row in zip(self._streams, self._streams_state().tolist(), strict=True):
            out[f"samples/{s.name}"], out[f"tokens/{s.name}"] = float(row[6]), float(row[7])
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
