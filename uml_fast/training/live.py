"""The line that a person sees while a run goes on: how far it is, what is left, how fast it is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from uml_fast.runtime.progress import StatusLine, duration

_STALL_NAMED_PCT = 1.0
"""Stall from which on the line says its cause."""
_WARM_STEPS = 3
"""First steps of a trial in this process that no rate is taken of: they compile, allocate, and
start the loader (numbers with --compile: 15 s for the first one, 0.01 s for the others)."""
_MARK_S = 0.5
_WINDOW_S = (10.0, 600.0)
"""The rate is that of the last half of the trial's time, and of no less and no more than these."""


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    """One training to come: a mode, a seed and its number of steps."""

    mode: str
    seed: int
    steps: int


class TimeLeft:
    """Seconds that a run needs still, from the times of its steps, starts and evaluations.

    A trial's rate is that of its last steps (``_WINDOW_S``), without the first ones. A trial to
    come takes what one of its mode took: start, steps and evaluation; of a mode that was not seen
    yet, what the last one of any mode took.
    """

    def __init__(self, trials: Sequence[PlannedTrial]) -> None:
        self._trials = list(trials)
        self._index = -1
        self._idle_since = time.monotonic()
        self._marks: deque[tuple[int, float]] = deque()
        self._first = self._latest = (0, 0.0)
        self._from = 0
        self._start_s: dict[str, float] = {}
        self._rate_s: dict[str, float] = {}
        self._evaluation_s: dict[str, float] = {}

    def begin(self, index: int, step: int) -> None:
        """The trial ``index`` begins behind its first ``step`` steps."""
        now = time.monotonic()
        self._index, self._from, self._latest = index, step + _WARM_STEPS, (step, now)
        self._start_s[self._trials[index].mode] = now - self._idle_since
        self._marks.clear()

    def tick(self, step: int, now: float) -> None:
        """The trial has done its first ``step`` steps."""
        self._latest = step, now
        if step < self._from:
            return
        if not self._marks:
            self._first = step, now
        if not self._marks or now - self._marks[-1][1] >= _MARK_S:
            self._marks.append((step, now))
        least, most = _WINDOW_S
        window = min(most, max(least, (now - self._first[1]) / 2))
        while len(self._marks) > 2 and self._marks[1][1] <= now - window:
            self._marks.popleft()

    def end(self, is_evaluated: bool) -> None:
        """The trial has ended, after its evaluation or stopped before it."""
        self._idle_since = now = time.monotonic()
        mode, (step, last) = self._trials[self._index].mode, self._latest
        if self._marks and step > self._first[0]:
            self._rate_s[mode] = (last - self._first[1]) / (step - self._first[0])
        if is_evaluated:
            self._evaluation_s[mode] = now - last

    @property
    def is_whole(self) -> bool:
        """Whether an evaluation was seen, so that no part of the time left is unknown."""
        return bool(self._evaluation_s)

    def seconds(self) -> tuple[float, float] | None:
        """Seconds left of the trial and of the run; None before there is a rate."""
        if not self._marks or self._latest[0] <= self._marks[0][0]:
            return None
        (step_0, time_0), (step_1, time_1) = self._marks[0], self._latest
        rate = (time_1 - time_0) / (step_1 - step_0)
        now = self._trials[self._index]
        left = rate * max(0, now.steps - step_1) + _of(self._evaluation_s, now.mode)
        run = left
        for t in self._trials[self._index + 1 :]:
            run += t.steps * self._rate_s.get(t.mode, rate)
            run += _of(self._start_s, t.mode) + _of(self._evaluation_s, t.mode)
        return left, run


def _of(seconds: Mapping[str, float], mode: str) -> float:
    """What a mode took, or else the last one that was seen."""
    return seconds.get(mode, list(seconds.values())[-1] if seconds else 0.0)


