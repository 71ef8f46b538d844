"""A model in shards: what a rank holds, when, and how long ranks exchange it."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.on_ranks import run_ranks
from tests.distributed.test_distributed import pack, parts_of, step_config
from uml_fast.config import DistConfig, MixConfig, RunConfig
from uml_fast.cost.scaling import CHIPS, Cluster, Network, Stream, predict, stays_gathered
from uml_fast.distributed import parallel
from uml_fast.distributed.exchange import Clock
from uml_fast.distributed.parallel import local
from uml_fast.distributed.ranks import Ranks, join_ranks
from uml_fast.training.start import build_model
from uml_fast.training.step import TrainStep
from uml_fast.training.trial import Trial


def started(config: RunConfig, ranks: Ranks) -> tuple[TrainStep, Any]:
    """A step of ``config`` and this rank's part of a global batch."""
    task = config.load(0, "uml")
    model = build_model(config, task, seed=5)
    step = TrainStep(model, config, 0, ranks)
    names = [m.name for m in config.modalities]
    return step, pack(config, task, parts_of("samples", names, ranks.rank, ranks.world))


def held_bytes(memory: float, strategy: Any, shard_ranks: int = 0) -> dict[str, int]:
    """Bytes of parameters and moments of this rank: between steps, and weights behind forward."""
    parallel.memory_bytes = lambda device: memory
    with join_ranks("cpu", timeout_s=60) as ranks:
        dist = DistConfig(strategy=strategy, shard_ranks=shard_ranks)
        step, batch = started(dataclasses.replace(step_config("thawing"), dist=dist), ranks)
        out: dict[str, int] = {}

        def weights() -> int:
            return sum(local(p).nbytes for p in step.model.parameters())

        step._own.register_forward_hook(lambda *_: out.update(forward=weights()))
        for i in range(3):
            step(batch, i)
        moments = [x for s in step.optimizer.state.values() for x in s.values()]
        out["kept"] = weights() + sum(local(x).nbytes for x in moments)
        out["units"] = sum(
            p.nbytes for unit in step.model.units() for p in map(local, unit.parameters())
        )
        return out | {"weights": weights()}


def test_two_ranks_hold_half_and_gathered_weights_stay_where_they_fit(tmp_path: Path) -> None:
    """With little memory blocks are gathered again in backward, with much they stay."""
    (whole, _), (small, _), (large, other) = (
        run_ranks(held_bytes, 2, tmp_path / "log", memory, strategy)
        for memory, strategy in ((1e9, "ddp"), (1e3, "fsdp"), (1e9, "fsdp"))
    )
    assert large["kept"] == pytest.approx(whole["kept"] / 2, rel=0.1)
    assert other["kept"] == pytest.approx(whole["kept"] / 2, rel=0.1)
    assert small["kept"] == large["kept"]
    assert large["forward"] == whole["weights"]
    assert small["forward"] == pytest.approx(whole["weights"] - whole["units"] / 2, rel=0.01)
    assert whole["units"] > 0.2 * whole["weights"]


def test_groups_of_ranks_hold_a_model_together(tmp_path: Path) -> None:
    found = run_ranks(held_bytes, 4, tmp_path / "log", 1e9, "fsdp", 2)
    whole = run_ranks(held_bytes, 2, tmp_path / "whole", 1e9, "ddp")
    assert [f["kept"] for f in found] == pytest.approx([whole[0]["kept"] / 2] * 4, rel=0.1)


def test_the_plan_has_gathered_weights_where_they_stay() -> None:
    """16 bytes a parameter over the ranks and 4 of whole weights, in half of the memory."""
    assert stays_gathered(1_000_000, 8, 12e6) and not stays_gathered(1_000_000, 8, 11.9e6)
    rows = Stream(
        name="image", share=1, tokens=196, inputs=768, stored_bytes=1, raw_bytes=1, decode_s=0
    )  # fmt: skip
    network = Network(width=1024, layers=24, feed_forward=4096)
    chip = CHIPS["H200"]
    small = dataclasses.replace(chip, memory_gib=2.0)
    stay, again = (
        predict(network, (rows,), Cluster(chip=c, gpus=8, strategy="fsdp"), 4096)
        for c in (chip, small)
    )
    assert stay.states_bytes - again.states_bytes == 4 * stay.parameters
    assert again.communication_s == pytest.approx(1.5 * stay.communication_s)


