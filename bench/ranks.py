"""Two ranks with one thread each against one rank with one thread, on one machine over gloo.

    python -m pytest bench/ranks.py     writes bench/results/ranks_<machine>.json

A round starts one rank or two (torchrun's environment) on packs of their own of ragged data, and
takes the tokens per second of all ranks over the steps behind the first ones. Providers take turns.
Beside that: bytes of weights and moments that a rank holds between steps, the part of its time that
exchanging took, and how far losses of 50 steps on the same global batch, uneven parts of it on each
rank, are from those of one rank (fp32).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from bench import harness
from tests.distributed.on_ranks import run_ranks
from tests.distributed.test_distributed import train_all
from uml_fast.config import DistConfig, MixConfig, ObjectiveConfig, RunConfig
from uml_fast.data.synthetic import SyntheticConfig
from uml_fast.distributed.parallel import local
from uml_fast.distributed.ranks import Ranks, join_ranks
from uml_fast.model.transformer import TransformerConfig
from uml_fast.recipes.throughput import mixed
from uml_fast.training.trial import Trial

ROUNDS, WARM_STEPS, STEPS = 5, 3, 10
TIMES_ASKED = 1.7
"""Tokens per second of two ranks over those of one."""
ALIKE = 1e-5
"""Largest relative difference of losses on the same global batch."""
LOSS_STEPS = 50


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


def measured(strategy: str, folder: Path) -> tuple[float, int, float | None]:
    """Of this rank: tokens per second, bytes of weights and moments, % of time for exchanging."""
    with join_ranks("cpu", 120) as ranks:
        return _measured(config(strategy), folder, ranks)


def _measured(run: RunConfig, folder: Path, ranks: Ranks) -> tuple[float, int, float | None]:
    trial = Trial(run, "uml", 0, folder, ranks)
    step = trial.train_step
    with trial._loader(None) as loader:
        for i in range(WARM_STEPS + STEPS):
            if i == WARM_STEPS:
                begin, before = time.perf_counter(), loader.stats()
                step.exchange_pct(1.0)
            batch, _ = next(loader)
            step(batch, i)
        seconds, stats = time.perf_counter() - begin, loader.stats()
    tokens = sum(stats[k] - before[k] for k in stats if k.startswith("tokens/"))
    moments = [x for state in step.optimizer.state.values() for x in state.values()]
    held = sum(local(x).nbytes for x in [*trial.model.parameters(), *moments])
    return tokens / seconds, held, step.exchange_pct(seconds)


def loss_rows(folder: Path) -> list[dict[str, Any]]:
    """Per way the loss after some steps, and its largest difference from one rank's, relative."""
    ways = {
        "one": (1, DistConfig()),
        "two, ddp": (2, DistConfig(strategy="ddp")),
        "two, fsdp": (2, DistConfig(strategy="fsdp")),
        "four, ddp": (4, DistConfig(strategy="ddp")),
        "four, fsdp": (4, DistConfig(strategy="fsdp")),
        "four, fsdp of two": (4, DistConfig(strategy="fsdp", shard_ranks=2)),
    }
    losses: dict[str, list[float]] = {}
    for name, (world, way) in ways.items():
        case = ("classification", "samples", way, LOSS_STEPS)
        losses[name] = run_ranks(train_all, world, folder / "log", [case])[0][0][0]
    return [
        {
            "op": "loss", "provider": name, "ranks": ways[name][0], "loss": found[-1],
            "apart": max(abs(a / b - 1) for a, b in zip(found, losses["one"], strict=True)),
        }
        for name, found in losses.items()
    ]  # fmt: skip


def test_two_ranks_against_one(tmp_path: Path) -> None:
    ways = {"one": (1, "ddp"), "two, ddp": (2, "ddp"), "two, fsdp": (2, "fsdp")}
    found: dict[str, list[list[tuple[float, int, float | None]]]] = {name: [] for name in ways}
    for i in range(ROUNDS):
        for name in list(ways)[:: 1 if i % 2 == 0 else -1]:
            world, strategy = ways[name]
            ranks = run_ranks(measured, world, tmp_path / "log", strategy, tmp_path / "run")
            found[name].append(ranks)
    rows: list[dict[str, Any]] = []
    for name, rounds in found.items():
        exchanged = [pct for ranks in rounds for _, _, pct in ranks if pct is not None]
        rows.append(
            {
                "op": "train", "provider": name, "ranks": ways[name][0],
                "tokens_per_s": sorted(sum(rate for rate, _, _ in ranks) for ranks in rounds),
                "state_bytes": max(held for ranks in rounds for _, held, _ in ranks),
                "exchange_pct": sorted(exchanged)[len(exchanged) // 2] if exchanged else None,
            }
        )  # fmt: skip
    losses = loss_rows(tmp_path)
    harness.write_rows(harness.RESULTS / f"ranks_{harness.machine_name()}.json", rows + losses)
    one, whole, shards = rows
    apart = max(row["apart"] for row in losses)
    assert apart <= ALIKE, f"losses differ by {apart:.1e} between numbers of ranks or strategies"
    part = shards["state_bytes"] / whole["state_bytes"]
    assert part == pytest.approx(0.5, rel=0.1), f"a rank of two has {part:.0%} of weights, moments"
    ratio = whole["tokens_per_s"][ROUNDS // 2] / one["tokens_per_s"][ROUNDS // 2]
    if ratio < TIMES_ASKED:
        pytest.fail(f"two ranks do {ratio:.2f} of one's tokens per second, {TIMES_ASKED} are asked")
