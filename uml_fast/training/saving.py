"""Saving beside training: tensors are copied, then a thread writes them while steps go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from uml_fast.distributed.parallel import local, rows_of
from uml_fast.distributed.ranks import Ranks
from uml_fast.training import checkpoint
from uml_fast.training.checkpoint import CheckpointError

logger = logging.getLogger("uml_fast")

RETRY_S = (1.0, 4.0, 15.0, 40.0)
"""Seconds before the second try to write and those after it: a minute, in which a file server
comes back, and half of what schedulers leave between SIGTERM and SIGKILL."""
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank writes: all of a checkpoint, or its part of one."""

    tensors: dict[str, Tensor]
    """Its tensors, or its rows of them."""
    offsets: dict[str, int] = field(default_factory=dict)
    """First row of those that are shared among ranks."""
    rank: int = 0
    """Number of this part."""
    ranks: int = 1
    """Parts of the checkpoint; 1: one file with everything."""


def hold(tensors: Mapping[str, Tensor], ranks: Ranks) -> Held | None:
    """What this rank writes of the tensors that all ranks have; None: nothing.

    Of whole tensors the first rank writes all. Of shared ones each rank of the first group that
    holds a model writes its rows, and its first rank what is not shared.
    """
    shared = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
    if not shared:
        return Held(dict(tensors)) if ranks.is_first else None
    mesh = next(iter(shared.values())).device_mesh
    parts = mesh.size(mesh.ndim - 1)
    if ranks.rank >= parts:
        return None
    whole = {name: t for name, t in tensors.items() if name not in shared and ranks.is_first}
    own = {name: local(t) for name, t in shared.items()}
    return Held(whole | own, {name: rows_of(t)[0] for name, t in shared.items()}, ranks.rank, parts)


def load_on_all(
    folder: Path, weights: Mapping[str, Tensor], ranks: Ranks
) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a trial; of what ranks share, each reads its own rows.

    Whole models are read by the first rank and sent to the others. ``weights`` are the model's.

    Raises:
        CheckpointError: there are checkpoints and every one is broken.
    """
    shared = {name: rows_of(t) for name, t in weights.items() if isinstance(t, DTensor)}
    if not shared:
        return ranks.from_first(lambda: checkpoint.load_latest(folder))

    def part(name: str) -> tuple[int, int] | None:
        kind, _, rest = name.partition("/")
        return shared.get(rest.rpartition("/")[0] if kind == "optimizer" else rest)

    def read(path: Path) -> tuple[checkpoint.Checkpoint | None, str]:
        try:
            found, reason = checkpoint.load(path, part), ""
        except CheckpointError as error:
            found, reason = None, str(error)
        reasons = [r for r in ranks.gather(reason) if r]
        return None if reasons else found, "; ".join(reasons)

    return checkpoint.first_whole(
        folder, ranks.from_first(lambda: checkpoint.newest_first(folder)), read
    )


class Saver:
    """Writes the checkpoints of one trial, one at a time.

    Args:
        folder: directory of the trial's checkpoints.
        keep: checkpoints left there.
        ranks: those that train together; the first one makes parts a checkpoint.
        timeout_s: seconds that it waits for the parts of the others.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, timeout_s: float) -> None:
        self.folder, self.keep, self.ranks, self.timeout_s = folder, keep, ranks, timeout_s
        self.held_up_s = 0.0
        """Seconds that training waited for saving so far."""
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(self, step: int, held: Held, meta: Any) -> None:
        """Copy the tensors and begin to write; waits for the save before this one.

        Raises:
            CheckpointError: the save before this one failed, every time it was tried.
        """
        begin = time.perf_counter()
        self.wait()
        copied = {
            name: t.detach().to("cpu", copy=True).contiguous() for name, t in held.tensors.items()
        }
        kept = Held(copied, held.offsets, held.rank, held.ranks)
        self._thread = threading.Thread(
            target=self._run, args=(step, kept, meta), name=f"save step {step}", daemon=True
        )
        self._thread.start()
        self.held_up_s += time.perf_counter() - begin

    def check(self) -> None:
        """Raise CheckpointError if the last save has failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when what was begun is on the disk.

        Raises:
            CheckpointError: it could not be written, every time it was tried.
        """
        if self._thread is not None:
            begin = time.perf_counter()
            self._thread.join()
            self._thread = None
            self.held_up_s += time.perf_counter() - begin
        self.check()

    def _run(self, step: int, held: Held, meta: Any) -> None:
        for wait in (*RETRY_S, None):
            try:
                self._write(step, held, meta)
                return
            except CheckpointError as error:
                if wait is None:
                    self._error = error
                    return
                logger.warning("%s; trying again in %.0f s", error, wait)
                time.sleep(wait)

    def _write(self, step: int, held: Held, meta: Any) -> None:
        if held.ranks == 1:
            checkpoint.save(self.folder, step, held.tensors, meta, self.keep)
            return
        checkpoint.save_part(
            self.folder, step, held.tensors, held.offsets, meta, held.rank, held.ranks
        )
        what = f"part of {self.folder} {step}"
        self.ranks.done(what)
        if held.rank == 0:
            deadline = time.monotonic() + self.timeout_s
            while not self.ranks.is_done(what, held.ranks):
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{self.folder}: not all ranks wrote their part of step {step} within "
                        f"{self.timeout_s:.0f} s. Earlier checkpoints are intact"
                    )
                time.sleep(_POLL_S)
            checkpoint.commit(self.folder, step, held.ranks, self.keep)
