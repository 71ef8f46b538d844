"""Ranks, launchers and the disk fail; runs go on, end alike, and leave no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from uml_fast.distributed.ranks import ALONE
from uml_fast.training import checkpoint, saving
from uml_fast.training.checkpoint import CheckpointError, load_latest
from uml_fast.training.saving import Held, Saver

ROOT = Path(__file__).parents[2]


class Torchrun:
    """A run of ``kill_recipe`` on two ranks."""

    def __init__(
        self, folder: Path, shards: Path, strategy: str, restarts: int = 0, **env: str
    ) -> None:
        self.pids = folder / "pids"
        self.pids.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", str(restarts), "-m", "uml_fast.train",
            f"{ROOT / 'tests/distributed/kill_recipe.py'}:small", "--out", str(folder / "run"),
            "--dist.strategy", strategy, "--dist.timeout-s", "40",
        ]  # fmt: skip
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environ |= {"PIDS": str(self.pids), "SHARDS": str(shards), **env}
        self.log = (folder / "log").open("a")
        self.process = subprocess.Popen(command, env=environ, stdout=self.log, stderr=self.log)

    def ranks(self) -> list[int]:
        """Process ids of ranks that are alive."""
        return [pid for pid in sorted(int(p.name) for p in self.pids.iterdir()) if is_alive(pid)]

    def trains(self) -> bool:
        """Whether every rank has begun a step."""
        return sum(bool(p.stat().st_size) for p in self.pids.iterdir()) >= 2

    def left(self) -> list[str]:
        """Processes of the run that are alive, whoever started them: their command lines."""
        mark = f"PIDS={self.pids}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_ours = mark in (place / "environ").read_bytes().split(b"\0")
                if is_ours and is_alive(int(place.name)):
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def end(self, timeout_s: float) -> int:
        code = self.process.wait(timeout_s)
        self.log.close()
        return code


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[float]:
    folder = tmp_path_factory.mktemp("unbroken")
    run = Torchrun(folder, shards, "ddp")
    assert run.end(120) == 0, (folder / "log").read_text()
    assert not run.left()
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_starts_a_killed_run_again(
    strategy: str, unbroken: list[float], shards: Path, tmp_path: Path
) -> None:
    once = tmp_path / "died"
    run = Torchrun(tmp_path, shards, strategy, restarts=1, DIE_ONCE=str(once))
    assert run.end(180) == 0, (tmp_path / "log").read_text()
    steps = sorted(p.read_text().split() for p in run.pids.iterdir())
    began, ended = ([str(i) for i in at] for at in (range(13), range(10, 30)))
    assert once.exists() and sorted([began, began, ended, ended]) == steps
    assert losses(tmp_path) == pytest.approx(unbroken, rel=1e-5)
    assert not run.left()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_kills_end_at_the_same_loss(
    seed: int, unbroken: list[float], shards: Path, tmp_path: Path
) -> None:
    """A rank or the launcher gets SIGKILL at a random time of the start or the training, or a
    thread of a rank's loader ends wherever it is; then the same command again."""
    rng = random.Random(seed)
    victim = ("rank", "launcher", "reader")[seed % 3]
    strategy = ("ddp", "fsdp")[seed // 3 % 2]
    run = Torchrun(tmp_path, shards, strategy, SLOW_S="0.2")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        run.trains() if victim == "reader" else len(run.ranks()) == 2
    ):
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 2 if victim == "reader" else 6))
    chosen = run.process.pid if victim == "launcher" else rng.choice(run.ranks())
    os.kill(chosen, signal.SIGUSR1 if victim == "reader" else signal.SIGKILL)
    begin = time.monotonic()
    assert run.end(60) != 0
    while run.left() and time.monotonic() < begin + 60:
        time.sleep(0.2)
    assert not run.left(), f"left over a minute after the {victim} was killed"
    log = (tmp_path / "log").read_text()
    assert (": thread uml-read-" in log) == (victim == "reader"), log
    again = Torchrun(tmp_path, shards, strategy)
    assert again.end(120) == 0, (tmp_path / "log").read_text()
    assert losses(tmp_path) == pytest.approx(unbroken, rel=1e-5)
    assert not again.left()


def test_a_full_disk_is_tried_again_and_then_stops_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    write = checkpoint.save

    def full(folder: Path, step: int, *args: object) -> Path:
        tried.append(step)
        if tried.count(step) <= (2 if step == 2 else 9):
            raise CheckpointError("No space left on device")
        return write(folder, step, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "RETRY_S", (0.0, 0.0))
    saver = Saver(tmp_path, 2, ALONE, 10.0)
    held = Held({"w": torch.arange(3.0)})
    saver.save(1, held, {})
    saver.wait()
    monkeypatch.setattr(checkpoint, "save", full)
    saver.save(2, held, {})
    saver.wait()
    assert tried == [2, 2, 2]
    saver.save(3, Held({"w": torch.full((3,), torch.nan)}), {})
    with pytest.raises(CheckpointError, match="No space left"):
        saver.wait()
    assert tried == [2, 2, 2, 3, 3, 3]
    newest = load_latest(tmp_path)
    assert newest is not None and newest.step == 2 and newest.tensors["w"].tolist() == [0, 1, 2]


def test_saving_copies_what_training_goes_on_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.save

    def slow(*args: object) -> Path:
        time.sleep(0.3)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", slow)
    weight = torch.arange(3.0)
    saver = Saver(tmp_path, 1, ALONE, 10.0)
    saver.save(1, Held({"w": weight}), {"a": 1})
    assert saver.held_up_s < 0.2
    weight.zero_()
    saver.wait()
    newest = load_latest(tmp_path)
    assert newest is not None and newest.tensors["w"].tolist() == [0, 1, 2]
