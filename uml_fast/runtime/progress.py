"""A status line for a person: rewritten in place in a terminal, else a plain line now and then."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

TERMINAL_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 10.0
PLAIN_COLUMNS = 100


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


def duration(seconds: float) -> str:
    """Minutes and seconds, ``h:mm:ss`` from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
