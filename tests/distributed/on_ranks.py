"""Run a function on several ranks, each a process forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.tiny",
        "uml_fast.train",
        "torch._dynamo.utils",
        "torch.utils.tensorboard",
        "sklearn.linear_model",
    ]
)
STORES: list[dist.TCPStore] = []


def start_ranks(
    function: Callable[..., Any], world: int, log: Path, *args: Any
) -> list[tuple[Any, Connection]]:
    """Start ``function(*args)`` with the environment torchrun gives; processes and their pipes.

    Rank r writes what it prints to ``<log>-r``.
    """
    # as torchrun does: the store outlives the ranks
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    out = []
    for rank in range(world):
        environ = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "OMP_NUM_THREADS": 1,
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0,
        }  # fmt: skip
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_enter, args=(environ, Path(f"{log}-{rank}"), theirs, function, args)
        )
        process.start()
        theirs.close()
        out.append((process, ours))
    return out


def run_ranks(
    function: Callable[..., Any], world: int, log: Path, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """What ``function(*args)`` returns on each rank.

    Raises:
        AssertionError: a rank failed or did not end in time; the message has what it printed.
    """
    started = start_ranks(function, world, log, *args)
    deadline = time.monotonic() + timeout_s
    try:
        results = []
        for rank, (_, pipe) in enumerate(started):
            assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} hangs"
            try:
                results.append(pipe.recv())
            except EOFError:
                raise AssertionError(Path(f"{log}-{rank}").read_text()) from None
        return results
    finally:
        end_ranks(started)


def end_ranks(started: list[tuple[Any, Connection]]) -> list[int]:
    """Exit codes of the processes, those that still run are killed after ten seconds."""
    for process, pipe in started:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        pipe.close()
    return [process.exitcode for process, _ in started]


def _enter(
    environ: dict[str, Any], log: Path, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update({name: str(value) for name, value in environ.items()})
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        pipe.send(function(*args))
    except Exception:
        traceback.print_exc()
        os._exit(1)
