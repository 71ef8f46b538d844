"""A status line for a person: rewritten in place in a terminal, else a plain line now and then."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

TERMINAL_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 10.0
PLAIN_COLUMNS = 100
QUIET_S = 2.0


class StatusLine:
    """Writes to ``stream`` (None: standard error). Ask ``is_due`` before making a text."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self._shown = -math.inf

    def is_due(self, now: float | None = None) -> bool:
        """Whether the line should be shown again; a True answer starts the next interval."""
        now = time.monotonic() if now is None else now
        interval = TERMINAL_INTERVAL_S if self.is_terminal else PLAIN_INTERVAL_S
        if now - self._shown < interval:
            return False
        self._shown = now
        return True

    def restart(self) -> None:
        """Make the line due at once."""
        self._shown = -math.inf

    def update(self, text: str) -> None:
        """Show the present state; in a terminal the next text takes its place."""
        self._show(text, keep=not self.is_terminal)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._show(text, keep=True)

    @property
    def columns(self) -> int:
        """Characters that a line has room for."""
        return shutil.get_terminal_size().columns - 1 if self.is_terminal else PLAIN_COLUMNS

    def fit(self, parts: Sequence[str]) -> str:
        """The parts side by side, without those of the later ones that there is no room for."""
        line, *more = parts
        for part in more:
            if len(line) + 2 + len(part) <= self.columns:
                line += f"  {part}"
        return line

    def _show(self, text: str, *, keep: bool) -> None:
        if self.is_terminal:
            text = "\r" + (text if keep else text[: self.columns]) + "\x1b[K"
        self.stream.write(text + ("\n" if keep else ""))
        self.stream.flush()


class LongWork:
    """Says how far some work is, if it turns out to take longer than ``QUIET_S``.

    Of several ranks the first one speaks.

    Args:
        what: what is done, and to what: "reading image samples".
        total: how many there are.
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._line = StatusLine(stream)
        self._begun = time.monotonic()
        self._is_mine = os.environ.get("RANK", "0") == "0"
        self._has_spoken = False

    def add(self, count: int) -> None:
        """``count`` more are done."""
        self._done += count
        now = time.monotonic()
        took = now - self._begun
        if not self._is_mine or took < QUIET_S or not self._line.is_due(now):
            return
        left = duration(took / self._done * (self._total - self._done))
        self._line.update(f"{self._what} {self._done:,}/{self._total:,}  left {left}")
        self._has_spoken = True

    def __enter__(self) -> LongWork:
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_spoken:
            took = duration(time.monotonic() - self._begun)
            self._line.note(f"{self._what} {self._done:,}/{self._total:,} in {took}")


def duration(seconds: float) -> str:
    """Minutes and seconds, ``h:mm:ss`` from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
