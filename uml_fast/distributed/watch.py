"""A rank that hangs is named, with the stacks of all, and the run ends so that it can restart.

A thread on every rank watches its own training: a step that takes ``timeout_s`` is a hang. It then
calls on all ranks through torchrun's store; each writes its stacks to ``hang/rank-<rank>.txt`` in
the trial's folder and says whether it only waits for others inside of torch.distributed. The ranks
that do not, or that do not answer at all, are the ones that hang. All end with status 1, and
``torchrun --max-restarts`` starts them again from the last checkpoint.

If the interpreter itself is stuck, so that no thread runs, faulthandler writes the stacks and ends
the process. What NCCL was doing is in its flight recorder (docs/distributed.md).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from uml_fast.distributed.ranks import Ranks
from uml_fast.runtime.launcher import tell_launcher

_BEAT_S = 0.5
_ANSWER_S = 5.0
"""Seconds that ranks have to answer when one of them calls a hang."""
_WAITS_IN = ("torch/distributed/", "torch/autograd/graph.py", "uml_fast/distributed/ranks.py")
"""Where the innermost frame of a rank lies that waits for others; backward runs their sums."""


class Watch:
    """Watches the ranks of one trial from ``tick`` to ``tick``; nothing where there is one rank.

    Args:
        ranks: those that train together.
        timeout_s: seconds without a tick that are a hang.
        folder: the trial's folder; ``hang`` in it takes the stacks.
    """

    def __init__(self, ranks: Ranks, timeout_s: float, folder: Path) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        self.folder = folder / "hang"
        self._key = f"hang {folder}"
        self._ticked: float | None = None
        self._what = ""
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self.ranks.world > 1 and self.ranks.store is not None:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def tick(self, what: str) -> None:
        """Say that there was progress, and ``what`` comes next."""
        self._what, self._ticked = what, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count: evaluation, for which the others wait as long as it takes."""
        self._ticked = None
        try:
            yield
        finally:
            self._ticked = time.monotonic()

    def _run(self) -> None:
        store = self.ranks.store
        assert store is not None
        try:
            while not self._over.wait(min(_BEAT_S, self.timeout_s / 4)):
                faulthandler.dump_traceback_later(self.timeout_s + 4 * _ANSWER_S, exit=True)
                ticked = self._ticked
                is_late = ticked is not None and time.monotonic() - ticked > self.timeout_s
                if is_late or store.check([self._key]):
                    store.set(self._key, "")
                    self._end()
        except RuntimeError:
            if not self._over.is_set():
                print("error: torchrun is gone, and its store with it", file=sys.stderr, flush=True)
                os._exit(1)

    def _end(self) -> None:
        """Write stacks, find out who hangs, and end this process."""
        store = self.ranks.store
        assert store is not None
        path = self.folder / f"rank-{self.ranks.rank}.txt"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        inner = frames[-1].filename.replace(os.sep, "/")
        answer = {
            "waits": any(place in inner for place in _WAITS_IN),
            "where": f"{self._what}, in {frames[-1].name} ({inner}:{frames[-1].lineno})",
        }
        keys = [f"{self._key} {rank}" for rank in range(self.ranks.world)]
        store.set(keys[self.ranks.rank], json.dumps(answer))
        deadline = time.monotonic() + _ANSWER_S
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(_BEAT_S / 10)
        answers = [json.loads(store.get(k)) if store.check([k]) else None for k in keys]
        if self.ranks.rank == next(r for r, a in enumerate(answers) if a is not None):
            explained = self._explain(answers)
            tell_launcher(explained)
            print(f"error: {explained}", file=sys.stderr, flush=True)
        time.sleep(_BEAT_S)  # the first to end takes the others with it
        os._exit(1)

    def _explain(self, answers: Sequence[dict[str, object] | None]) -> str:
        named = [
            f"rank {rank} hangs: {answer['where']}" if answer else f"rank {rank} does not answer"
            for rank, answer in enumerate(answers)
            if answer is None or not answer["waits"]
        ]
        if not named:
            named = [f"all ranks wait for each other: {answers[0] and answers[0]['where']}"]
        return (
            f"no progress for {self.timeout_s:.0f} s (--dist.timeout-s). {'; '.join(named)}. "
            f"Stacks of every rank: {self.folder}"
        )
