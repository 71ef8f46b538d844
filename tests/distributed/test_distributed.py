"""Several ranks train as one process would; they start, stop and fail together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed.on_ranks import run_ranks
from tests.model.test_encoder import network, own_networks
from tests.tiny import tiny, tiny_prediction
from uml_fast.config import DistConfig, MixConfig, OptimConfig, RunConfig
from uml_fast.data.loading.packs import assemble
from uml_fast.distributed import parallel
from uml_fast.distributed.parallel import local
from uml_fast.distributed.ranks import ALONE, Ranks, RanksError, join_ranks
from uml_fast.packing.pack import Layout, PackedBatch, Region
from uml_fast.training.meter import Lap, combine
from uml_fast.training.start import build_model
from uml_fast.training.step import TrainStep

SAMPLES = 12
"""Samples of each modality in the global batch."""


def thawing() -> RunConfig:
    """Networks of their own for images and texts; the images' and the shared one thaw."""
    shared = network(35, heads=5, layers=2, freeze=True, unfreeze_at=1, recompute=True)
    config = own_networks(backbone=shared)
    image, audio, text, features = config.modalities
    image = dataclasses.replace(image, encoder=network(24, layers=2, freeze=True, unfreeze_at=2))
    return dataclasses.replace(config, modalities=(image, audio, text, features))


def deaf() -> RunConfig:
    """Nothing in front of the shared network is trained but the stem of the sounds."""
    image, audio, text, features = own_networks().modalities
    frozen = network(35, heads=5, freeze=True)
    text = dataclasses.replace(text, encoder=frozen)
    return own_networks(
        modalities=(dataclasses.replace(image, encoder=frozen), audio, text, features)
    )


def step_config(kind: str, clip: float = 0.5) -> RunConfig:
    config = {
        "classification": tiny, "next_embedding": tiny_prediction, "thawing": thawing, "deaf": deaf
    }[kind]()  # fmt: skip
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, dropout=0.0),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, clip_norm=clip),
        mix=MixConfig(policy="alternate"),  # ranks may hold other modalities
        modalities=tuple(
            dataclasses.replace(
                m, weight=1.0 + k, encoder=m.encoder and dataclasses.replace(m.encoder, dropout=0.0)
            )
            for k, m in enumerate(config.modalities)
        ),
        precision="fp32",
    )


def pack(config: RunConfig, task: Any, samples: dict[str, np.ndarray]) -> PackedBatch:
    """A pack of the given samples of each modality; modalities without any have no region."""
    sources = {s.name: s for s in task.train}
    regions = []
    for name in samples:
        lengths = sources[name].lengths
        rows = int(lengths[:SAMPLES].sum())
        regions.append(
            Region(
                name=name, rows=rows + -rows % 8, slots=SAMPLES + 1, max_len=rows,
                row_elems=sources[name].row_elems, dtype=sources[name].row_dtype,
            )
        )  # fmt: skip
    return assemble(Layout(tuple(regions)), sources, [np.asarray(i) for i in samples.values()])


def parts_of(split: str, names: list[str], rank: int, world: int) -> dict[str, np.ndarray]:
    """The samples of a rank: uneven parts of each modality, or whole modalities of its own."""
    whole = np.arange(SAMPLES)
    if world == 1:
        return {name: whole for name in names}
    if split == "modalities":
        return {name: whole for k, name in enumerate(names) if k % world == rank}
    cuts = {2: [9], 4: [5, 6, 9]}[world]
    return {name: np.split(whole, cuts)[rank] for name in names}


