"""Speed of the loader against a tuned DataLoader, plain webdataset and plain DALI.

    python -m pytest bench/loader.py               writes bench/results/loader_<machine>.json
    python -m pytest bench/loader.py -k image      some cases alone; the others' rows stay

A turn takes batches for about a second; providers take turns, and the order turns round every time.
What a provider has made ahead is taken before its turn is timed, so that a turn sees the rate at
which batches are made. The shards are synthetic (``bench/loader_data.py``), so that any clone
has them; they are in the page cache. What each provider does: ``bench/loader_providers.py``.

Headspace, memory and the start are measured in child processes of ``bench/loader_run.py``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import harness, loader_data
from bench import loader_providers as by
from bench.loader_providers import Part, Provider
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.runtime.machine import machine_info

TURN_S = 0.7
TURNS = 5
TUNE_S = 0.5
SETTLE_S = 0.15
"""Pause after a turn, so that what its workers still make ahead does not fall into the next."""
WORKERS = (0, 1, 2)
"""Numbers of workers that DataLoader and webdataset are tried with, at most one a core."""
CLOCK = harness.RecordedClock()
# webdataset leaves its shards to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

IMAGE32 = Part(
    "image32",
    ImageConfig(name="image", height=32, width=32, patch_height=8, patch_width=8),
    256,
    by.decode_simplejpeg,
)
IMAGE256 = Part(
    "image256", ImageConfig(name="image", height=256, width=256), 32, by.decode_simplejpeg
)
AUDIO = Part(
    "audio",
    AudioConfig(
        name="audio", sample_rate=loader_data.SAMPLE_RATE, row_samples=1280, frames=8, positions=64
    ),
    32,
    by.decode_sound,
)
TEXT = Part("text", TextConfig(name="text", vocabulary=256, positions=256), 256, by.decode_text)
FEATURES = Part(
    "features",
    FeaturesConfig(name="features", size=loader_data.FEATURES, positions=64),
    256,
    by.decode_npy,
)


def _less(part: Part, count: int) -> Part:
    return Part(part.data, part.config, count, part.decode)


CASES: dict[str, tuple[Part, ...]] = {
    "image 32x32": (IMAGE32,),
    "image 256x256": (IMAGE256,),
    "sounds": (AUDIO,),
    "text": (TEXT,),
    "features": (FEATURES,),
    "image 32x32 + text + sounds": (_less(IMAGE32, 128), _less(TEXT, 16), _less(AUDIO, 16)),
}


@dataclass(slots=True)
class Turn:
    """One timed turn of one provider."""

    seconds: float
    samples: int
    cpu_s: float


def cpu_seconds() -> float:
    """CPU time of this process and its children, living ones included."""
    ticks = os.sysconf("SC_CLK_TCK")
    done = os.times()
    total = done.user + done.system + done.children_user + done.children_system
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def take(provider: Provider, seconds: float) -> Turn:
    """Batches for about ``seconds``, after those that lay ready."""
    for _ in range(provider.ahead()):
        provider.next()
    cpu = cpu_seconds()
    start = time.perf_counter()
    samples = 0
    while (now := time.perf_counter()) - start < seconds or not samples:
        samples += provider.next()
    return Turn(now - start, samples, cpu_seconds() - cpu)


def tuned(make: Callable[[int], Provider]) -> tuple[Provider, int]:
    """The provider with the number of workers that is fastest here, and that number."""
    rates = {}
    for workers in WORKERS:
        provider = make(workers)
        take(provider, TUNE_S / 2)
        turn = take(provider, TUNE_S)
        rates[workers] = turn.samples / turn.seconds
        provider.close()
    best = max(rates, key=lambda w: rates[w])
    return make(best), best


def providers(parts: Sequence[Part]) -> tuple[dict[str, Provider], dict[str, int]]:
    """Every provider of a case, and the workers of those that have some.

    Those that fork come before those that start threads.
    """
    found: dict[str, Provider] = {}
    workers: dict[str, int] = {}
    makers: dict[str, Callable[[int], Provider]] = {
        "DataLoader": functools.partial(by.TorchLoader, parts),
        "webdataset": functools.partial(by.WebDataset, parts),
    }
    if any(p.decode is by.decode_simplejpeg for p in parts):
        slow = [
            Part(p.data, p.config, p.count, by.decode_pillow)
            if p.decode is by.decode_simplejpeg
            else p
            for p in parts
        ]
        makers["DataLoader, Pillow"] = functools.partial(by.TorchLoader, slow)
    for name, make in makers.items():
        found[name], workers[name] = tuned(make)
    if by.has_dali():
        found["DALI"] = by.Dali(parts)
        found["uml_fast, dali"] = by.UmlFast(parts, "dali")
    found["uml_fast"] = by.UmlFast(parts)
    return found, workers


def measure(found: dict[str, Provider]) -> dict[str, list[Turn]]:
    """Turns of each provider."""
    turns: dict[str, list[Turn]] = {name: [] for name in found}
    for name in found:
        take(found[name], TURN_S / 2)
    gc.collect()
    gc.disable()
    try:
        for i in range(TURNS):
            for name in list(found) if i % 2 == 0 else list(reversed(found)):
                turns[name].append(take(found[name], TURN_S))
                time.sleep(SETTLE_S)
    finally:
        gc.enable()
    return turns


def rows_of(case: str) -> list[tuple[list[float], dict[str, Any]]]:
    """Seconds per 1,000 samples of each turn, and the row, of each provider."""
    load_before = round(os.getloadavg()[0], 2)
    parts = CASES[case]
    found, workers = providers(parts)
    try:
        tokens = found["uml_fast"].tokens_per_sample  # type: ignore[attr-defined]
        turns = measure(found)
    finally:
        for provider in found.values():
            provider.close()
        found.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    ours = float(np.median([t.samples / t.seconds for t in turns["uml_fast"]]))
    out = []
    for provider, taken in turns.items():
        rates = [t.samples / t.seconds for t in taken]
        p20, p50, p80 = np.quantile(rates, (0.2, 0.5, 0.8))
        row = {
            "case": case,
            "provider": provider,
            "workers": workers.get(provider, by.THREADS),
            "batch": sum(p.count for p in parts),
            "samples_per_s": round(float(p50), 1),
            "samples_per_s_p20": round(float(p20), 1),
            "samples_per_s_p80": round(float(p80), 1),
            "tokens_per_s": round(float(p50) * tokens, 1),
            "cpu_s_per_1000": round(
                1000 * float(np.median([t.cpu_s / t.samples for t in taken])), 5
            ),
            "ours_times": round(ours / float(p50), 3),
            "rounds": len(taken),
            "threads": by.THREADS,
            "load_before": load_before,
        }
        out.append(([1000 * t.seconds / t.samples for t in taken], row))
    return out


@pytest.fixture(scope="session")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Collects the rows; at the end they replace those of the same cases in the machine's file."""
    torch.set_num_threads(1)
    collected: list[dict[str, Any]] = []
    yield collected
    path = harness.RESULTS / f"loader_{harness.machine_name()}.json"
    if collected:
        harness.merge_rows(path, collected, ("case",))
        from bench import tables

        print(f"\n\n{tables.loader_table(json.loads(path.read_text()))}")