def waits_for_slow_one() -> float:
    """Exchange of a rank in %, where the other one sleeps in each step."""
    with join_ranks("cpu", timeout_s=60) as ranks:
        config = step_config("classification")
        step, batch = started(dataclasses.replace(config, dist=DistConfig(strategy="fsdp")), ranks)
        step(batch, 0)
        step.exchange_pct(1.0)
        if ranks.rank == 1:
            step.model.backbone.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        begin = time.perf_counter()
        for i in range(1, 4):
            step(batch, i)
        found = step.exchange_pct(time.perf_counter() - begin)
        assert found is not None
        return found


def test_exchange_over_gloo_has_the_time_that_ranks_wait_in_it(tmp_path: Path) -> None:
    fast, slow = run_ranks(waits_for_slow_one, 2, tmp_path / "log")
    assert 40 < fast < 100 and 0 < slow < fast - 20


def test_exchange_on_a_gpu_is_read_when_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.ended = False
            made.append(self)

        def record(self) -> None:
            self.at = 10.0 * made.index(self)

        def query(self) -> bool:
            return self.ended

        def elapsed_time(self, other: Event) -> float:
            assert other.ended
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock()
    for _ in range(2):
        with clock.around(torch.device("cuda")):
            pass
    assert clock.take() == 0
    made[1].ended = True
    assert clock.take() == pytest.approx(0.01) and clock.take() == 0
    made[3].ended = True
    assert clock.take() == pytest.approx(0.01)


def compiled_steps(strategy: Any) -> list[list[float]]:
    """Losses of steps in which networks thaw, eager and compiled; ranks hold other modalities."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    out = []
    with join_ranks("cpu", timeout_s=300) as ranks:
        for is_compiled in (False, True):
            config = dataclasses.replace(
                step_config("thawing"), dist=DistConfig(strategy=strategy), compile=is_compiled
            )
            step, _ = started(config, ranks)
            task, names = config.load(0, "uml"), [m.name for m in config.modalities]
            parts = parts_of("modalities", names, ranks.rank, ranks.world)
            batch = pack(config, task, parts)
            out.append([float(step(batch, i).loss) for i in range(5)])
            assert step.recompiles == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_ranks_thaw_and_lack_modalities_too(strategy: str, tmp_path: Path) -> None:
    for eager, compiled in run_ranks(compiled_steps, 2, tmp_path / "log", strategy, timeout_s=400):
        assert compiled == pytest.approx(eager, rel=1e-5)


def mixed_policies(folder: Path) -> list[list[Any]]:
    """Losses, modalities of this rank's packs and weights of trials under each policy."""
    out = []
    with join_ranks("cpu", timeout_s=60) as ranks:
        for mix in (
            MixConfig(policy="alternate", token_budget=400),
            MixConfig(policy="warmup", token_budget=400, warmup_epochs=0.5),
        ):
            for strategy in ("ddp", "fsdp"):
                config = dataclasses.replace(
                    step_config("thawing"), mix=mix, modes=("uml",), steps=12,
                    dist=DistConfig(strategy=strategy),  # type: ignore[arg-type]
                )  # fmt: skip
                trial = Trial(config, "uml", 0, folder / f"{mix.policy}-{strategy}", ranks)
                held, losses = [], []
                with trial._loader(None) as loader:
                    for i in range(12):
                        batch, _ = next(loader)
                        held.append(tuple(r.name for r in batch.layout.regions))
                        losses.append(float(trial.train_step(batch, i).loss))
                weights = parallel.whole(dict(trial.model.named_parameters()))
                out.append([losses, held, {n: w.detach().numpy() for n, w in weights.items()}])
    return out


def test_policies_train_alike_in_whole_models_and_in_shards(tmp_path: Path) -> None:
    """Ranks hold packs of other modalities, and of other layouts, in the same step."""
    first, second = run_ranks(mixed_policies, 2, tmp_path / "log", tmp_path)
    for k, policy in enumerate(("alternate", "warmup")):
        (losses, held, weights), (sharded, _, parts) = first[2 * k : 2 * k + 2]
        assert sharded == pytest.approx(losses, rel=1e-5, abs=1e-5), policy
        assert second[2 * k + 1][0] == sharded
        for name, value in weights.items():
            np.testing.assert_allclose(parts[name], value, rtol=1e-3, atol=3e-5, err_msg=name)
        assert len(set(held)) > 1, f"{policy}: one layout only"
    apart = [a != b for a, b in zip(first[0][1], second[0][1], strict=True)]
    assert any(apart), "ranks never held other modalities in a step"
