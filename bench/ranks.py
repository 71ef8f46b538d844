"""Two ranks with one thread each against one rank with one thread, on one machine over gloo.

    python -m pytest bench/ranks.py     writes bench/results/ranks_<machine>.json

A round starts one rank or two (torchrun's environment) on packs of their own of ragged data, and
takes the tokens per second of all ranks over the steps behind the first ones. Providers take turns.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from bench import harness
from tests.distributed.on_ranks import run_ranks
from uml_fast.config import DistConfig, MixConfig, ObjectiveConfig, RunConfig
from uml_fast.data.synthetic import SyntheticConfig
from uml_fast.distributed.ranks import Ranks, join_ranks
from uml_fast.model.transformer import TransformerConfig
from uml_fast.recipes.throughput import mixed
from uml_fast.training.trial import Trial

ROUNDS, WARM_STEPS, STEPS = 5, 3, 10
TIMES_ASKED = 1.7
"""Tokens per second of two ranks over those of one."""


def config(strategy: Any) -> RunConfig:
    """Ragged images, sounds, texts and features through a ViT-Ti of half the layers."""
    return dataclasses.replace(
        mixed(),
        data=SyntheticConfig(shape="mixed", samples=400, held_out=12, classes=3),
        backbone=TransformerConfig(width=192, layers=6, heads=3, feed_forward=768),
        mix=MixConfig(token_budget=4096),
        objective=ObjectiveConfig(classes=3),
        dist=DistConfig(strategy=strategy),
        modes=("uml",),
        device="cpu",
    )


def tokens_per_s(strategy: str, folder: Path) -> float:
    """Tokens per second of this rank."""
    with join_ranks("cpu", 120) as ranks:
        return _measured(config(strategy), folder, ranks)


def _measured(run: RunConfig, folder: Path, ranks: Ranks) -> float:
    trial = Trial(run, "uml", 0, folder, ranks)
    with trial._loader(None) as loader:
        for step in range(WARM_STEPS + STEPS):
            if step == WARM_STEPS:
                begin, before = time.perf_counter(), loader.stats()
            batch, _ = next(loader)
            trial.train_step(batch, step)
        seconds, stats = time.perf_counter() - begin, loader.stats()
    return sum(stats[k] - before[k] for k in stats if k.startswith("tokens/")) / seconds


def test_two_ranks_against_one(tmp_path: Path) -> None:
    ways = {"one": (1, "ddp"), "two, ddp": (2, "ddp"), "two, fsdp": (2, "fsdp")}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(ROUNDS):
        for name in list(ways)[:: 1 if i % 2 == 0 else -1]:
            world, strategy = ways[name]
            rates = run_ranks(tokens_per_s, world, tmp_path / "log", strategy, tmp_path / "run")
            found[name].append(sum(rates))
    rows = [
        {"op": "train", "provider": name, "ranks": ways[name][0], "tokens_per_s": sorted(rates)}
        for name, rates in found.items()
    ]
    median = {name: sorted(rates)[ROUNDS // 2] for name, rates in found.items()}
    ratio = median["two, ddp"] / median["one"]
    harness.write_rows(harness.RESULTS / f"ranks_{harness.machine_name()}.json", rows)
    if ratio < TIMES_ASKED:
        pytest.fail(f"two ranks do {ratio:.2f} of one's tokens per second, {TIMES_ASKED} are asked")
