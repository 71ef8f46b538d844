"""Where a trial's time went, as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Events are kept in rings, so a trace costs the same at any length of a run and shows its end: the
last ``CAPACITY`` events of each recorder. Times are nanoseconds of ``time.perf_counter_ns``, which
is also the clock of the native loader.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uml_fast.runtime.files import replace_file

CAPACITY = 1 << 16
"""Events that a recorder keeps."""


class Event(NamedTuple):
    """A stretch of time on one lane."""

    group: str
    """A modality, ``packs`` or ``compute``: a process in the viewer."""
    lane: str
    """A row of the group; stretches that overlap get rows of their own."""
    name: str
    begin_ns: int
    end_ns: int
    args: dict[str, int | str]


class Trace:
    """Collects the events of one trial, from any thread."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=CAPACITY)
        self._recorders: list[Callable[[], Sequence[Event]]] = []

    def add(
        self, group: str, lane: str, name: str, begin_ns: int, end_ns: int, **args: int | str
    ) -> None:
        """Note a stretch of time that has ended."""
        self._events.append(Event(group, lane, name, begin_ns, end_ns, args))

    def add_recorder(self, events: Callable[[], Sequence[Event]]) -> None:
        """Something that keeps its own last ``CAPACITY`` events and is asked when they are read."""
        self._recorders.append(events)

    @contextlib.contextmanager
    def span(self, name: str, **args: int | str) -> Iterator[None]:
        """The time inside, on the lane of the trial's own work."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add("compute", "compute", name, begin, time.perf_counter_ns(), **args)

    def events(self) -> list[Event]:
        """All events by their begin, cut to the time that no recorder has forgotten."""
        kept = [list(self._events), *(list(r()) for r in self._recorders)]
        start = max((min(e.end_ns for e in k) for k in kept if len(k) == CAPACITY), default=0)
        cut = (e._replace(begin_ns=max(e.begin_ns, start)) for k in kept for e in k)
        return sorted((e for e in cut if e.end_ns >= e.begin_ns), key=lambda e: e.begin_ns)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(chrome_trace(self.events())) + "\n")


def span(trace: Trace | None, name: str, **args: int | str) -> contextlib.AbstractContextManager:
    """``trace.span``, or nothing where there is no trace."""
    return _OFF if trace is None else trace.span(name, **args)


_OFF = contextlib.nullcontext()


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """Events, by their begin, in the Chrome trace format; times are microseconds from the first."""
    events = list(events)
    origin = events[0].begin_ns if events else 0
    rows: dict[tuple[str, str], list[int]] = {}
    groups: dict[str, int] = {}
    lines: list[dict[str, Any]] = []
    threads: dict[tuple[str, str, int], int] = {}
    for e in events:
        ends = rows.setdefault((e.group, e.lane), [])
        row = next((i for i, end in enumerate(ends) if end <= e.begin_ns), len(ends))
        ends[row : row + 1] = [e.end_ns]
        lines.append(
            {
                "ph": "X",
                "name": e.name,
                "cat": e.group,
                "pid": groups.setdefault(e.group, len(groups) + 1),
                "tid": threads.setdefault((e.group, e.lane, row), len(threads) + 1),
                "ts": (e.begin_ns - origin) / 1000,
                "dur": (e.end_ns - e.begin_ns) / 1000,
                "args": e.args,
            }
        )
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [*_names(groups, threads), *lines, *_ready(events, groups, origin)],
    }


def _names(groups: dict[str, int], threads: dict[tuple[str, str, int], int]) -> list[dict]:
    """Metadata that names groups and lanes; the trial's own work is first."""

    def meta(kind: str, pid: int, tid: int, **args: int | str) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}

    out = []
    for group, pid in groups.items():
        out.append(meta("process_name", pid, 0, name=group))
        first = {"compute": 0, "packs": 1}.get(group, 2)
        out.append(meta("process_sort_index", pid, 0, sort_index=first))
    for order, ((group, lane, row), tid) in enumerate(sorted(threads.items())):
        name = lane if row == 0 else f"{lane} ({row + 1})"
        out.append(meta("thread_name", groups[group], tid, name=name))
        out.append(meta("thread_sort_index", groups[group], tid, sort_index=order))
    return out


def _ready(events: Sequence[Event], groups: dict[str, int], origin: int) -> list[dict]:
    """The number of packs that wait for the trial, as a counter."""
    ready = [e for e in events if e.group == "packs" and e.name == "ready"]
    changes = sorted([(e.begin_ns, 1) for e in ready] + [(e.end_ns, -1) for e in ready])
    out = []
    count = 0
    for at, change in changes:
        count += change
        out.append(
            {
                "ph": "C",
                "name": "ready slots",
                "pid": groups["packs"],
                "tid": 0,
                "ts": (at - origin) / 1000,
                "args": {"ready": count},
            }
        )
    return out
