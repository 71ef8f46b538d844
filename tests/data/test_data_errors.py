"""Samples that cannot be read: counted once, over resumed runs and over ranks."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from uml_fast.data.data_errors import DataErrors
from uml_fast.data.source import DataError


def named(path: Path) -> list[str]:
    """Samples in the file, in its order; broken lines are left out."""
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line)["sample"])
        except (ValueError, KeyError, TypeError):
            continue
    return out


def test_a_resumed_run_goes_on_counting_and_names_no_sample_twice(tmp_path: Path):
    path = tmp_path / "run" / "data_errors.jsonl"
    first = DataErrors(3, path)
    first.add("image", "a", "broken")
    first.add("image", "b", "broken")
    again = DataErrors(3, path)
    assert len(again) == 2
    again.add("image", "a", "broken")
    again.add("text", "a", "broken")
    assert len(again) == 3 and named(path) == ["a", "b", "a"]
    with pytest.raises(DataError, match=r"image, sample c: cut. 4 samples cannot be read"):
        again.add("image", "c", "cut")


def test_a_run_that_stopped_at_the_limit_stops_again_until_it_is_raised(tmp_path: Path):
    path = tmp_path / "e.jsonl"
    with pytest.raises(DataError):
        DataErrors(0, path).add("image", "a", "broken")
    with pytest.raises(DataError, match=r"1 samples cannot be read, data\.max_errors is 0"):
        DataErrors(0, path).add("image", "a", "broken")
    DataErrors(1, path).add("image", "a", "broken")


@pytest.mark.parametrize("torn", [b'{"modality": "image", "sam', b'{"modality": "image"}\n[1]\n{'])
def test_a_torn_last_line_is_passed_over(tmp_path: Path, torn: bytes):
    path = tmp_path / "e.jsonl"
    DataErrors(9, path).add("image", "a", "broken")
    path.write_bytes(path.read_bytes() + torn)
    errors = DataErrors(9, path)
    assert len(errors) == 1
    errors.add("image", "b", "broken")
    errors.add("image", "c", "broken")
    assert len(DataErrors(9, path)) == 3 and named(path)[-2:] == ["b", "c"]


def test_ranks_share_the_limit_and_the_names(tmp_path: Path):
    path = tmp_path / "e.jsonl"
    ranks = [DataErrors(100, path) for _ in range(4)]

    def work(rank: DataErrors) -> None:
        for i in range(25):
            rank.add("image", f"s{i}", "broken")

    threads = [threading.Thread(target=work, args=(r,)) for r in ranks]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(named(path)) == sorted(f"s{i}" for i in range(25))
    strict = [DataErrors(26, path), DataErrors(26, path)]
    strict[0].add("image", "x", "broken")
    with pytest.raises(DataError, match="27 samples cannot be read"):
        strict[1].add("image", "y", "broken")  # it counts what the other rank found


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"image, sample a: broken; and .*e\.jsonl cannot be"):
        DataErrors(9, tmp_path / "file" / "e.jsonl").add("image", "a", "broken")
    with pytest.raises(DataError, match="cannot be read"):
        DataErrors(9, tmp_path)


@pytest.mark.parametrize(
    ("reason", "told"), [(errno.ENOSPC, "free some space"), (errno.ENOENT, "name another folder")]
)
def test_advice_of_a_file_that_cannot_be_written_follows_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int, told: str
):
    def full(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match=rf"{os.strerror(reason)}; {told}"):
        DataErrors(9, tmp_path / "e.jsonl").add("image", "a", "broken")
