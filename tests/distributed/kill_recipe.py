"""A run of seconds on shards whose ranks say their process ids; they die on demand. For torchrun.

SHARDS is the folder of shards, PIDS one that takes a file of its steps for each process, SLOW_S
(optional) the seconds that a step takes longer. DIE_ONCE (optional) is a file: rank 1 makes it
before step 12 and gets SIGKILL, unless it is there already. SIGUSR1 ends a thread of the loader
wherever it is.
"""

import ctypes
import dataclasses
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tests.distributed.ranks_recipe import on_shards
from uml_fast.config import CheckpointConfig, RunConfig
from uml_fast.packing.pack import PackedBatch
from uml_fast.training.step import StepResult, TrainStep

_train = TrainStep.__call__


def _mortal(self: TrainStep, batch: PackedBatch, step: int, flags: Any = ()) -> StepResult:
    with (Path(os.environ["PIDS"]) / str(os.getpid())).open("a") as file:
        file.write(f"{step}\n")
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    once = os.environ.get("DIE_ONCE")
    if once and step == 12 and self.ranks.rank == 1 and not Path(once).exists():
        Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _train(self, batch, step, flags)


def _end_a_reader(*_: Any) -> None:
    readers = [t.ident for t in threading.enumerate() if t.name.startswith("uml-read")]
    victim = ctypes.c_ulong(random.choice(readers))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(victim, ctypes.py_object(SystemExit))


def small() -> RunConfig:
    """One trial of 30 steps, a checkpoint every 5."""
    TrainStep.__call__ = _mortal  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, _end_a_reader)
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    return dataclasses.replace(on_shards(), checkpoint=CheckpointConfig(every=5), steps=30)
