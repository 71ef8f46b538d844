"""How much of training's time checkpoints take: the step loop held up, and steps slowed meanwhile.

    python -m pytest bench/saving.py     writes bench/results/saving_<machine>.json

``Trial.run`` itself trains with checkpoints every ``checkpoint.every`` steps, the default, on one
rank (whole checkpoints) and on two (sharded ones, FSDP2), a thread each. A table of many text
tokens makes the checkpoint large while steps stay short: of a model of that size on real data they
take longer, and saving a smaller part. ``held_pct`` is the time in which no step ran, from the
end of a step to the start of the next, for copies and for waiting; ``slowed_pct`` what steps took
longer than usual while a thread wrote (noise, of either sign, where they did not).
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import harness
from tests.distributed.on_ranks import run_ranks
from uml_fast.config import DistConfig, EvalConfig, MixConfig, ObjectiveConfig, RunConfig
from uml_fast.data.loading.loader import Loader
from uml_fast.data.synthetic import SyntheticConfig
from uml_fast.distributed.ranks import join_ranks
from uml_fast.model.transformer import TransformerConfig
from uml_fast.recipes.throughput import mixed
from uml_fast.runtime.stop import StopSignal
from uml_fast.training.checkpoint import newest_first
from uml_fast.training.log import SilentLog
from uml_fast.training.trial import Stopped, Trial

SECONDS, LEAST_SAVES = 40.0, 2
"""A run ends when it has trained this long and saved this often."""
ASKED_PCT = 1.0
WARM_STEPS = 20


def config(strategy: Any) -> RunConfig:
    """Two layers and a large table of text tokens: some 40 MB with the moments."""
    run = mixed()
    text = next(m for m in run.modalities if m.name == "text")
    wide = dataclasses.replace(text, vocabulary=12_000)
    return dataclasses.replace(
        run,
        modalities=tuple(wide if m is text else m for m in run.modalities),
        data=SyntheticConfig(shape="mixed", samples=400, held_out=12, classes=3),
        backbone=TransformerConfig(width=192, layers=2, heads=3, feed_forward=768),
        mix=MixConfig(token_budget=700),
        objective=ObjectiveConfig(classes=3),
        eval=EvalConfig(probe=False, every=0),
        dist=DistConfig(strategy=strategy),
        modes=("uml",),
        steps=10**6,
        log_every=10**6,
        device="cpu",
    )


def held_up(strategy: str, folder: Path) -> dict[str, Any]:
    """Times of this rank, in seconds."""
    with join_ranks("cpu", 120) as ranks:
        run = config(strategy)
        trial = Trial(run, "uml", 0, folder, ranks)
        ends: list[float] = []
        writing: list[bool] = []
        saves: list[float] = []
        save = trial._save

        def timed(loader: Loader) -> None:
            begin = time.perf_counter()
            save(loader)
            saves.append(time.perf_counter() - begin)

        def note() -> None:
            thread = trial.saver._thread
            ends.append(time.perf_counter())
            writing.append(thread is not None and thread.is_alive())

            if len(saves) >= LEAST_SAVES and ends[-1] - ends[0] > SECONDS:
                stop.received = signal.SIGTERM

        trial._save = timed  # type: ignore[method-assign]
        stop = StopSignal()
        with contextlib.suppress(Stopped):
            trial.run(stop, SilentLog(), after_step=note)
    took = np.diff(ends)[WARM_STEPS:]
    is_beside = np.array(writing[1:])[WARM_STEPS:]
    has_save = (np.arange(1, len(ends)) % run.checkpoint.every == 0)[WARM_STEPS:]
    usual = float(np.median(took[~is_beside & ~has_save]))
    slowed = took[is_beside & ~has_save]
    (newest, *_) = newest_first(folder / "checkpoints")
    files = list(newest.iterdir()) if newest.is_dir() else [newest]
    return {
        "bytes": sum(p.stat().st_size for p in files),
        "step_s": usual,
        "seconds": float(took.sum()),
        "saves_s": saves[:-1],
        "slowed_s": float((slowed - usual).sum()),
    }


def row(provider: str, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the file, of one rank's times."""
    return {
        "op": "save",
        "provider": provider,
        "checkpoint_mb": round(found["bytes"] / 1e6, 1),
        "every": config("ddp").checkpoint.every,
        "step_ms": round(1000 * found["step_s"], 2),
        "seconds": round(found["seconds"], 1),
        "saves": len(found["saves_s"]),
        **harness.quantiles(found["saves_s"]),
        "held_pct": round(100 * sum(found["saves_s"]) / found["seconds"], 3),
        "slowed_pct": round(100 * found["slowed_s"] / found["seconds"], 3),
    }


def test_checkpoints_take_less_than_a_hundredth(tmp_path: Path) -> None:
    ways = {"whole, one rank": (1, "ddp"), "in parts, two ranks (fsdp)": (2, "fsdp")}
    rows = []
    for i, (name, (world, strategy)) in enumerate(ways.items()):
        folder = tmp_path / str(i)
        found = run_ranks(held_up, world, tmp_path / "log", strategy, folder, timeout_s=600)
        rows.append(row(name, max(found, key=lambda f: sum(f["saves_s"]))))
    harness.write_rows(harness.RESULTS / f"saving_{harness.machine_name()}.json", rows)
    slow = {r["provider"]: r["held_pct"] for r in rows if r["held_pct"] > ASKED_PCT}
    if slow:
        pytest.fail(f"checkpoints hold training up for {slow} % of its time, 1 % is asked")
