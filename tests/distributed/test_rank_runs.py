"""Runs on two ranks: they stop, go on, fail and hang together."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.on_ranks import end_ranks, run_ranks, start_ranks
from tests.tiny import tiny
from uml_fast import cli, train
from uml_fast.config import DistConfig, OptimConfig, RunConfig
from uml_fast.data.loading.loader import Loader
from uml_fast.data.source import DataError
from uml_fast.experiment.trained import load_model
from uml_fast.packing.pack import PackedBatch
from uml_fast.packing.schedule import STATE_HEADER
from uml_fast.training import trial
from uml_fast.training.checkpoint import CheckpointError
from uml_fast.training.step import TrainStep
from uml_fast.training.trial import Trial


def run_config(folder: Path, strategy: Any = "ddp") -> RunConfig:
    return dataclasses.replace(
        tiny(), out=folder, seeds=1, modes=("uml",), steps=16, dist=DistConfig(strategy=strategy)
    )


def train_with(folder: Path, fault: str | None, rank: int, step: int, strategy: str = "ddp") -> int:
    """Train as the command line does; what ``fault`` names happens on one rank at one step."""
    call = TrainStep.__call__

    def faulty(self: TrainStep, batch: PackedBatch, at: int, flags: Any = ()) -> Any:
        if at == step and self.ranks.rank == rank:
            if fault == "hang":
                time.sleep(60)
            if fault == "raise":
                raise trial.TrainingError("the first error")
            os.kill(
                os.getpid(),
                {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "freeze": signal.SIGSTOP}[
                    str(fault)
                ],
            )
        if fault == "nan":
            batch.raw[-1][:] = float("nan")
        return call(self, batch, at, flags)

    def unreadable(self: Loader) -> Any:
        if self._handed == step and self._rank == rank:
            raise DataError("the first error: images cannot be read")
        return following(self)

    following = Loader.__next__
    if fault == "data":
        Loader.__next__ = unreadable  # type: ignore[method-assign]
    elif fault is not None:
        TrainStep.__call__ = faulty  # type: ignore[method-assign]

    def main(_: list[str] | None) -> int:
        config = run_config(folder, strategy)
        if fault in ("hang", "freeze"):
            config = dataclasses.replace(config, dist=DistConfig(strategy=strategy, timeout_s=2))
        if fault == "other" and os.environ["RANK"] == "1":
            config = dataclasses.replace(config, optim=OptimConfig(lr=0.5))
        train.train(config)
        return 0

    code = cli.run_main(main, None)
    assert code == 0, f"exit status {code}"
    return code


def test_a_rank_that_is_asked_to_stop_stops_all_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_ranks(train_with, 2, tmp_path / "a", folder, "stop", 1, 7) == [0, 0]
    assert not (folder / "summary.json").exists()
    saved = [p.name for p in (folder / "trials" / "uml-0" / "checkpoints").iterdir()]
    assert "step-000000009.safetensors" in saved
    assert run_ranks(train_with, 2, tmp_path / "b", folder, None, 0, 0) == [0, 0]
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(1, 17))
    whole = tmp_path / "whole"
    assert run_ranks(train_with, 2, tmp_path / "c", whole, None, 0, 0) == [0, 0]
    other = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in lines] == [r["loss"] for r in other]
    assert {r["ranks"] for r in lines} == {2}
    assert all(0 <= r["imbalance_pct"] < 50 and set(r["wait_pct"]) == {"0", "1"} for r in lines)
    assert 0 < lines[-1]["comm_pct"] < 100 and 0 <= lines[-1]["save_pct"] < 50
    assert [r.get("val") for r in lines] == [r.get("val") for r in other]
    rates = json.loads((whole / "summary.json").read_text())["throughput"]
    assert rates["ranks"] == 2 and 0 <= rates["imbalance_pct"] < 50 and 0 < rates["comm_pct"] < 100
    assert "imbalance" in (tmp_path / "c-0").read_text()
    assert "report:" in (tmp_path / "c-0").read_text()
    assert (tmp_path / "c-1").read_text() == ""


def test_a_run_goes_on_under_another_strategy_and_on_fewer_ranks(tmp_path: Path) -> None:
    """Sharded and whole checkpoints are read by either; dropout is as in a run never stopped."""
    folder, whole_run = tmp_path / "run", tmp_path / "whole"
    checkpoints = folder / "trials" / "uml-0" / "checkpoints"
    for stop_at, strategy in ((4, "fsdp"), (8, "ddp"), (11, "fsdp")):
        log = tmp_path / f"{stop_at}"
        assert run_ranks(train_with, 2, log, folder, "stop", 0, stop_at - 1, strategy) == [0, 0]
        newest = checkpoints / f"step-{stop_at + 1:09d}"
        assert newest.is_dir() == (strategy == "fsdp")
    parts = sorted(p.name for p in newest.iterdir())
    assert parts == [f"part-0000{r}-of-00002.safetensors" for r in range(2)]
    shutil.copytree(folder, tmp_path / "alone")
    assert run_ranks(train_with, 2, tmp_path / "end", folder, None, 0, 0, "fsdp") == [0, 0]
    assert run_ranks(train_with, 2, tmp_path / "w", whole_run, None, 0, 0, "ddp") == [0, 0]
    lines, others = (
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (folder, whole_run)
    )
    assert [r["loss"] for r in lines] == pytest.approx([r["loss"] for r in others], rel=1e-5)
    assert all(0 < r["comm_pct"] < 100 for r in lines[12:])  # under fsdp
    assert [r.get("val") for r in lines] == [r.get("val") for r in others]
    results = [
        json.loads((f / "trials/uml-0/result.json").read_text()) for f in (folder, whole_run)
    ]
    assert results[0] == results[1]
    train.train(dataclasses.replace(run_config(tmp_path / "alone"), resume=str(tmp_path / "alone")))
    model, _, _ = load_model(tmp_path / "alone", "uml", 0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def train_slowly(folder: Path, strategy: str) -> None:
    """Train; in the first steps rank 1 is late, so rank 0 waits."""
    call = TrainStep.__call__

    def late(self: TrainStep, batch: PackedBatch, at: int, flags: Any = ()) -> Any:
        time.sleep(0.1 * (at < 7) * self.ranks.rank)
        return call(self, batch, at, flags)

    TrainStep.__call__ = late  # type: ignore[method-assign]
    config = run_config(folder, strategy)
    saved = dataclasses.replace(config.checkpoint, every=7)
    measured = dataclasses.replace(config.eval, every=7, probe=False)
    train.train(
        dataclasses.replace(config, checkpoint=saved, eval=measured, log_every=8, metric="head")
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_shares_of_time_are_of_the_whole_lap_around_a_checkpoint(
    strategy: str, tmp_path: Path
) -> None:
    run_ranks(train_slowly, 2, tmp_path / "log", tmp_path / "run", strategy)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    laps = [r for r in lines if "comm_pct" in r]
    assert [r["step"] for r in laps] == [8, 16]
    for lap in laps:
        assert 0 < lap["comm_pct"] <= 100 and all(0 <= w <= 100 for w in lap["wait_pct"].values())
    # seven of the eight steps are in the lap, although a checkpoint came behind them; in shards the
    # rank that is early waits where weights are gathered
    assert (laps[0]["comm_pct"] if strategy == "fsdp" else laps[0]["wait_pct"]["0"]) > 15


@pytest.mark.parametrize(("fault", "rank"), [("raise", 0), ("data", 1), ("kill", 0), ("kill", 1)])
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
    if fault != "kill":
        assert "the first error" in text[rank] and "error:" not in text[1 - rank]
    else:
        assert "another rank is gone" in text[1 - rank]


@pytest.mark.parametrize("fault", ["hang", "freeze"])
def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(fault: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    started = start_ranks(train_with, 2, tmp_path / "log", tmp_path / "run", fault, 1, 5, "fsdp")
    started[0][0].join(60)
    assert started[0][0].exitcode == 1 and time.monotonic() - begin < 60
    codes = end_ranks(started)
    text = "".join((tmp_path / f"log-{r}").read_text() for r in range(2))
    stacks = {p.name: p.read_text() for p in (tmp_path / "run/trials/uml-0/hang").iterdir()}
    assert "no progress for 2 s (--dist.timeout-s)" in text
    assert "rank 0 hangs" not in text and "_over_ranks" in stacks["rank-0.txt"]
    if fault == "hang":
        assert codes == [1, 1] and "rank 1 hangs: step 6, in faulty" in text
        assert "faulty" in stacks["rank-1.txt"]
    else:
        assert "rank 1 does not answer" in text


def test_ranks_that_were_started_otherwise_are_refused(tmp_path: Path) -> None:
    started = start_ranks(train_with, 2, tmp_path / "log", tmp_path / "run", "other", -1, 0)
    for process, _ in started:
        process.join(60)
    assert end_ranks(started) == [1, 1]
    text = "".join((tmp_path / f"log-{r}").read_text() for r in range(2))
    assert text.count("rank 1 does not run what rank 0 runs (option optim.lr: 0.001, ") == 1
    assert not (tmp_path / "run").exists()


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


def test_a_checkpoint_of_other_data_is_refused_with_a_way_out(tmp_path: Path) -> None:
    config = dataclasses.replace(run_config(tmp_path), steps=6)
    made = Trial(config, "uml", 0, tmp_path)
    with made._loader(None) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
        state["planner"][0]["ranks"][0][STATE_HEADER + 1] += 1
        made._write(state)
        made.saver.wait()
        with pytest.raises(CheckpointError, match=r"other data for image: 41 samples.*--resume"):
            made._resume(loader)
