"""How everything here is measured: rounds in turns, medians, rows that carry their conditions.

Traps this file avoids:
- A shared machine drifts by tens of percent within minutes, so providers take turns, one round
  each, and the order turns round every time; sequential blocks would measure the drift.
- The first rounds pay for allocation, page faults and lazy initialisation; they are thrown away.
- Means follow the worst neighbour on the machine; p20, p50 and p80 are reported.
- A collection in the middle of a round costs milliseconds; the collector is off meanwhile.
"""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.runtime.machine import machine_info

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("UML_BENCH_RESULTS", ROOT / "bench" / "results"))
"""Folder of the rows; UML_BENCH_RESULTS names another one."""


@functools.cache
def session_info() -> dict[str, Any]:
    """``machine_info`` as the session began: its own rows are no change of the code."""
    return machine_info()


def machine_name() -> str:
    """Short name of this machine, as used in file names."""
    machine = session_info()["machine"]
    chip = re.sub(
        r"\(.*?\)|\b(cpu|processor|nvidia)\b|@.*", " ", (machine["gpu"] or machine["cpu"]).lower()
    )
    features = [] if machine["gpu"] else machine["cpu_features"][-1:]
    return re.sub(r"[^a-z0-9]+", "_", " ".join([chip, *features, f"{machine['cores']}c"])).strip(
        "_"
    )


def measure(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: Mapping[str, int],
    warmup_rounds: int = 2,
    budget_s: float = 120.0,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each round of each provider, taken in turns.

    Args:
        steps: what one round of a provider does.
        rounds: rounds of each provider; one with fewer takes its turns spread over the whole run.
        warmup_rounds: rounds of each provider before the first that counts.
        budget_s: wall-clock seconds after which no turn begins, once every provider has three
            rounds; a busy machine then gives fewer rounds, which the rows say.
        synchronize: waits until the device is idle.
    """
    for step in steps.values():
        for _ in range(warmup_rounds):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    turns = max(rounds.values())
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        for turn in range(turns):
            has_enough = all(len(s) >= min(3, rounds[name]) for name, s in seconds.items())
            if has_enough and time.perf_counter() - begun > budget_s:
                break
            for name in list(steps) if turn % 2 == 0 else list(reversed(steps)):
                if (turn + 1) * rounds[name] // turns == turn * rounds[name] // turns:
                    continue
                synchronize()
                start = time.perf_counter()
                steps[name]()
                synchronize()
                seconds[name].append(time.perf_counter() - start)
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def measure_for(
    steps: Mapping[str, Callable[[], object]], *, seconds: float, most: int = 200
) -> dict[str, list[float]]:
    """``measure`` with the rounds that take each provider about ``seconds``; 5 to ``most``."""
    rounds = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
        rounds[name] = max(5, min(most, int(seconds / max(took, 1e-6))))
    return measure(steps, rounds=rounds, warmup_rounds=1)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    p20, p50, p80 = np.quantile(seconds, (0.2, 0.5, 0.8)) * 1000
    return {"p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3)}


class RecordedClock:
    """A timer that replays durations, so that pytest-benchmark reports rounds taken in turns.

    pytest-benchmark runs all rounds of one test before the next test, which the drift of a shared
    machine turns into a difference between providers. So ``measure`` runs them, and each test hands
    over its share.
    """

    __name__ = "recorded"

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: itertools.chain[float] = itertools.chain()

    def load(self, seconds: Sequence[float]) -> None:
        """Replay these rounds next."""
        self._durations = itertools.chain.from_iterable((0.0, s) for s in seconds)

    def __call__(self) -> float:
        self._now += next(self._durations)
        return self._now


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with machine, versions, commit and date as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"name": machine_name(), **session_info(), "date": date, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def merge_rows(path: Path, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """``write_rows``, keeping rows of the file whose ``keys`` none of the new ones has.

    Kept rows say which commit and date they are of.
    """
    kept = []
    if path.exists():
        old = json.loads(path.read_text())
        new = {tuple(row[k] for k in keys) for row in rows}
        kept = [
            {"commit": old["commit"], "date": old["date"], **row}
            for row in old["rows"]
            if tuple(row[k] for k in keys) not in new
        ]
    write_rows(path, [*kept, *rows])
