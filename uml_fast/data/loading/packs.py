"""Where packs come from: the extension's threads, or the readable reference.

A slot is one block of memory that holds a whole pack. The tensors of a native batch are views of
its slot, made once per slot and layout.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.loading.produce import Producers
from uml_fast.data.source import Samples, Source
from uml_fast.packing.layout import Rules, Stream
from uml_fast.packing.pack import PADDING, Layout, PackedBatch, pack_samples
from uml_fast.packing.schedule import STATE_HEADER, STREAM_STATE, Deal, Planner, stream_key
from uml_fast.runtime import native
from uml_fast.runtime.trace import CAPACITY, Event, Trace

logger = logging.getLogger("uml_fast")

_POLL_S = 0.2
"""Seconds between looks at Ctrl-C while a pack is awaited."""
_WARN_S = 10.0
"""Seconds without a pack after which the log says what the loader waits for."""
_JOB_BYTES = 1 << 18
"""Bytes of rows that a reader reads in one go, so that a pack keeps several readers busy."""

Times = dict[str, dict[str, float]]
"""Seconds since the start. ``stage``: of all slots by what happened to them; ``stall``: of the
consumer by what it waited for, a modality or a stage; ``read``, ``decode`` and ``assemble``: of
threads by modality."""


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
    layout: Layout,
    sources: Mapping[str, Samples],
    samples: Sequence[np.ndarray],
    epochs: Sequence[np.ndarray] | None = None,
) -> PackedBatch:
    """The pack of the given samples (per region int64 indices), in newly allocated memory.

    ``epochs`` as in ``Samples.read``. Samples that cannot be read become padding.
    """
    names = [r.name for r in layout.regions]
    chosen = dict(zip(names, samples, strict=True))
    visits = dict(zip(names, epochs, strict=True)) if epochs is not None else {}
    read = {name: _read(sources[name], index, visits.get(name)) for name, index in chosen.items()}
    batch = pack_samples(
        layout,
        {name: rows for name, (rows, _) in read.items()},
        {name: sources[name].labels[index].tolist() for name, index in chosen.items()},
    )
    for m, (name, index) in enumerate(chosen.items()):
        first = layout.slot_slice(m).start
        batch.sample_S[first : first + len(index)] = torch.from_numpy(index)
        for at in read[name][1]:
            batch.sample_S[first + at] = batch.label_S[first + at] = -1
            batch.modality_S[first + at] = PADDING
    return batch


def _read(
    source: Samples, index: np.ndarray, epochs: np.ndarray | None
) -> tuple[list[np.ndarray], list[int]]:
    """Rows of each sample, zeros where it cannot be read, and the places of those."""
    lengths = source.lengths_of(index)
    rows = np.zeros((int(lengths.sum()), source.row_elems), source.row_dtype)
    rejected = source.read(index, rows, epochs)
    parts = np.split(rows, np.cumsum(lengths)[:-1]) if len(index) else []
    for at in rejected:
        parts[at][:] = 0
    return parts, rejected


class Packs(Protocol):
    """Where packs come from: the native loader or the reference."""

    state: np.ndarray
    """int64, the planner's state after the last pack handed out."""

    def next(self) -> tuple[PackedBatch, int]: ...
    def release(self) -> None: ...
    def load(self, state: np.ndarray, deals: Sequence[Deal]) -> None: ...
    def ready(self) -> int: ...
    def times(self) -> Times: ...
    def close(self) -> None: ...


class ReferencePacks:
    """Packs made when they are asked for."""

    def __init__(
        self,
        planner: Planner,
        sources: Sequence[Samples],
        layouts: Sequence[Layout],
        device: torch.device,
    ):
        self._planner, self._layouts, self._device = planner, layouts, device
        self._sources = {s.name: s for s in sources}
        self.state = np.array(planner.save(), np.int64)

    def next(self) -> tuple[PackedBatch, int]:
        plan = self._planner.next()
        layout = self._layouts[plan.layout]
        batch = assemble(layout, self._sources, plan.samples, plan.epochs)
        self.state = np.array(self._planner.save(), np.int64)
        return batch.to(self._device), plan.layout

    def release(self) -> None:
        """Nothing to give back: each batch has its own memory."""

    def load(self, state: np.ndarray, deals: Sequence[Deal]) -> None:
        self._planner.load(state.tolist(), deals)
        self.state = state

    def ready(self) -> int:
        return 0

    def times(self) -> Times:
        """Not measured: nothing is made ahead."""
        return {}

    def close(self) -> None:
        """Nothing to stop."""


_STAGES = {
    "free": "free",
    "plan": "plan",
    "drain": "wait for the device",
    "assemble": "assemble",
    "read": "read",
    "upload": "upload",
    "ready": "ready",
    "held": "in use",
}
"""The native loader's phases of a slot as a person reads them."""


