"""What a run writes while it trains: metrics.jsonl, TensorBoard events and a progress line.

``metrics.jsonl`` has one JSON object a logged step: ``mode``, ``seed``, ``step``, and what was
measured then: ``loss``, ``losses`` (per modality), ``val`` (the metric on validation data),
``tokens_per_s``, ``samples_per_s``, ``mfu`` (fraction of the measured peak), ``stall_pct``,
``fill_pct``, ``lr``, ``grad_norm``, the groups of numbers of ``Meter.lap``, ``save_pct`` (part of
the time so far that training waited for checkpoints), and where there are several ranks ``ranks``,
``imbalance_pct``, ``wait_pct`` (by rank) and ``comm_pct`` (docs/distributed.md). A resumed trial
first drops what it will log again, so the file reads as if the run had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from uml_fast.runtime.files import replace_file
from uml_fast.runtime.progress import StatusLine, duration

logger = logging.getLogger(__name__)

_STALL_NAMED_PCT = 1.0
"""Stall from which on the progress line says its cause."""


class RunFolderError(RuntimeError):
    """The run folder cannot be read or written; the message names the path and the reason."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is either the old one or the whole new one.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as e:
        raise RunFolderError(
            f"cannot write {path}: {e.strerror or e}; free space or choose another --out"
        ) from e


