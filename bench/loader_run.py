"""What a whole run sees of its loader; a child process of ``bench/loader.py`` each.

    python -m bench.loader_run headspace|memory|start        prints rows as JSON lines

Headspace: training steps of recipe ``folders`` on images, texts and sounds read from shards, in
turns with the same steps on packs repeated from memory, which is as fast as any loader could be;
after the first epoch of texts and sounds, which are decoded once.
Memory: growth over epochs. Start: from the command to the first step on 100,000 images.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import loader_data

MODALITIES = ("image", "text", "audio")
TURNS = 7
STEPS = 8
WINDOW = 64
"""Packs over which the mix is held to its ratio."""
EPOCHS = 50
SETTLED = 5
"""Epochs after which memory must not grow."""
START_SAMPLES = 100_000


def config_of(**places: str) -> Any:
    """Recipe ``folders`` on the shards of the modalities given."""
    from uml_fast.recipes.folders import folders

    config = folders()
    modalities = tuple(m for m in config.modalities if m.name in places)
    data = dataclasses.replace(config.data, **places)
    return dataclasses.replace(
        config, data=data, modalities=modalities, out=Path(tempfile.mkdtemp())
    )


def trial_of(config: Any) -> Any:
    """The trial that ``uml_fast.train`` would run first."""
    from uml_fast.training.trial import Trial

    return Trial(config, "uml", 0, Path(config.out) / "trial")


def headspace() -> dict[str, Any]:
    """Samples a second of training and of training on packs in memory."""
    import torch

    folder, kind = loader_data.prepared_folders()
    trial = trial_of(config_of(**{m: str(folder / m) for m in MODALITIES}))
    rates: dict[str, list[float]] = {"loader": [], "memory": []}
    stalls = []
    tokens = []
    with trial._loader(None) as loader:
        names = [s.name for s in trial.task.train]

        def counts() -> np.ndarray:
            stats = loader.stats()
            return np.array([stats[f"tokens/{name}"] for name in names])

        kept = []
        for _ in range(8):
            batch, _ = next(loader)
            kept.append(dataclasses.replace(batch, **{
                f.name: _copy(getattr(batch, f.name)) for f in dataclasses.fields(batch)
                if f.init
            }))  # fmt: skip
        while min(loader.epochs()[m] for m in ("text", "audio")) < 1:
            next(loader)  # from their second epoch on they are kept in memory
        packs = itertools.cycle(kept)
        step = itertools.count()

        def run(source: str) -> None:
            before, start = loader.stats()["stall_s"], time.perf_counter()
            for _ in range(STEPS):
                batch = next(loader)[0] if source == "loader" else next(packs)
                trial.train_step(batch, next(step))
            seconds = time.perf_counter() - start
            rates[source].append(STEPS / seconds)
            if source == "loader":
                stalls.append((loader.stats()["stall_s"] - before) / seconds)

        for source in rates:
            run(source)
        rates, stalls = {name: [] for name in rates}, []
        for turn in range(TURNS):
            for source in list(rates) if turn % 2 else list(reversed(rates)):
                run(source)
        for _ in range(4 * WINDOW):
            tokens.append(counts())
            next(loader)
    share = np.array([m.share for m in trial.config.modalities])
    windows = np.array(tokens)[WINDOW:] - np.array(tokens)[:-WINDOW]
    ratio = windows / windows.sum(1, keepdims=True)
    ours, ceiling = (float(np.median(rates[s])) for s in ("loader", "memory"))
    pairs = [a / b for a, b in zip(rates["loader"], rates["memory"], strict=True)]
    return {
        "files": kind,
        "steps_per_s": round(ours, 3),
        "steps_per_s_memory": round(ceiling, 3),
        "headspace_pct": round(100 * float(np.median(pairs)), 2),
        "stall_pct": round(100 * float(np.median(stalls)), 3),
        "mix_error_pct": round(100 * float(np.abs(ratio / (share / share.sum()) - 1).max()), 3),
        "rounds": TURNS,
        "threads": torch.get_num_threads(),
    }


def _copy(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(_copy(v) for v in value) if isinstance(value, tuple) else value


def rss_mib() -> float:
    """Memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def memory() -> dict[str, Any]:
    """Memory after each of ``EPOCHS`` epochs of every source."""
    from uml_fast.config import MixConfig
    from uml_fast.data.loading.loader import Loader, layouts_of

    folder, kind = loader_data.prepared_folders()
    config = config_of(**{m: str(folder / m) for m in MODALITIES})
    sources = config.load(0, "uml").train
    mix = MixConfig(token_budget=4096)
    growth = {}
    last = 0.0
    for source in sources:
        with Loader((source,), layouts_of((source,), mix), mix, seed=0) as loader:
            seen = []
            for epoch in range(1, EPOCHS + 1):
                while loader.epochs()[source.name] < epoch:
                    next(loader)
                seen.append(rss_mib())
        growth[source.name] = 100 * (max(seen[SETTLED:]) / seen[SETTLED - 1] - 1)
        last = max(seen)
    return {
        "files": kind,
        "epochs": EPOCHS,
        "growth_pct": round(max(growth.values()), 3),
        "peak_mib": round(last, 1),
    }


def start() -> dict[str, Any]:
    """Seconds from the start of the process to the end of the first step; median of three."""
    folder = loader_data.folder_of_small_images(START_SAMPLES)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "bench.loader_run", "first_step", str(folder)], check=True
        )
        seconds.append(time.perf_counter() - begin)
    return {
        "samples": START_SAMPLES,
        "first_step_s": round(float(np.median(seconds)), 3),
        "rounds": len(seconds),
    }


def first_step(folder: str) -> None:
    """One training step on the images of a folder, as ``uml_fast.train`` begins."""
    trial = trial_of(config_of(image=folder))
    with trial._loader(None) as loader:
        trial.train_step(next(loader)[0], 0)


def main() -> None:
    """Print the rows of one case."""
    if sys.argv[1] == "first_step":
        first_step(sys.argv[2])
        return
    case = {"headspace": headspace, "memory": memory, "start": start}[sys.argv[1]]
    print(json.dumps(case()))


if __name__ == "__main__":
    main()
