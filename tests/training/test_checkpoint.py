"""Checkpoints survive kills, full disks and damaged bytes; stop signals wait for a step's end."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uml_fast.runtime.stop import StopSignal
from uml_fast.training import checkpoint
from uml_fast.training.checkpoint import (
    CheckpointError,
    commit,
    load,
    load_latest,
    save,
    save_part,
)


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    """One tensor per dtype and layout that training state has."""
    return {
        "weight": torch.randn(3, 5),
        "half.weight": torch.randn(7).to(torch.bfloat16),
        "double": torch.tensor([1e-300, float("nan"), -0.0], dtype=torch.float64),
        "steps": torch.tensor(2**53 + 1, dtype=torch.int64),
        "scalar": torch.tensor(0.1),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(255, dtype=torch.uint8),
        "transposed": torch.arange(12, dtype=torch.int16).reshape(3, 4).t(),
        "strided": torch.arange(10, dtype=torch.int32)[::3],
        "empty": torch.empty(0, 4),
        "wide": torch.tensor([2**63], dtype=torch.uint64),
        "grad": torch.nn.Parameter(torch.ones(2, 2)),
    }


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        as_bytes = [
            t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)
        ]
        assert torch.equal(*as_bytes), name


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.iterdir())


def test_what_is_saved_comes_back_bit_equal(run_folder: Path) -> None:
    tensors = tensors_of_every_kind()
    meta = {"loss": 0.1 + 0.2, "best": float("inf"), "planner": [2**64 - 1, [], None], "a": "ä\n"}
    path = save(run_folder, 12, tensors, meta, keep=2)
    for got in (load(path), load_latest(run_folder)):
        assert got is not None and got.step == 12 and got.meta == meta
        assert_same(got.tensors, tensors)


def test_loaded_tensors_can_be_trained_on(run_folder: Path) -> None:
    got = load(save(run_folder, 1, {"w": torch.zeros(4)}, {}, keep=1)).tensors["w"]
    got.add_(1)
    assert got.sum() == 4


def test_any_safetensors_reader_opens_the_file(run_folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    tensors = {n: t for n, t in tensors_of_every_kind().items() if n != "wide"}
    path = save(run_folder, 3, tensors, {"a": 1}, keep=1)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "3" and json.loads(file.metadata()["meta"]) == {"a": 1}
        assert_same({n: file.get_tensor(n) for n in file.keys()}, tensors)  # noqa: SIM118


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sealed")
    tensors = {"w": torch.arange(6.0), "n": torch.tensor(3)}
    return save(folder, 7, tensors, {"cursor": 5}, keep=1).read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(
    sealed: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(sealed) - 1))
    damaged = bytearray(sealed)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"flipped\.safetensors"):
        load(path)


def test_any_truncation_and_any_extra_byte_is_found(sealed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.safetensors"
    for length in range(len(sealed)):
        path.write_bytes(sealed[:length])
        with pytest.raises(CheckpointError, match=r"torn\.safetensors"):
            load(path)
    path.write_bytes(sealed + b"\0")
    with pytest.raises(CheckpointError):
        load(path)
    path.write_bytes(sealed)
    assert load(path).step == 7


def test_torn_newest_falls_back_with_one_warning(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30, 40):
        save(run_folder, step, {"w": torch.full((3,), float(step))}, {"step": step}, keep=4)
    torn, flipped = (run_folder / f"step-{n:09d}.safetensors" for n in (40, 30))
    torn.write_bytes(torn.read_bytes()[:20])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x01")
    with caplog.at_level(logging.WARNING):
        got = load_latest(run_folder)
    assert got is not None and got.step == 20 and got.tensors["w"][0] == 20
    (record,) = caplog.records
    for part in (torn.name, "header is incomplete", flipped.name, "SHA-256", "step-000000020"):
        assert part in record.getMessage()


def test_all_broken_is_an_error_that_names_each(run_folder: Path) -> None:
    for step in (1, 2):
        save(run_folder, step, {}, {}, keep=2).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-000000002.*step-000000001.*Delete"):
        load_latest(run_folder)


def test_no_checkpoint_is_none_and_missing_file_an_error(run_folder: Path) -> None:
    assert load_latest(run_folder) is None
    assert load_latest(run_folder / "absent") is None
    with pytest.raises(CheckpointError, match="absent"):
        load(run_folder / "absent")


def test_pickles_are_never_run(run_folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (run_folder / "executed",))

    (run_folder / "step-000000009.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_latest(run_folder)
    assert not (run_folder / "executed").exists()


def test_retention_keeps_the_newest(run_folder: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(run_folder, step, {}, {}, keep=2)
        assert steps_in(run_folder) == [s for s in (step - 1, step) if s >= 1]


def test_resuming_behind_a_torn_file_never_loses_the_good_one(run_folder: Path) -> None:
    save(run_folder, 400, {}, "good", keep=2)
    save(run_folder, 500, {}, "torn", keep=2).write_bytes(b"torn")
    save(run_folder, 450, {}, "resumed", keep=1)
    got = load_latest(run_folder)
    assert got is not None and got.meta == "resumed" and steps_in(run_folder) == [450]


def test_stale_temporary_files_are_ignored_and_removed(run_folder: Path) -> None:
    stale = run_folder / "step-000000099.safetensors.tmp"
    stale.write_bytes(b"half")
    assert load_latest(run_folder) is None
    save(run_folder, 1, {}, {}, keep=3)
    assert not stale.exists() and steps_in(run_folder) == [1]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_previous_checkpoint(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(run_folder, 1, {"w": torch.ones(3)}, "first", keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "replace", full)))
    with pytest.raises(CheckpointError, match=r"step-000000002.*No space left.*intact"):
        save(run_folder, 2, {"w": torch.zeros(3)}, "second", keep=1)
    monkeypatch.undo()
    got = load_latest(run_folder)
    assert got is not None and got.meta == "first" and steps_in(run_folder) == [1]


def test_full_disk_in_the_middle_of_a_write(run_folder: Path) -> None:
    """A real limit on the file size stands in for a full disk; it holds for the child alone."""
    code = """
