"""Many shards through few descriptors: the right bytes, from any thread, and nothing left open."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from tests.data.made_files import tar
from uml_fast.data.shards import open_files
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.open_files import OpenFiles


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    out = [tmp_path / f"{i}.bin" for i in range(20)]
    for i, path in enumerate(out):
        path.write_bytes(bytes([i]) * (100 + i))
    return out


def descriptors() -> int:
    gc.collect()
    return len([*Path("/proc/self/fd").iterdir()])


def test_the_files_read_last_stay_open(paths: list[Path]):
    before = descriptors()
    files = OpenFiles(paths, most=3)
    for number in (0, 1, 2, 0, 3):
        assert files.read(number, 1000, 90) == bytes([number]) * (10 + number)
    assert len(files) == 3 and descriptors() == before + 3
    for number in (0, 2, 3):
        paths[number].unlink()  # still open
        assert files.read(number, 1, 0) == bytes([number])
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        files.read(1, 1, 0)
    files.close()
    assert descriptors() == before


def test_threads_read_through_fewer_descriptors_than_threads(paths: list[Path]):
    before = descriptors()
    files = OpenFiles(paths, most=2)
    wrong: list[int] = []

    def read(start: int) -> None:
        for i in range(600):
            number = (start + 7 * i) % len(paths)
            if files.read(number, 50, 3) != bytes([number]) * 50:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and len(files) == 2
    files.close()
    assert descriptors() == before


def test_a_process_without_descriptors_to_spare(paths: list[Path], monkeypatch):
    files = OpenFiles(paths)
    real, opened = os.open, []

    def scarce(path, *rest):
        if len(files) >= 4:
            raise OSError(24, "Too many open files")
        opened.append(path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", scarce)
    for number in range(len(paths)):
        assert files.read(number, 1, 0) == bytes([number])
    assert len(opened) == len(paths) and len(files) == 4


def test_a_set_of_many_shards_keeps_few_open(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(open_files, "MOST", 4)
    for n in range(12):
        tar(tmp_path / f"{n:02}.tar", [(f"{n}.txt", b"text %d" % n)])
    before = descriptors()
    with ShardSet.open(tmp_path) as shards:
        for i in (*range(12), *range(12)):
            assert shards.payload(i) == b"text %d" % i
        assert descriptors() == before + 4
    assert descriptors() == before