class LiveLine:
    """One line about the trial under way, rewritten in a terminal, printed now and then elsewhere.

    Args:
        trials: all trials of the run in their order; empty: neither their number nor the time left
            is shown.
        stream: where the line goes.
    """

    def __init__(self, trials: Sequence[PlannedTrial], stream: TextIO) -> None:
        self._trials = list(trials)
        self._left = TimeLeft(trials)
        self._status = StatusLine(stream)
        self._index = -1
        self._name = ""
        self._latest: dict[str, Any] = {}
        self._start = (0, 0.0)

    def begin(self, mode: str, seed: int, resumed_step: int) -> None:
        """A trial begins, or goes on behind ``resumed_step`` steps.

        Raises:
            ValueError: it is none of the run's.
        """
        keys = [(t.mode, t.seed) for t in self._trials]
        if self._trials and (mode, seed) not in keys:
            raise ValueError(f"trial {mode} seed {seed} is not among the run's trials {keys}")
        self._index = keys.index((mode, seed)) if self._trials else -1
        self._name = f"{mode}-{seed}"
        self._latest = {"step": resumed_step}
        self._start = (resumed_step, time.monotonic())
        if self._trials:
            self._left.begin(self._index, resumed_step)
        self._status.restart()

    def tick(self, step: int) -> None:
        """``step`` steps of the trial are done."""
        now = time.monotonic()
        self._latest["step"] = step
        if self._trials:
            self._left.tick(step, now)
        if self._status.is_due(now):
            self._status.update(self._line())

    def update(self, record: Mapping[str, Any]) -> None:
        """A step was logged."""
        self._latest |= record
        self.tick(record["step"])

    def evaluating(self) -> None:
        """The steps are done; the trial is measured."""
        self._status.update(f"{self._head()}  {self._latest['step']} steps, evaluating")

    def end(self, result: Mapping[str, Any]) -> None:
        """The trial has ended; ``result``: what it came to, empty where it was stopped."""
        if self._trials:
            self._left.end(is_evaluated=bool(result))
        step, since = self._start
        parts = [
            self._head(),
            f"{self._latest['step'] - step} steps in {duration(time.monotonic() - since)}",
        ]
        if self._latest.get("loss") is not None:
            parts.append(f"loss {self._latest['loss']:.4g}")
        for name in ("head", "probe"):
            if result.get(name) is not None:
                parts.append(f"{name} {100 * result[name]:.1f} %")
        if result.get("error") is not None:
            parts.append(f"error {result['error']:.4g}")
        self._status.note("  ".join(parts))

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._status.note(text)

    def _head(self) -> str:
        place = "" if self._index < 0 else f"[{self._index + 1}/{len(self._trials)}] "
        return place + self._name

    def _line(self) -> str:
        r = self._latest
        parts = [self._head()]
        if self._index < 0:
            parts.append(f"step {r['step']}")
        else:
            parts.append(f"{r['step']}/{self._trials[self._index].steps}")
            left = self._left.seconds()
            if left is not None:
                more = "" if self._left.is_whole else "+"
                parts.append(f"left {duration(left[0])}{more}, run {duration(left[1])}{more}")
        return self._status.fit([*parts, *_figures(r)])


def _figures(r: Mapping[str, Any]) -> list[str]:
    """What was measured last, most wanted first."""
    out = []
    if r.get("loss") is not None:
        out.append(f"loss {r['loss']:.4g}")
    if r.get("tokens_per_s") is not None:
        out.append(f"{_count(r['tokens_per_s'])} tok/s")
    if r.get("mfu") is not None:
        out.append(f"MFU {100 * r['mfu']:.0f} %")
    if r.get("stall_pct") is not None:
        out.append(f"stall {r['stall_pct']:.1f} %{_stalled_on(r)}")
    if r.get("imbalance_pct") is not None:
        out.append(f"imbalance {r['imbalance_pct']:.1f} %")
    if r.get("comm_pct") is not None:
        out.append(f"exchange {r['comm_pct']:.0f} %")
    if r.get("memory_mib") is not None:
        out.append(f"{r['memory_mib'] / 1024:.2g} GiB")
    if (r.get("stages") or {}).get("ready") is not None:
        out.append(f"ready {r['stages']['ready']:.0f} %")
    return out


def _stalled_on(record: Mapping[str, Any]) -> str:
    """What most of a stall that matters was for: a modality, or a stage of the loader."""
    causes = record.get("stall_ms") or {}
    if record["stall_pct"] < _STALL_NAMED_PCT or not causes:
        return ""
    return f" ({max(causes, key=lambda name: causes[name])})"


def _count(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"
