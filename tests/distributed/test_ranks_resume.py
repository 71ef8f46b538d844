"""Training on shards, killed with SIGKILL and continued by 2, 2, 1 and 3 ranks of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from uml_fast.data.loading.loader import streams_of
from uml_fast.experiment.run import read_config
from uml_fast.packing.resume import left_over
from uml_fast.training import checkpoint

ROOT = Path(__file__).parents[2]
PHASES = ((2, 11), (2, 15), (1, 19), (3, None))
"""Ranks, and the step before which all of them are killed; checkpoints are at 8, 12 and 16."""
SAVED = (0, 8, 12, 16, 24)


def train(ranks: int, backend: str, folder: Path, env: dict[str, str]) -> int:
    """Train as a person does; the exit status."""
    recipe = f"{Path(__file__).parent / 'ranks_recipe.py'}:small"
    run = ["-m", "uml_fast.train", recipe, "--out", str(folder), "--data.backend", backend]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(launch if ranks > 1 else []), *run],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env,
        cwd=folder.parent, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if "DIE_AT" not in env:
        assert done.returncode == 0, done.stderr
    return done.returncode


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines)}


def noted(record: Path, ranks: int, first: int, end: int) -> list[dict[str, list[int]]]:
    """Samples of the steps ``first`` to ``end`` on every rank."""
    lines = [x for r in range(ranks) for x in Path(f"{record}-{r}").read_text().splitlines()]
    steps = [json.loads(line) for line in lines]
    kept = [s["samples"] for s in steps if first <= s["step"] < end]
    assert len(kept) == ranks * (end - first)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["webdataset", "dali"])
def test_every_epoch_has_every_sample_once_over_kills_and_other_ranks(
    backend: str, shards: Path, tmp_path: Path
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    folder = tmp_path / "run"
    history, seen = [], []
    for k, (ranks, die_at) in enumerate(PHASES):
        record = tmp_path / f"samples-{k}"
        env = {"SHARDS": str(shards), "RECORD": str(record)}
        env |= {} if die_at is None else {"DIE_AT": str(die_at)}
        assert (train(ranks, backend, folder, env) == 0) == (die_at is None)
        history.append(losses(folder))
        seen += noted(record, ranks, SAVED[k], SAVED[k + 1])
    assert sorted(history[0]) == list(range(1, 12)) and sorted(history[-1]) == list(range(1, 25))
    # two ranks continued what two ranks had begun: the same losses, bit for bit
    assert {s: history[1][s] for s in history[0]} == history[0]
    assert all(history[k + 1][s] == history[k][s] for k in range(3) for s in range(1, SAVED[k + 1]))

    saved = checkpoint.load_latest(folder / "trials" / "uml-0" / "checkpoints")
    assert saved is not None and saved.step == 24
    state = saved.meta["loader"]
    assert len(state["planner"][-1]["ranks"]) == 3
    task = read_config(folder).load(0, "uml")
    streams = streams_of(task.train)
    assert len(streams[0].lengths) == 143 > 2 * len(streams[1].lengths)
    for stream, (through, _, left) in zip(streams, left_over(state, streams, 0), strict=True):
        assert through >= 1 and 0 < len(left) < len(stream.lengths)
        source = task.source(stream.name)
        keys = Counter(source.key(i) for samples in seen for i in samples[stream.name])
        keys.update(source.key(int(i)) for i in left)
        assert len(keys) == len(source) and set(keys.values()) == {through + 1}
