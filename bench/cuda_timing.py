"""Timing on a CUDA device: events, a cold L2 cache, providers in turns, CUDA graphs.

Traps this file avoids:
- A pair of events around one launch on an idle stream times the host; here each round is queued
  behind a write of the whole L2 cache, and replayed from a CUDA graph where that is possible.
- Rounds of one provider leave its inputs in L2 for the next round; the write evicts them.
- Chips boost for milliseconds and settle later: warm-up goes by time, not by rounds.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

L2_BYTES = 256 << 20
"""More than the L2 cache of any chip at hand (H200: 50 MiB)."""
ROUNDS = 40
WARMUP_S = 0.3


def _waits(call: Callable[[], object]) -> bool:
    """Whether the call waits for the device, which no graph can hold.

    A capture that fails may leave torch's allocator in it, and then every later one fails.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a CUDA graph, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        # the outer stream comes back also where the capture fails
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def measure_cuda(
    calls: Mapping[str, Callable[[], object]],
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Seconds of ROUNDS rounds of each provider, taken in turns; and which ran as a CUDA graph."""
    steps, from_graph = {}, {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = None if _waits(call) else _captured(call)
        steps[name], from_graph[name] = graph or call, graph is not None
    cache = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARMUP_S:
        for step in steps.values():
            step()
        torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in steps}
    for turn in range(ROUNDS):
        for name in list(steps) if turn % 2 == 0 else list(reversed(steps)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            steps[name]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    seconds = {n: [a.elapsed_time(b) / 1000 for a, b in pairs] for n, pairs in events.items()}
    return seconds, from_graph


@functools.cache
def roofs() -> tuple[float, float]:
    """Measured bf16 FLOP/s of a large product and bytes/s of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = measure_cuda({"product": lambda: a @ a, "copy": lambda: target.copy_(source)})
    median = {n: sorted(s)[len(s) // 2] for n, s in seconds.items()}
    return 2 * 8192**3 / median["product"], 2 * source.numel() / median["copy"]


def roof_share(flops: float, size_bytes: float, time_ms: float) -> float:
    """Percent of the speed that the slower of products and memory allows."""
    flop_rate, byte_rate = roofs()
    return 100 * max(flops / flop_rate, size_bytes / byte_rate) * 1000 / time_ms


def peak_mib(call: Callable[[], object]) -> float:
    """Largest memory that a call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def gap_pct(events: Sequence[Mapping[str, Any]]) -> float:
    """Percent of the time from the first kernel to the last in which none ran.

    ``events`` are those of a Chrome trace of torch.profiler, times in microseconds. Uploads do not
    count: they overlap with kernels.
    """
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memset")
        or (e.get("cat") == "gpu_memcpy" and "HtoD" not in e["name"])
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 100 * (1 - busy / (end - spans[0][0]))


def measured_gap_pct(call: Callable[[], object], calls: int = 5) -> float:
    """``gap_pct`` of some calls in a row that nothing waits between."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return gap_pct(json.loads(path.read_text())["traceEvents"])
