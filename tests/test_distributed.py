"""Several ranks train as one process would; they start, stop and fail together."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.on_ranks import end_ranks, run_ranks, start_ranks
from tests.tiny import tiny, tiny_prediction
from uml_fast import cli, train, trial
from uml_fast.checkpoint import CheckpointError
from uml_fast.config import OptimConfig, RunConfig
from uml_fast.data.packs import assemble
from uml_fast.distributed import ALONE, Ranks, RanksError, join_ranks
from uml_fast.meter import Lap, combine
from uml_fast.pack import Layout, PackedBatch, Region
from uml_fast.schedule import STATE_HEADER
from uml_fast.start import build_model
from uml_fast.step import TrainStep
from uml_fast.trial import Trial

SAMPLES = 12
"""Samples of each modality in the global batch."""


def step_config(kind: str, clip: float = 0.5) -> RunConfig:
    config = {"classification": tiny, "next_embedding": tiny_prediction}[kind]()
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, dropout=0.0),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, clip_norm=clip),
        modalities=tuple(
            dataclasses.replace(m, weight=1.0 + k) for k, m in enumerate(config.modalities)
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


def three_steps(kind: str, split: str) -> tuple[list[float], list[dict[str, float]], Any]:
    """Losses, losses of each modality and weights after three steps on the same global batch."""
    with join_ranks("cpu", timeout_s=60) as ranks:
        config = step_config(kind)
        task = config.load(0, "uml")
        model = build_model(config, task, seed=5 + ranks.rank)
        ranks.copy_first(list(model.state_dict().values()))
        step = TrainStep(model, config, 0, ranks)
        names = [m.name for m in config.modalities]
        batch = pack(config, task, parts_of(split, names, ranks.rank, ranks.world))
        results = [step(batch, i) for i in range(3)]
        return (
            [float(r.loss) for r in results],
            [{n: float(x) for n, x in r.parts.items()} for r in results],
            {n: p.detach().numpy() for n, p in model.named_parameters()},
        )


@pytest.mark.parametrize("split", ["samples", "modalities"])
@pytest.mark.parametrize("kind", ["classification", "next_embedding"])
def test_the_same_global_batch_gives_the_same_loss(kind: str, split: str, tmp_path: Path) -> None:
    losses, parts, weights = three_steps(kind, split)
    for world in (2, 4):
        results = run_ranks(three_steps, world, tmp_path / "log", kind, split)
        for other_losses, other_parts, other_weights in results:
            assert other_losses == results[0][0]
            assert other_losses == pytest.approx(losses, rel=1e-5)
            assert other_parts == [pytest.approx(p, rel=1e-5) for p in parts]
            for name, value in weights.items():
                np.testing.assert_array_equal(other_weights[name], results[0][2][name])
                np.testing.assert_allclose(other_weights[name], value, rtol=1e-3, atol=3e-5)


def one_modality() -> tuple[dict[str, float], list[str]]:
    """Losses of a step in which no rank has sounds, and the parameters that moved."""
    with join_ranks("cpu", timeout_s=60) as ranks:
        config = step_config("classification")
        task = config.load(0, "uml")
        model = build_model(config, task, seed=5)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step = TrainStep(model, config, 0, ranks)
        names = ["image", "text"] if ranks.rank else ["image"]
        batch = pack(config, task, {name: np.arange(4) for name in names})
        parts = step(batch, 0).parts
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        return {n: float(x) for n, x in parts.items()}, moved


def test_what_no_rank_has_a_gradient_of_stays(tmp_path: Path) -> None:
    """Neither weight decay nor momentum moves it, as in one process."""
    for parts, moved in run_ranks(one_modality, 2, tmp_path / "log"):
        assert np.isnan(parts["audio"]) and np.isfinite([parts["image"], parts["text"]]).all()
        assert not [n for n in moved if n.startswith(("modalities.audio", "modalities.features"))]
        assert any(n.startswith("modalities.text") for n in moved)


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
        whole = torch.tensor([ranks.rank], dtype=torch.int64)
        ranks.sum([*many, whole])
        first = torch.tensor([ranks.rank, 7])
        ranks.copy_first([first])
        return (
            [float(t.mean()) for t in many if len(t)], int(whole), first.tolist(),
            ranks.gather(f"rank {ranks.rank}"), ranks.from_first(lambda: ranks.rank),
            ranks.any(ranks.rank == 1), ranks.any(False), ranks.is_first,
        )  # fmt: skip


def test_ranks_exchange_values(tmp_path: Path) -> None:
    results = run_ranks(talk, 3, tmp_path / "log")
    names = ["rank 0", "rank 1", "rank 2"]
    for rank, result in enumerate(results):
        assert result == ([6.0] * 3, 3, [0, 7], names, 0, True, False, rank == 0)


def test_one_process_needs_no_ranks() -> None:
    with join_ranks("cpu") as ranks:
        assert ranks is ALONE and not torch.distributed.is_initialized()
    assert (ranks.any(True), ranks.gather(3), ranks.from_first(lambda: 4)) == (True, [3], 4)


def test_rates_of_ranks_add_up_and_shares_are_averaged() -> None:
    laps: list[Lap] = [
        {"tokens_per_s": 10.0, "stall_pct": 4.0, "stall_ms": {"text": 2.0}},
        {"tokens_per_s": 20.0, "stall_pct": 0.0, "stall_ms": {"image": 3.0}, "stages": {"plan": 8}},
    ]
    assert combine(laps) == {
        "tokens_per_s": 30.0, "stall_pct": 2.0, "stall_ms": {"text": 1.0, "image": 1.5},
        "stages": {"plan": 4.0},
    }  # fmt: skip


def run_config(folder: Path) -> RunConfig:
    return dataclasses.replace(tiny(), out=folder, seeds=1, modes=("uml",), steps=16)


def train_with(folder: Path, fault: str | None, rank: int, step: int) -> int:
    """Train as the command line does; what ``fault`` names happens on one rank at one step."""
    call = TrainStep.__call__

    def faulty(self: TrainStep, batch: PackedBatch, at: int) -> Any:
        if at == step and self.ranks.rank == rank:
            if fault == "raise":
                raise trial.TrainingError("the first error")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[str(fault)])
        if fault == "nan":
            batch.raw[-1][:] = float("nan")
        return call(self, batch, at)

    if fault is not None:
        TrainStep.__call__ = faulty  # type: ignore[method-assign]

    def main(_: list[str] | None) -> int:
        train.train(run_config(folder))
        return 0

    code = cli.run_main(main, None)
    assert code == 0, f"exit status {code}"
    return code


def test_a_rank_that_is_asked_to_stop_stops_all_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_ranks(train_with, 2, tmp_path / "a", folder, "stop", 1, 7) == [0, 0]
    assert not (folder / "summary.json").exists()
    saved = [p.name for p in (folder / "trials" / "uml-0" / "checkpoints").iterdir()]
    assert "step-000000008.safetensors" in saved
    assert run_ranks(train_with, 2, tmp_path / "b", folder, None, 0, 0) == [0, 0]
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(1, 17))
    whole = tmp_path / "whole"
    assert run_ranks(train_with, 2, tmp_path / "c", whole, None, 0, 0) == [0, 0]
    other = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in lines] == [r["loss"] for r in other]
    assert {r["ranks"] for r in lines} == {2}
    assert [r.get("val") for r in lines] == [r.get("val") for r in other]
    assert "report:" in (tmp_path / "c-0").read_text()
    assert (tmp_path / "c-1").read_text() == ""


@pytest.mark.parametrize("fault", ["raise", "kill"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all_and_is_shown_once(
    fault: str, rank: int, tmp_path: Path
) -> None:
    begin = time.monotonic()
    started = start_ranks(train_with, 2, tmp_path / "log", tmp_path / "run", fault, rank, 4)
    for process, _ in started:
        process.join(60)
    codes = end_ranks(started)
    assert time.monotonic() - begin < 60
    assert codes[rank] == (-signal.SIGKILL if fault == "kill" else 1) and codes[1 - rank] == 1
    text = [(tmp_path / f"log-{r}").read_text() for r in range(2)]
    if fault == "raise":
        assert "the first error" in text[rank] and "error:" not in text[1 - rank]
    else:
        assert "another rank is gone" in text[1 - rank]


def test_a_loss_that_is_not_finite_names_the_samples_of_all_ranks(tmp_path: Path) -> None:
    started = start_ranks(train_with, 2, tmp_path / "log", tmp_path / "run", "nan", -1, 0)
    for process, _ in started:
        process.join(60)
    assert end_ranks(started) == [1, 1]
    text = "".join((tmp_path / f"log-{r}").read_text() for r in range(2))
    assert text.count("the loss is nan at step 1") == 1
    named = json.loads((tmp_path / "run/trials/uml-0/nonfinite.json").read_text())["samples"]
    alone = Trial(run_config(tmp_path / "alone"), "uml", 0, tmp_path / "alone")
    with alone._loader(None) as loader:
        batch, _ = next(loader)
        count = int((batch.sample_S >= 0).sum())
    assert sum(len(keys) for keys in named.values()) > 1.5 * count


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


def test_a_checkpoint_of_other_data_is_refused_with_a_way_out(tmp_path: Path) -> None:
    config = dataclasses.replace(run_config(tmp_path), steps=6)
    made = Trial(config, "uml", 0, tmp_path)
    with made._loader(None) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
        state["planner"][0]["ranks"][0][STATE_HEADER + 1] += 1
        made._write(state)
        with pytest.raises(CheckpointError, match=r"other data for image: 41 samples.*--resume"):
            made._resume(loader)