import resource, sys, torch
from pathlib import Path
from uml_fast.training.checkpoint import CheckpointError, save
folder = Path(sys.argv[1])
save(folder, 1, {"w": torch.ones(100)}, {}, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(folder, 2, {"w": torch.ones(100_000)}, {}, keep=2)
except CheckpointError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, run_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step-000000002.safetensors: File too large" in done.stdout
    got = load_latest(run_folder)
    assert got is not None and got.step == 1 and steps_in(run_folder) == [1]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"file/checkpoints/step-.*Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1, {}, {}, keep=1)


def test_what_cannot_be_saved_is_refused_before_any_write(run_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'z'.*complex64"):
        save(run_folder, 1, {"z": torch.zeros(2, dtype=torch.complex64)}, {}, keep=1)
    with pytest.raises(TypeError):
        save(run_folder, 1, {}, {"path": run_folder}, keep=1)
    with pytest.raises(ValueError, match="keep is 0"):
        save(run_folder, 1, {}, {}, keep=0)
    assert list(run_folder.iterdir()) == []


def test_kill_during_saves_leaves_a_whole_checkpoint(run_folder: Path) -> None:
    code = """
import itertools, sys, torch
from pathlib import Path
from uml_fast.training.checkpoint import save
for step in itertools.count(1):
    save(Path(sys.argv[1]), step, {"w": torch.full((200_000,), float(step))}, step, keep=1)
    print(step, flush=True)
"""
    command = [sys.executable, "-c", code, run_folder]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = [child.stdout.readline() for _ in range(5)]
    child.kill()
    child.wait()
    child.stdout.close()
    got = load_latest(run_folder)
    assert got is not None and got.step >= int(printed[-1]) and got.meta == got.step
    assert bool((got.tensors["w"] == got.step).all())


def test_first_signal_sets_the_flag_second_interrupt_raises() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop and stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.received is signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
        1 / 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def train() -> None:
        with StopSignal() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_file_offsets_are_aligned_to_the_dtype(run_folder: Path) -> None:
    path = save(run_folder, 1, tensors_of_every_kind(), {}, keep=1)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, entry in header.items():
        if name != "__metadata__":
            itemsize = torch.empty(0, dtype=checkpoint.DTYPES[entry["dtype"]]).element_size()
            assert (8 + size + entry["data_offsets"][0]) % itemsize == 0


def save_in_parts(folder: Path, step: int, weight: torch.Tensor) -> Path:
    """Five rows on two ranks, three and two of them; a bias of one row is all on the first."""
    for rank, rows in enumerate((slice(0, 3), slice(3, 5))):
        tensors = {"w": weight[rows], "b": torch.ones(1)[rank:]}
        whole = {"count": torch.tensor(7)} if rank == 0 else {}
        offsets = {"w": rows.start, "b": rank}
        checkpoint.save_part(folder, step, tensors | whole, offsets, {"rank": rank}, rank, 2)
    return checkpoint.commit(folder, step, 2, keep=2)


def test_parts_come_back_whole_in_rows_and_through_pytorch(run_folder: Path) -> None:
    weight = torch.randn(5, 3)
    path = save_in_parts(run_folder, 4, weight)
    save(run_folder, 3, {"w": weight + 1}, {}, keep=2)
    assert not path.exists()  # a later history that the run left
    path = save_in_parts(run_folder, 4, weight)
    got = load_latest(run_folder)
    assert got is not None and (got.step, got.meta) == (4, {"rank": 0})
    expected = {"w": weight, "b": torch.ones(1), "count": torch.tensor(7)}
    assert_same(got.tensors, expected)
    rows = load(path, lambda name: (2, 2) if name == "w" else None).tensors
    assert_same(rows, expected | {"w": weight[2:4]})
    single = load(run_folder / "step-000000003.safetensors", lambda name: (4, 1)).tensors
    assert_same(single, {"w": weight[4:] + 1})
    pytest.importorskip("safetensors")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = {"w": torch.zeros(5, 3), "b": torch.zeros(1)}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path)))
    assert_same(found, {"w": weight, "b": torch.ones(1)})


