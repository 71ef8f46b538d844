"""A flag to stop on: what SIGTERM and Ctrl-C become while a run trains."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag read between steps; a second Ctrl-C interrupts at once.

    The handlers that were there before come back on exit. Outside the main thread, where Python
    takes no handlers, the flag stays down.

    Example:
        with StopSignal() as stop:
            while step < steps and not stop:
                ...
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that arrived, or None."""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
