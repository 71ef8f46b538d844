"""What cannot be trained on two ranks: one clear message, no deadlock, no status 0."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.on_ranks import end_ranks, start_ranks
from uml_fast import cli, train
from uml_fast.data.source import DataError
from uml_fast.data.synthetic import SyntheticConfig
from uml_fast.distributed import ranks as ranks_module
from uml_fast.experiment import run as run_module
from uml_fast.packing.pack import PackedBatch
from uml_fast.training import checkpoint, saving
from uml_fast.training.step import TrainStep

ROOT = Path(__file__).parents[2]
TINY = f"{ROOT / 'tests/tiny.py'}:tiny"


def is_second() -> bool:
    return os.environ["RANK"] == "1"


def no_memory() -> None:
    """The second rank runs out of memory in its third step."""
    call = TrainStep.__call__

    def full(self: TrainStep, batch: PackedBatch, at: int, flags: Any = ()) -> Any:
        if at == 2 and is_second():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return call(self, batch, at, flags)

    TrainStep.__call__ = full  # type: ignore[method-assign]


def no_memory_in_forward() -> None:
    """As ``no_memory``, where the ranks also talk."""
    call = TrainStep._over_ranks

    def full(self: TrainStep, *rest: Any) -> Any:
        if is_second():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return call(self, *rest)

    TrainStep._over_ranks = full  # type: ignore[method-assign]


def defect() -> None:
    """The model of the second rank has an error."""

    def broken(self: TrainStep, *rest: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    if is_second():
        TrainStep._over_ranks = broken  # type: ignore[method-assign]


def no_data() -> None:
    """The second rank's machine does not have the files."""

    def missing(self: SyntheticConfig, *args: Any) -> Any:
        raise DataError("/data/shards/image: no such folder")

    if is_second():
        SyntheticConfig.load = missing  # type: ignore[method-assign]


def other_code() -> None:
    if is_second():
        run_module._code_digest = lambda: "another"


def no_nccl() -> None:
    torch.cuda.is_available = lambda: True
    dist.is_nccl_available = lambda: False


def port_in_use() -> None:
    """Rank 0 would open the store itself, as under srun without torchrun."""
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ["MASTER_PORT"] = os.environ["TAKEN_PORT"]


def full_disk() -> None:
    """From its second checkpoint on the second rank's disk is full."""
    write = checkpoint._write
    saving.RETRY_S = (0.0, 0.0)

    def full(path: Path, *rest: Any) -> None:
        if is_second() and path.parent.name != "step-000000005.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *rest)

    checkpoint._write = full


def disk_away() -> None:
    """The second rank cannot reach its disk twice for each of its checkpoints."""
    write = checkpoint._write
    saving.RETRY_S = (0.0, 0.0)
    tried: list[Path] = []

    def away(path: Path, *rest: Any) -> None:
        tried.append(path)
        if is_second() and tried.count(path) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        write(path, *rest)

    checkpoint._write = away


def nothing() -> None:
    pass


def command(before: Callable[[], None], taken_port: int, errors: str, arguments: list[str]) -> None:
    """The command line of a rank, in this process; ends it with its exit status."""
    ranks_module._END_S = 2.0
    os.environ["TAKEN_PORT"] = str(taken_port)
    os.environ["TORCHELASTIC_ERROR_FILE"] = errors + os.environ["RANK"]
    before()
    code = 1
    try:
        code = cli.run_main(train.main, arguments)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


CASES: tuple[tuple[str, Callable[[], None], list[str], str], ...] = (
    ("an option", nothing, ["--optim.lr", "-1"], "optim.lr is -1.0; it must be positive"),
    ("a recipe", nothing, [], "unknown recipe 'gausian'; did you mean gaussian"),
    (
        "groups", nothing, ["--dist.strategy", "fsdp", "--dist.shard-ranks", "3"],
        "2 ranks cannot be divided into groups of dist.shard_ranks 3",
    ),
    ("no CUDA", nothing, ["--device", "cuda"], "torch sees no CUDA device"),
    ("no NCCL", no_nccl, [], "this PyTorch has no NCCL"),
    ("other code", other_code, [], "rank 1 does not run what rank 0 runs (code of uml_fast"),
    ("no data", no_data, [], "/data/shards/image: no such folder"),
    ("memory", no_memory, [], "rank 1 has too little memory at step 3 of uml seed 0"),
    ("memory, forward", no_memory_in_forward, [], "Lower --mix.token-budget from 700 to 512"),
    (
        "full disk", full_disk, ["--dist.strategy", "fsdp"],
        "step-000000010.tmp/part-00001-of-00002.safetensors: No space left on device",
    ),
    ("a defect", defect, [], "mat1 and mat2 shapes cannot be multiplied"),
)  # fmt: skip
"""Name, what is done first on each rank, options, and what is said."""


@pytest.mark.parametrize(("name", "before", "options", "said"), CASES, ids=[c[0] for c in CASES])
def test_one_rank_says_what_is_wrong_and_all_fail(
    name: str,
    before: Callable[[], None],
    options: list[str],
    said: str,
    tmp_path: Path,
) -> None:
    text, told, codes = run_two(name, before, options, tmp_path)
    assert 0 not in codes
    if name == "a defect":
        assert told == [f"RuntimeError: {said} (its traceback is above)"]
        assert text.count(f"RuntimeError: {said}") == 1 and "another rank" not in text
        return
    assert "Traceback" not in text
    if name == "full disk":
        newest = checkpoint.load_latest(tmp_path / "run/trials/uml-0/checkpoints")
        assert newest is not None and newest.step == 5
        assert "trying again in 0 s" in text
        text = text[text.index("error: ") :]
    assert " ".join(text.split()).count(said) == 1 and len(told) == 1 and said in told[0]


def run_two(
    name: str,
    before: Callable[[], None],
    options: list[str],
    folder: Path,
    taken_port: int = 0,
) -> tuple[str, list[str], list[int]]:
    """What two ranks print, what torchrun is told, and their exit status; in less than a minute."""
    recipe = "gausian" if name == "a recipe" else TINY
    out = ["--modes", "uml", "--seeds", "1", "--out", str(folder / "run")]
    arguments = [recipe, *([] if name == "a recipe" else out), *options]
    begin = time.monotonic()
    started = start_ranks(
        command, 2, folder / "log", before, taken_port, str(folder / "error-"), arguments
    )
    for process, _ in started:
        process.join(60)
    codes = end_ranks(started)
    assert time.monotonic() - begin < 60
    text = "".join((folder / f"log-{rank}").read_text() for rank in range(2))
    told = [json.loads(p.read_text())["message"]["message"] for p in folder.glob("error-*")]
    return text, told, codes


def test_a_disk_that_is_away_for_a_while_stops_nothing(tmp_path: Path) -> None:
    options = ["--dist.strategy", "fsdp", "--steps", "12"]
    text, told, codes = run_two("away", disk_away, options, tmp_path)
    assert codes == [0, 0] and not told, text
    assert text.count("Stale file handle") == 2 * 3
    newest = checkpoint.load_latest(tmp_path / "run/trials/uml-0/checkpoints")
    assert newest is not None and newest.step == 12


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ["--dist.timeout-s", "3"]
        text, _, codes = run_two("port", port_in_use, options, tmp_path, port)
    assert 0 not in codes
    assert "EADDRINUSE" in text and "who listens there does not answer" in text
    assert (
        text.count(f"at 127.0.0.1:{port}") == 2
        and "name another one (torchrun --master-port)" in text
    )