@pytest.mark.parametrize("damage", ["missing", "torn", "flipped", "not committed"])
def test_a_damaged_part_is_found_and_the_checkpoint_before_it_taken(
    run_folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_in_parts(run_folder, 4, torch.zeros(5, 3))
    path = save_in_parts(run_folder, 8, torch.ones(5, 3))
    last = path / "part-00001-of-00002.safetensors"
    if damage == "missing":
        last.unlink()
    elif damage == "torn":
        last.write_bytes(last.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(last.read_bytes())
        content[-1] ^= 1
        last.write_bytes(content)
    else:
        path.rename(path.with_name(path.name + ".tmp"))
    got = load_latest(run_folder)
    assert got is not None and got.step == 4 and got.tensors["w"].eq(0).all()
    assert ("continuing from" in caplog.text) == (damage != "not committed")


def test_parts_of_all_ranks_are_needed_to_commit(run_folder: Path) -> None:
    checkpoint.save_part(run_folder, 4, {"w": torch.ones(2)}, {"w": 0}, {}, 0, 2)
    with pytest.raises(CheckpointError, match="1 of 2 parts"):
        checkpoint.commit(run_folder, 4, 2, keep=1)
    assert load_latest(run_folder) is None


def test_parts_that_others_write_already_outlive_a_commit(run_folder: Path) -> None:
    """A rank that is done with a step's part may write that of the next before the commit."""

    def part(step: int, rank: int, ranks: int = 2) -> None:
        rows = {"w": torch.full((2,), float(step))}
        save_part(run_folder, step, rows, {"w": 2 * rank}, {"step": step}, rank, ranks)

    part(3, 0)  # left behind by a run that was killed
    part(10, 3, 4)
    for rank in (0, 1):
        part(5, rank)
    part(10, 1)
    commit(run_folder, 5, 2, keep=2)
    assert sorted(p.name for p in run_folder.iterdir()) == ["step-000000005", "step-000000010.tmp"]
    part(10, 0)
    commit(run_folder, 10, 2, keep=2)
    newest = load_latest(run_folder)
    assert newest is not None and newest.step == 10 and newest.tensors["w"].tolist() == [10.0] * 4