def whole(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy()


CASES = (
    ("classification", "samples", DistConfig(strategy="ddp"), 3),
    ("classification", "modalities", DistConfig(strategy="ddp"), 50),
    ("next_embedding", "modalities", DistConfig(strategy="ddp"), 3),
    ("classification", "samples", DistConfig(strategy="fsdp"), 3),
    ("classification", "modalities", DistConfig(strategy="fsdp"), 50),
    ("next_embedding", "modalities", DistConfig(strategy="fsdp"), 3),
    ("next_embedding", "samples", DistConfig(strategy="fsdp", shard_ranks=2), 3),
    ("deaf", "modalities", DistConfig(strategy="fsdp"), 2),
    ("thawing", "modalities", DistConfig(strategy="ddp"), 4),
    ("thawing", "samples", DistConfig(strategy="fsdp"), 4),
    ("thawing", "modalities", DistConfig(strategy="fsdp", shard_ranks=2), 4),
)
"""Objective, what each rank has of the batch, how ranks hold the model, steps."""


def train_on(
    ranks: Ranks, kind: str, split: str, config: DistConfig, steps: int
) -> tuple[list[float], list[dict[str, float]], Any]:
    """Losses, losses of each modality and weights of steps on the same global batch."""
    run = dataclasses.replace(step_config(kind), dist=config)
    task = run.load(0, "uml")
    model = build_model(run, task, seed=5 + ranks.rank)
    ranks.copy_first(list(model.state_dict().values()))
    step = TrainStep(model, run, 0, ranks)
    names = [m.name for m in run.modalities]
    batch = pack(run, task, parts_of(split, names, ranks.rank, ranks.world))
    results = [step(batch, i) for i in range(steps)]
    assert any(isinstance(p, DTensor) for p in model.parameters()) == (
        config.strategy == "fsdp" and ranks.world > 1
    )
    return (
        [float(r.loss) for r in results],
        [{n: float(x) for n, x in r.parts.items()} for r in results],
        {n: whole(p) for n, p in model.named_parameters()},
    )


def train_all(cases: Sequence[tuple[str, str, DistConfig, int]]) -> list[Any]:
    """All cases on this rank; those of split ``samples`` gather weights again in backward."""
    out = []
    with join_ranks("cpu", timeout_s=60) as ranks:
        for case in cases:
            memory = 0.0 if case[1] == "samples" else 1e12
            parallel.memory_bytes = lambda device, memory=memory: memory
            out.append(train_on(ranks, *case))
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_global_batch_gives_the_same_loss(world: int, tmp_path: Path) -> None:
    check_alike(world, CASES, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_strategy_gives_the_same_loss_after_50_steps(world: int, tmp_path: Path) -> None:
    ways = [
        DistConfig(strategy="ddp"), DistConfig(strategy="fsdp"),
        DistConfig(strategy="fsdp", shard_ranks=2),
    ]  # fmt: skip
    kinds, splits = ("classification", "next_embedding", "thawing"), ("samples", "modalities")
    cases = [(kind, split, way, 50) for kind in kinds for split in splits for way in ways]
    check_alike(world, cases, tmp_path / "log")


def check_alike(world: int, cases: Sequence[tuple[str, str, DistConfig, int]], log: Path) -> None:
    """Check that ranks have the losses and weights of one process on the same global batches."""
    found = run_ranks(train_all, world, log, cases, timeout_s=600)
    for case, *results in zip(cases, *found, strict=True):
        losses, parts, weights = train_on(ALONE, *case)
        for other_losses, other_parts, other_weights in results:
            assert other_losses == results[0][0]
            assert other_losses == pytest.approx(losses, rel=1e-5, abs=1e-5)
            assert other_parts == [pytest.approx(p, rel=1e-5, abs=1e-5) for p in parts]
            for name, value in weights.items():
                np.testing.assert_array_equal(other_weights[name], results[0][2][name])
                atol = 3e-5 if len(losses) < 10 else 1e-3
                np.testing.assert_allclose(other_weights[name], value, rtol=1e-3, atol=atol)


def one_modality(ranks: Ranks, strategy: Any) -> tuple[dict[str, float], list[str], int]:
    """A step in which no rank has sounds: losses, parameters that moved, bytes of this rank."""
    config = dataclasses.replace(step_config("classification"), dist=DistConfig(strategy=strategy))
    task = config.load(0, "uml")
    model = build_model(config, task, seed=5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = TrainStep(model, config, 0, ranks)
    names = ["image", "text"] if ranks.rank else ["image"]
    batch = pack(config, task, {name: np.arange(4) for name in names})
    parts = step(batch, 0).parts
    moved = [n for n, p in model.named_parameters() if not np.array_equal(whole(p), before[n])]
    kept = [*model.parameters(), *(x for s in step.optimizer.state.values() for x in s.values())]
    size = sum(local(x).nbytes for x in kept)
    return {n: float(x) for n, x in parts.items()}, moved, size


def one_modality_both() -> list[Any]:
    with join_ranks("cpu", timeout_s=60) as ranks:
        return [one_modality(ranks, strategy) for strategy in ("ddp", "fsdp")]


def test_what_no_rank_has_a_gradient_of_stays(tmp_path: Path) -> None:
    """Neither weight decay nor momentum moves it, as in one process."""
    results = run_ranks(one_modality_both, 2, tmp_path / "log")
    for parts, moved, _ in (found for both in results for found in both):
        assert np.isnan(parts["audio"]) and np.isfinite([parts["image"], parts["text"]]).all()
        assert not [n for n in moved if n.startswith(("modalities.audio", "modalities.features"))]
        assert any(n.startswith("modalities.text") for n in moved)
    for (_, _, whole_bytes), (_, _, sharded_bytes) in results:
        assert sharded_bytes == pytest.approx(whole_bytes / 2, rel=0.1)


def test_dropout_differs_between_ranks_and_comes_back() -> None:
    config = tiny()
    task = config.load(0, "uml")
    names = [m.name for m in config.modalities]
    batch = pack(config, task, parts_of("samples", names, 0, 1))

    def loss(rank: int) -> float:
        return float(TrainStep(build_model(config, task, 5), config, 0, Ranks(rank))(batch, 0).loss)

    assert (
        loss(0)
        == loss(0)
        == float(TrainStep(build_model(config, task, 5), config, 0, ALONE)(batch, 0).loss)
    )
    assert loss(1) == loss(1) != loss(0)


def talk() -> tuple[Any, ...]:
    with join_ranks("cpu", timeout_s=60) as ranks:
        many = [torch.full((n,), float(ranks.rank + 1)) for n in (3, 0, 9_000_000, 5)]
        counts = torch.tensor([ranks.rank, 7])
        ranks.copy_first([*many, counts])
        summed = torch.tensor([ranks.rank, 1.0])
        ranks.start_sum(summed)()
        return (
            [float(t.mean()) for t in many if len(t)], summed.tolist(), counts.tolist(),
            ranks.gather(f"rank {ranks.rank}"), ranks.from_first(lambda: ranks.rank),
            ranks.any(ranks.rank == 1), ranks.any(False), ranks.is_first,
        )  # fmt: skip


def test_ranks_exchange_values(tmp_path: Path) -> None:
    results = run_ranks(talk, 3, tmp_path / "log")
    names = ["rank 0", "rank 1", "rank 2"]
    for rank, result in enumerate(results):
        assert result == ([1.0] * 3, [3.0, 3.0], [0, 7], names, 0, True, False, rank == 0)


def test_one_process_needs_no_ranks() -> None:
    with join_ranks("cpu", 60) as ranks:
        assert ranks is ALONE and not torch.distributed.is_initialized()
    assert (ranks.any(True), ranks.gather(3), ranks.from_first(lambda: 4)) == (True, [3], 4)


def test_rates_of_ranks_add_up_and_shares_are_averaged() -> None:
    laps: list[Lap] = [
        {"tokens_per_s": 10.0, "stall_pct": 4.0, "stall_ms": {"text": 2.0}},
        {"tokens_per_s": 20.0, "stall_pct": 0.0, "stall_ms": {"image": 3.0}, "stages": {"plan": 8}},
    ]
    assert combine(laps) == {
        "imbalance_pct": 25.0, "tokens_per_s": 30.0, "stall_pct": 2.0, "stages": {"plan": 4.0},
        "stall_ms": {"text": 1.0, "image": 1.5},
    }  # fmt: skip


def lonely() -> str:
    """Rank 1 does not come to the meeting."""
    try:
        with join_ranks("cpu", timeout_s=1) as ranks:
            if ranks.rank == 0:
                ranks.any(True)
            time.sleep(3)
    except RanksError as error:
        return str(error)
    return "waited"


def test_a_rank_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    assert "does not answer" in run_ranks(lonely, 2, tmp_path / "log")[0]