class _DeviceBytes:
    """A slot's memory on a CUDA device, in the form torch reads without copying."""

    def __init__(self, address: int, size: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class NativePacks:
    """Packs made ahead by the extension's threads."""

    def __init__(
        self,
        extension: ModuleType,
        args: dict[str, Any],
        sources: Sequence[Samples],
        layouts: Sequence[Layout],
        device: torch.device,
        slots: int,
        threads: int,
        readers: int,
        timeout_s: float,
        trace: Trace | None,
    ) -> None:
        self._layouts, self._device, self._timeout_s = layouts, device, timeout_s
        self._sources, self._readers, self._trace = sources, readers, trace
        self._names = [s.name for s in sources]
        cuda = native.cuda_module() if device.type == "cuda" else None
        self._is_direct = cuda is not None or device.type == "cpu"
        index = torch.cuda.current_device() if cuda and device.index is None else device.index
        self._loader = extension.Loader(
            **args,
            sources=[_source_args(s) for s in sources],
            device=extension.HostDevice() if cuda is None else cuda.CudaDevice(index),
            slots=slots,
            threads=threads,
            job_bytes=_JOB_BYTES,
        )
        self._is_read = any(not isinstance(s, Source) for s in sources)
        self._producers: Producers | None = None
        if trace is not None:
            self._loader.trace(CAPACITY)
            trace.add_recorder(self._events)
        self._on_cuda = cuda is not None
        self._batches: dict[tuple[int, int], PackedBatch] = {}
        self._held: int | None = None
        self.state = np.empty(STATE_HEADER + len(sources) * STREAM_STATE, np.int64)
        self._loader.save(self.state)

    def next(self) -> tuple[PackedBatch, int]:
        self.release()
        slot = self._acquire()
        self._held = slot
        self._loader.copy_state(slot, self.state)
        layout = self._loader.layout(slot)
        batch = self._batches.get((slot, layout))
        if batch is None:
            batch = self._batches[slot, layout] = self._view(slot, layout)
        return batch if self._is_direct else batch.to(self._device, non_blocking=False), layout

    def _acquire(self) -> int:
        if self._is_read and self._producers is None:
            self._producers = Producers(self._loader, self._sources, self._readers, self._trace)
        try:
            slot = self._await(
                "no pack", lambda: self._loader.acquire(_POLL_S, self._stream()), self._stage
            )
        except RuntimeError:
            if self._producers and self._producers.error:
                raise self._producers.error from None
            raise
        return int(slot)

    def _stage(self) -> str:
        words = re.sub(r"stream (\d+)", lambda m: self._names[int(m[1])], self._loader.stage())
        readers = f"\n{self._producers}" if self._producers else ""
        return f"the loader hangs in: {words}{readers}"

    def _await(self, what: str, ask: Callable[[], Any], why: Callable[[], str]) -> Any:
        """What ``ask`` gives once it is not None; a long wait is said with its reason."""
        start = time.monotonic()
        is_said = False
        while (answer := ask()) is None:
            waited = time.monotonic() - start
            if waited > self._timeout_s:
                raise TimeoutError(f"{what} for {self._timeout_s:g} s; {why()}")
            if waited > _WARN_S and not is_said:
                logger.warning("%s for %.0f s; %s", what, waited, why())
                is_said = True
        return answer

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
        i32, i64 = torch.int32, torch.int64
        return PackedBatch(
            layout, rows, offsets.view(i32), modality.view(i32), label.view(i32), sample.view(i64),
            position.view(i32), segment.view(i32),
        )  # fmt: skip

    def release(self) -> None:
        if self._held is not None:
            slot, self._held = self._held, None
            self._loader.release(slot, self._stream())

    def load(self, state: np.ndarray, deals: Sequence[Deal]) -> None:
        self._held = None
        self._await(
            "a read under way did not end",
            lambda: True if self._loader.drain(_POLL_S) else None,
            lambda: f"the state can only be loaded after it:\n{self._producers}",
        )
        self._loader.load(state, [(d.through, d.epochs, d.samples) for d in deals])
        if self._producers:
            self._producers.error = None
        self.state = state

    def ready(self) -> int:
        return self._loader.ready()

    def times(self) -> Times:
        totals = self._loader.totals()
        stall = {k: v for k, v in totals["stall"].items() if k != "read"}
        spent = self._producers.spent_s() if self._producers else {}
        return {
            "stage": {_STAGES[k]: v for k, v in totals["phase"].items()},
            "stall": {_STAGES[k]: v for k, v in stall.items()}
            | dict(zip(self._names, totals["produce_stall"], strict=True)),
            "read": {name: s for (name, stage), s in spent.items() if stage == "read"},
            "decode": {name: s for (name, stage), s in spent.items() if stage == "decode"},
            "assemble": dict(zip(self._names, totals["assemble"], strict=True)),
        }

    def _events(self) -> list[Event]:
        """The native loader's part of the trace."""
        out = []
        for phase, begin, end, pack, slot, stream in self._loader.events():
            place = {"pack": pack, "slot": slot}
            if stream >= 0:
                out.append(Event(self._names[stream], phase, phase, begin, end, place))
                continue
            out.append(Event("packs", f"slot {slot}", _STAGES[phase], begin, end, place))
        return out

    def close(self) -> None:
        self._loader.close()
        if self._producers:
            self._producers.close()


def _source_args(source: Samples) -> tuple[np.ndarray, int, np.ndarray]:
    """Rows as bytes (none where producers write them), bytes of a row, and labels."""
    row_bytes = source.row_elems * np.dtype(source.row_dtype).itemsize
    rows = np.empty(0, np.uint8)
    if isinstance(source, Source):
        rows = source.rows.view(np.uint8).reshape(-1)
    return rows, row_bytes, source.labels