@contextlib.contextmanager
def _naming(path: Path, action: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(
            f"cannot {action} {path}: {reason}; free some space, check its permissions, "
            "or name another folder with --out"
        ) from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run in file order, without a torn last line; [] where there is no file.

    Raises:
        RunFolderError: metrics.jsonl cannot be read, or a line before the last is no JSON object.
    """
    return [record for _, record in _lines(folder / "metrics.jsonl")]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Complete lines of the file, each as text without its line end and as an object."""
    with _naming(path, "read"):
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
    out = []
    raw = text.split("\n")
    last = max((i for i, line in enumerate(raw) if line), default=0)
    for i, line in enumerate(raw):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            out.append((line, record))
        elif i != last:
            raise RunFolderError(
                f"{path} line {i + 1} is not a JSON object; take that line out or start anew with "
                "--resume never"
            )
    return out


@dataclass(frozen=True, slots=True)
class Trial:
    """One training: a mode, a seed and its number of steps."""

    mode: str
    seed: int
    steps: int


class RunLog:
    """Log of one run. One trial at a time: ``begin``, ``write`` per logged step, ``end``.

    Args:
        folder: run folder, created if missing.
        trials: all trials in the order they are trained; empty: progress shows neither their number
            nor the time left.
        stream: where the progress line goes; None: standard error. In a terminal one line is
            rewritten, elsewhere a line is printed about every 10 s.

    Raises:
        RunFolderError: here and in all methods, if the folder cannot be written.
    """

    def __init__(
        self, folder: Path, trials: Sequence[Trial] = (), *, stream: TextIO | None = None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._progress = _Progress(trials, sys.stderr if stream is None else stream)
        self._file: TextIO | None = None
        self._trial: tuple[str, int] | None = None
        self._events: Any = None
        self._has_tensorboard = True

    def begin(self, mode: str, seed: int, *, resumed_step: int = 0) -> None:
        """Start or continue a trial whose first ``resumed_step`` steps are done.

        Lines of this trial behind that step are dropped, and so is a torn last line.
        """
        self.end()
        self._progress.begin(mode, seed, resumed_step)
        lines = _lines(self.path)
        kept = [
            line
            for line, r in lines
            if (r.get("mode"), r.get("seed")) != (mode, seed) or r.get("step", 0) <= resumed_step
        ]
        with _naming(self.path):
            text = "".join(f"{line}\n" for line in kept)
            if not self.path.exists() or self.path.stat().st_size != len(text.encode()):
                replace_file(self.path, text)
            self._file = self.path.open("a", encoding="utf-8")
        self._trial = mode, seed
        self._events = self._open_events(mode, seed, resumed_step)

    def write(
        self,
        step: int,
        *,
        loss: float | None = None,
        losses: Mapping[str, float] | None = None,
        **metrics: float | Mapping[str, float] | None,
    ) -> None:
        """Log one step (1-based, the number of steps done) of the trial.

        Args:
            step: optimiser steps done.
            loss: the minimised total.
            losses: loss of each modality, without its weight.
            metrics: further numbers or groups of numbers; those not finite are written as null.
        """
        if self._trial is None or self._file is None:
            raise RuntimeError("RunLog.write outside of a trial; call begin first")
        mode, seed = self._trial
        record: dict[str, Any] = {"mode": mode, "seed": seed, "step": step}
        if loss is not None:
            record["loss"] = _finite(loss)
        if losses:
            record["losses"] = {name: _finite(value) for name, value in losses.items()}
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                record[name] = {k: _finite(v) for k, v in value.items()}
            else:
                record[name] = _finite(value)
        with _naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._events is not None:
            with _naming(self.path.parent / "tensorboard"):
                for name, value in _scalars(record):
                    self._events.add_scalar(name, value, step)
        self._progress.update(record)

    def end(self) -> None:
        """End the trial; the next ``begin`` starts another."""
        if self._trial is None:
            return
        self._trial = None
        self._progress.end()
        if self._file is not None:
            with _naming(self.path):
                self._file.close()
            self._file = None
        if self._events is not None:
            with _naming(self.path.parent / "tensorboard"):
                self._events.close()
            self._events = None

    def note(self, text: str) -> None:
        """Print a line for the person without breaking the progress line."""
        self._progress.note(text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _open_events(self, mode: str, seed: int, resumed_step: int) -> Any:
        if not self._has_tensorboard:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._has_tensorboard = False
            logger.warning("no TensorBoard events are written: pip install tensorboard")
            return None
        folder = self.path.parent / "tensorboard" / f"{mode}-seed{seed}"
        with _naming(folder):
            purge = resumed_step + 1 if folder.exists() else None
            return SummaryWriter(str(folder), purge_step=purge)


class SilentLog:
    """The log of a rank that leaves logging to the first one."""

    def begin(self, mode: str, seed: int, *, resumed_step: int = 0) -> None:
        """Nothing."""

    def write(self, step: int, **metrics: object) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name in ("mode", "seed", "step") or value is None:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}/{k}", v) for k, v in value.items() if v is not None)
        else:
            yield name, value


class _Progress:
    """The progress line. Time left follows the rate of the last steps; trials to come are estimated
    with the mean rate of ended trials of their mode, else with the present one."""

    def __init__(self, trials: Sequence[Trial], stream: TextIO) -> None:
        self.trials = list(trials)
        self.status = StatusLine(stream)
        self.index = -1
        self.name = ""
        self.latest: dict[str, Any] = {}
        self.recent: deque[tuple[int, float]] = deque(maxlen=32)
        self.start = (0, 0.0)
        self.seconds_per_step: dict[str, float] = {}

    def begin(self, mode: str, seed: int, resumed_step: int) -> None:
        keys = [(t.mode, t.seed) for t in self.trials]
        if self.trials and (mode, seed) not in keys:
            raise ValueError(f"trial {mode} seed {seed} is not among the run's trials {keys}")
        self.index = keys.index((mode, seed)) if self.trials else -1
        self.name = f"{mode} seed {seed}"
        self.latest = {"step": resumed_step, "mode": mode}
        self.start = (resumed_step, time.monotonic())
        self.recent.clear()
        self.recent.append(self.start)
        self.status.restart()

    def update(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self.latest |= record
        self.recent.append((record["step"], now))
        if self.status.is_due(now):
            self.status.update(self._line())

    def end(self) -> None:
        step, since = self.start
        took, done = time.monotonic() - since, self.latest["step"] - step
        if done > 0:
            self.seconds_per_step[self.latest["mode"]] = took / done
        loss = self.latest.get("loss")
        parts = [f"{self._head()}  {self.latest['step']} steps in {duration(took)}"]
        parts += [f"loss {loss:.4g}"] if loss is not None else []
        self.status.note("  ".join(parts))

    def note(self, text: str) -> None:
        self.status.note(text)

    def _head(self) -> str:
        return self.name if self.index < 0 else f"[{self.index + 1}/{len(self.trials)}] {self.name}"

    def _line(self) -> str:
        r = self.latest
        parts = [self._head()]
        if self.index < 0:
            parts.append(f"step {r['step']}")
        else:
            parts.append(f"step {r['step']}/{self.trials[self.index].steps}")
            left = self._left()
            if left is not None:
                parts.append(f"left {duration(left[0])}, run {duration(left[1])}")
        if r.get("loss") is not None:
            parts.append(f"loss {r['loss']:.4g}")
        if r.get("tokens_per_s") is not None:
            parts.append(f"{_count(r['tokens_per_s'])} tokens/s")
        if r.get("mfu") is not None:
            parts.append(f"MFU {100 * r['mfu']:.0f} %")
        if r.get("stall_pct") is not None:
            parts.append(f"stall {r['stall_pct']:.1f} %{_stalled_on(r)}")
        if r.get("imbalance_pct") is not None:
            parts.append(f"imbalance {r['imbalance_pct']:.1f} %")
        if r.get("comm_pct") is not None:
            parts.append(f"exchange {r['comm_pct']:.0f} %")
        if (r.get("stages") or {}).get("ready") is not None:
            parts.append(f"ready {r['stages']['ready']:.0f} %")
        return "  ".join(parts)

    def _left(self) -> tuple[float, float] | None:
        """Seconds left of the trial and of the run; None before there is a rate."""
        (step_0, time_0), (step_1, time_1) = self.recent[0], self.recent[-1]
        if step_1 <= step_0:
            return None
        rate = (time_1 - time_0) / (step_1 - step_0)
        trial = rate * max(0, self.trials[self.index].steps - step_1)
        later = self.trials[self.index + 1 :]
        return trial, trial + sum(t.steps * self.seconds_per_step.get(t.mode, rate) for t in later)


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
