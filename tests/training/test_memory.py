"""What a run that ran out of memory is told to lower, against the planner's own numbers."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from tests.tiny import tiny
from uml_fast.config import MixConfig, RunConfig
from uml_fast.cost.scaling import BETWEEN, STATE_BYTES
from uml_fast.distributed import parallel
from uml_fast.distributed.ranks import ALONE, Ranks
from uml_fast.runtime.memory import memory_bytes
from uml_fast.training import memory
from uml_fast.training.start import build_model, plan_mix


def advice(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, room: float, ranks: Ranks = ALONE
) -> str:
    """What is said where memory is left for ``room`` of a pack's activations."""
    task = config.load(0, "uml")
    model = build_model(config, task, 0)
    _, layouts = plan_mix(config, "uml", task, 0)
    kept = memory.kept_bytes(config, layouts[-1], torch.float32)
    assert kept is not None
    states = STATE_BYTES * sum(p.numel() for p in model.parameters())
    total = (states + room * kept) * BETWEEN / 0.95
    monkeypatch.setattr(memory, "_memory_of", lambda _: (total + 2**33, 2**33, "cuda:0 (a chip)"))
    cpu = torch.device("cpu")
    with (
        pytest.raises(memory.OutOfMemory) as found,
        memory.explained(config, model, layouts, cpu, ranks, "ddp", lambda: "step 1"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return str(found.value)


def config(**mix: int) -> RunConfig:
    return dataclasses.replace(tiny(), mix=MixConfig(**mix), precision="fp32")


def test_the_packs_that_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = advice(config(token_budget=6400), monkeypatch, room=0.5)
    assert "8.0 of them taken by other processes" in said
    lower = re.search(r"Lower --mix.token-budget from 6,400 to (\d+)", said)
    assert lower is not None and 3100 <= int(lower[1]) <= 3200 and int(lower[1]) % 64 == 0
    said = advice(config(token_budget=6400), monkeypatch, room=3.0)
    assert (
        "from 6,400 to 4800 (--optim.accumulate 2 keeps" in said
    )  # the estimate says it fits, which it did not
    assert "--mix.batch from 40 to 20" in advice(config(batch=40), monkeypatch, room=0.51)


def test_the_advice_and_the_sharding_go_by_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    alone = memory_bytes(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory._memory_of(cpu)[0] == parallel.memory_bytes(cpu) == alone / 4


def test_where_the_model_does_not_fit_packs_are_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = advice(config(token_budget=640), monkeypatch, room=-0.01, ranks=Ranks(0, 8))
    assert "The model alone does not fit: --dist.strategy fsdp" in said and "Lower" not in said


def test_recomputing_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = config(token_budget=640)
    deep = dataclasses.replace(deep, backbone=dataclasses.replace(deep.backbone, layers=8))
    assert "or keep the packs and give --backbone.recompute" in advice(deep, monkeypatch, room=0.5)
    _, layouts = plan_mix(deep, "uml", deep.load(0, "uml"), 0)
    again = dataclasses.replace(deep.backbone, recompute=True)
    less = memory.kept_bytes(dataclasses.replace(deep, backbone=again), layouts[-1], torch.float32)
    whole = memory.kept_bytes(deep, layouts[-1], torch.float32)
    assert less is not None and whole is not None and less < whole / 3


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = config(token_budget=640)
    model = build_model(deep, deep.load(0, "uml"), 0)
    cpu = torch.device("cpu")
    with (
        pytest.raises(RuntimeError, match="shapes"),
        memory.explained(deep, model, (), cpu, ALONE, "ddp", lambda: "step 1"),
    ):
        raise RuntimeError("shapes do not match")
