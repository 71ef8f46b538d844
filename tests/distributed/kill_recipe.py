"""A run of seconds whose ranks say their process ids; one may kill itself once. For torchrun.

PIDS is a folder that takes a file of its steps for each process; DIE_ONCE (optional) a file: rank 1
makes it before step 12 and gets SIGKILL, unless it is there already.
"""

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.tiny import tiny
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


def small() -> RunConfig:
    """One trial of 30 steps, a checkpoint every 5."""
    TrainStep.__call__ = _mortal  # type: ignore[method-assign]
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    return dataclasses.replace(
        tiny(), modes=("uml",), seeds=1, checkpoint=CheckpointConfig(every=5), steps=30
    )
