"""A torch profiler trace of some steps of a trial, with the step's phases and modalities named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SKIPPED, WARM, TAKEN = 5, 2, 5
"""Steps before the profiler, with it but not kept, and kept; the first ones compile, allocate."""


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A named part of a step in profiler traces, and in Nsight Systems (NVTX) on CUDA; 5 us."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if on_cuda:
            torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def profiled(path: Path | None, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Profile steps ``SKIPPED + WARM`` to ``+ TAKEN`` into ``path``; nothing where it is None.

    Yields what is to be called behind every step. ``say`` gets where the file is, or why there is
    none: a trial with fewer steps, a folder that cannot be written.
    """
    if path is None:
        yield lambda: None
        return
    written = []

    def write(profiler: torch.profiler.profile) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            say(f"profile of {TAKEN} steps: {path} (open it in ui.perfetto.dev)")
        except (OSError, RuntimeError) as error:
            say(f"the profile {path} could not be written: {error}")
        written.append(path)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=WARM, active=TAKEN, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write
    ) as profiler:
        yield profiler.step
    if not written:
        needed = SKIPPED + WARM + TAKEN
        say(f"no profile: the trial ended before its step {needed}; give it more --steps")
