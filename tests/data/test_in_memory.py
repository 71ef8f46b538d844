"""Samples read whole: once for all trials of a run, on all cores, with a line if it takes long."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.made_files import run
from tests.data.test_small_folders import config, folder
from uml_fast.data.in_memory import for_evaluation, in_memory
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError, Lengths
from uml_fast.runtime import progress
from uml_fast.runtime.progress import LongWork
from uml_fast.train import train


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each sample was read for anything but a training step."""
    found: Counter[str] = Counter()
    real = ShardSource.read

    def read(
        self: ShardSource, samples: np.ndarray, out: np.ndarray,
        epochs: Sequence[int] | np.ndarray | None = None,
    ) -> list[int]:  # fmt: skip
        if epochs is None:
            found.update(self.key(int(i)) for i in samples)
        return real(self, samples, out, epochs)

    monkeypatch.setattr(ShardSource, "read", read)
    return found


def test_a_run_of_two_seeds_reads_each_sample_once_beside_its_steps(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("images", folder(tmp_path / "in", cat=20, dog=20), tmp_path / "s")
    train(dataclasses.replace(config(tmp_path / "s"), seeds=2, out=tmp_path / "run"))
    shown = 4  # samples.json
    assert len(reads) == 40 and sum(reads.values()) <= 40 + shown


def test_other_options_or_changed_shards_are_read_anew(tmp_path: Path, reads: Counter[str]) -> None:
    run("images", folder(tmp_path / "in", cat=20, dog=20), tmp_path / "s")
    given = config(tmp_path / "s", out=tmp_path / "run")
    first = given.load(0, "uml").test
    assert given.load(1, "uml").test is first
    image = dataclasses.replace(given.modalities[0], height=4)
    other = dataclasses.replace(given, modalities=(image,)).load(0, "uml").test
    assert len(other.rows) == len(first.rows) // 2
    run("images", folder(tmp_path / "other", cat=20, dog=20, cow=20), tmp_path / "new")
    for path in (tmp_path / "new").iterdir():
        path.replace(tmp_path / "s" / path.name)
    assert len(given.load(0, "uml").test) > len(first)


class Slow(Lengths):
    """5 samples in 300 cannot be read."""

    name, row_elems, row_dtype = "image", 2, "int32"
    labels = np.arange(300, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(1 + np.arange(300) % 3)]).astype(np.int64)

    def __len__(self) -> int:
        return 300

    def key(self, i: int) -> str:
        return f"sample {i}"

    def read(
        self, samples: Sequence[int] | np.ndarray, out: np.ndarray, epochs: object = None
    ) -> list[int]:
        at, rejected = 0, []
        for place, i in enumerate(samples):
            rows = 1 + int(i) % 3
            out[at : at + rows] = i
            at += rows
            if i % 60 == 59:
                rejected.append(place)
        return rejected


def test_parts_that_threads_read_come_together_in_order() -> None:
    found = in_memory(Slow())
    kept = [i for i in range(300) if i % 60 != 59]
    assert found.labels.tolist() == kept and found.keys[59] == "sample 60"
    for i, label in enumerate(kept):
        np.testing.assert_array_equal(found.sample(i), np.full((1 + label % 3, 2), label))


class Whole(Slow):
    """All can be read."""

    def __init__(self) -> None:
        self.read_into: list[np.ndarray] = []

    def read(
        self, samples: Sequence[int] | np.ndarray, out: np.ndarray, epochs: object = None
    ) -> list[int]:
        super().read(samples, out, epochs)
        self.read_into.append(out)
        return []


class Empty(Slow):
    """No samples."""

    labels, offsets = np.zeros(0, np.int32), np.zeros(1, np.int64)

    def __len__(self) -> int:
        return 0


class Broken(Slow):
    """None can be read."""

    def read(
        self, samples: Sequence[int] | np.ndarray, out: np.ndarray, epochs: object = None
    ) -> list[int]:
        return list(range(len(samples)))


def test_rows_are_in_memory_once_where_all_samples_can_be_read() -> None:
    source = Whole()
    found = in_memory(source)
    assert len(found) == 300 and found.labels.dtype == np.int32
    assert source.read_into and all(np.shares_memory(found.rows, x) for x in source.read_into)
    np.testing.assert_array_equal(found.sample(5), np.full((3, 2), 5))


@pytest.mark.parametrize(
    ("source", "told"),
    [(Empty(), "image: no samples; give"), (Broken(), "image: none of 300 samples can be read")],
)
def test_a_source_without_samples_is_a_data_error(source: Slow, told: str) -> None:
    with pytest.raises(DataError, match=told):
        for_evaluation(source, "a test")


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_only_long_work_of_the_first_rank_is_shown(
    monkeypatch: pytest.MonkeyPatch, rank: str, speaks: bool
) -> None:
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setenv("RANK", rank)
    with LongWork("reading image samples", 10_000, stream) as work:
        for _ in range(10):
            clock.now += 1.0
            work.add(100)
            if clock.now < 2:
                assert not stream.getvalue()
    assert (
        stream.getvalue().splitlines()
        == [
            "reading image samples 200/10,000  left 1:38",
            "reading image samples 1,000/10,000 in 0:10",
        ][: 2 * speaks]
    )
