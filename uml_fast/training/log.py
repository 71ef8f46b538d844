"""What a run writes while it trains: metrics.jsonl, TensorBoard events, Weights & Biases if asked
for, and a progress line.

``metrics.jsonl`` has one JSON object a logged step: ``mode``, ``seed``, ``step``, and what was
measured then: ``loss``, ``losses`` (per modality), ``val`` (the metric on validation data),
``tokens_per_s``, ``samples_per_s``, ``mfu`` (fraction of the measured peak), ``stall_pct``,
``fill_pct``, ``memory_mib``, ``lr``, ``grad_norm``, the groups of numbers of ``Meter.lap``,
``save_pct`` (part of the time so far that training waited for checkpoints), and where there are
several ranks ``ranks``, ``imbalance_pct``, ``wait_pct`` (by rank) and ``comm_pct``
(docs/distributed.md). A resumed trial first drops what it will log again, so the file reads as if
the run had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from uml_fast.runtime.files import advice, replace_file
from uml_fast.training.live import LiveLine, PlannedTrial
from uml_fast.training.wandb_runs import WandbRuns

logger = logging.getLogger(__name__)


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
        raise RunFolderError(f"cannot write {path}: {e.strerror or e}; {advice(e)}") from e


@contextlib.contextmanager
def _naming(path: Path, action: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot {action} {path}: {error.strerror or error}; {advice(error)}"
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


class RunLog:
    """Log of one run. One trial at a time: ``begin``, ``write`` per logged step, ``end``.

    ``tick`` after every step and ``evaluating`` behind the last one are for the progress line.

    Args:
        folder: run folder, created if missing.
        trials: all trials in the order they are trained; empty: progress shows neither their number
            nor the time left.
        stream: where the progress line goes; None: standard error. In a terminal one line is
            rewritten, elsewhere a line is printed about every 10 s.
        wandb: takes every record as well.

    Raises:
        RunFolderError: here and in all methods, if the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        trials: Sequence[PlannedTrial] = (),
        *,
        stream: TextIO | None = None,
        wandb: WandbRuns | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._live = LiveLine(trials, sys.stderr if stream is None else stream)
        self._wandb = wandb
        self._file: FileIO | None = None
        self._unwritten = b""
        """Lines that wait for a disk that is full or away."""
        self._trial: tuple[str, int] | None = None
        self._events: Any = None
        self._has_tensorboard = True

    def begin(self, mode: str, seed: int, *, resumed_step: int = 0) -> None:
        """Start or continue a trial whose first ``resumed_step`` steps are done.

        Lines of this trial behind that step are dropped, and so is a torn last line.
        """
        self.end()
        self._live.begin(mode, seed, resumed_step)
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
            self._file = self.path.open("ab", buffering=0)
        self._trial = mode, seed
        self._events = self._open_events(mode, seed, resumed_step)
        if self._wandb is not None:
            self._wandb.begin(mode, seed)

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
        was_late = bool(self._unwritten)
        self._unwritten += (json.dumps(record) + "\n").encode()
        try:
            self._append(self._file)
        except OSError as error:
            if not was_late:
                logger.warning("%s: %s; its lines wait in memory", self.path, error.strerror)
        self._write_events(record)
        if self._wandb is not None:
            self._wandb.write(step, dict(_scalars(record)))
        self._live.update(record)

    def tick(self, step: int) -> None:
        """Say that the trial has done its first ``step`` steps, logged or not."""
        self._live.tick(step)

    def evaluating(self) -> None:
        """Say that the steps are done and the trial is measured."""
        self._live.evaluating()

    def end(self, result: Mapping[str, Any] | None = None) -> None:
        """End the trial; the next ``begin`` starts another. ``result``: of one that is whole."""
        if self._trial is None:
            return
        self._trial = None
        self._live.end(result or {})
        if self._wandb is not None:
            self._wandb.end({} if result is None else _numbers(result))
        if self._file is not None:
            file, self._file = self._file, None
            with _naming(self.path), file:
                self._append(file)
        if self._events is not None:
            with _naming(self.path.parent / "tensorboard"):
                self._events.close()
            self._events = None

    def note(self, text: str) -> None:
        """Print a line for the person without breaking the progress line."""
        self._live.note(text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an error under way is told, not what it keeps the log from
        with contextlib.nullcontext() if kind is None else contextlib.suppress(RunFolderError):
            self.end()

    def _append(self, file: FileIO) -> None:
        """Write what waits, as far as the disk takes it."""
        while self._unwritten:
            self._unwritten = self._unwritten[file.write(self._unwritten) :]

    def _write_events(self, record: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        try:
            for name, value in _scalars(record):
                self._events.add_scalar(name, value, record["step"])
        except OSError as error:  # its thread has ended
            self._events = None
            logger.warning("no more TensorBoard events of this trial: %s", error.strerror)

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

    def tick(self, step: int) -> None:
        """Nothing."""

    def evaluating(self) -> None:
        """Nothing."""

    def end(self, result: Mapping[str, Any] | None = None) -> None:
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


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of a trial, by names as those of logged records."""
    kept = {k: v for k, v in result.items() if k not in ("mode", "seed", "steps")}
    return {k: v for k, v in _scalars(kept) if isinstance(v, (int, float))}