@functools.lru_cache(maxsize=1)
def measured(case: str) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Rounds and row of each provider; the tests of a case follow each other."""
    return {row["provider"]: (times, row) for times, row in rows_of(case)}


PARAMETERS = [
    pytest.param(case, provider, id=f"{case}-{provider}".replace(" ", "_"))
    for case, parts in CASES.items()
    for provider in (
        "uml_fast",
        "DataLoader",
        *(["DataLoader, Pillow"] if parts[0].decode is by.decode_simplejpeg else []),
        "webdataset",
        "DALI",
        "uml_fast, dali",
    )
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "provider"), PARAMETERS)
def test_source(benchmark: Any, case: str, provider: str, rows: list[dict[str, Any]]) -> None:
    """Rounds are seconds per 1,000 samples."""
    found = measured(case)
    if provider not in found:
        pytest.skip(f"{provider} is not installed")
    times, row = found[provider]
    CLOCK.load(times)
    benchmark.group = case
    benchmark.extra_info.update(row, **machine_info())
    benchmark.pedantic(lambda: None, rounds=len(times))
    rows.append(row)


@pytest.mark.parametrize("case", ["headspace", "memory", "start"])
def test_run(case: str, rows: list[dict[str, Any]]) -> None:
    """What a whole run sees; each in a process of its own."""
    load_before = round(os.getloadavg()[0], 2)
    done = subprocess.run(
        [sys.executable, "-m", "bench.loader_run", case],
        cwd=harness.ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in (x for x in done.stdout.splitlines() if x.startswith("{")):
        row = {"case": case, "threads": by.THREADS, **json.loads(line)}
        rows.append({**row, "load_before": load_before})
