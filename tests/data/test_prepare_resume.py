"""Shards are the same bytes for any number of workers, and after a kill at any moment."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.made_files import contents, image, image_folder, run, write
from uml_fast import cli, prepare
from uml_fast.data.prepare import pool
from uml_fast.data.prepare.build import build
from uml_fast.data.prepare.items import Converter, Item, Sample
from uml_fast.data.shards.files import read_manifest
from uml_fast.data.source import DataError
from uml_fast.runtime import progress

SMALL = ("--split", "train=0.8,val=0.2", "--shard-size-mib", "0.01", "--max-errors", "10")
ONE = ("--workers", "1")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = image_folder(tmp_path / "in", 30)
    write(folder / "cat" / "007.jpg", image(7)[:300])
    write(folder / "dog" / "029.jpg", b"no image")
    return folder


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    return ["images", str(source), str(out), *SMALL, *more]


def test_one_and_four_workers_write_the_same_bytes(source: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pool, "_CHUNK_ITEMS", 5)
    run("images", source, tmp_path / "one", *SMALL, "--resize", "8")
    argv = arguments(source, tmp_path / "four", "--resize", "8", "--workers", "4")
    assert prepare.main(argv) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "four")
    assert len(list((tmp_path / "one").glob("train-*.tar"))) > 3


def children(marker: str) -> list[int]:
    """Processes whose environment holds the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_sigkill_and_again_gives_the_bytes_of_an_undisturbed_run(source: Path, tmp_path: Path):
    run("images", source, tmp_path / "whole", *SMALL)
    out = tmp_path / "out"
    # a converter that waits, so that the kill comes while shards are being written by two workers
    slow = (
        "import sys, time\nfrom uml_fast import prepare\n"
        "from uml_fast.data.prepare import images, pool\n"
        "pool._CHUNK_ITEMS = 3\n"
        "convert = images.ImageConverter.convert\n"
        "def wait(self, item):\n    time.sleep(0.03)\n    return convert(self, item)\n"
        "images.ImageConverter.convert = wait\n"
        "if __name__ == '__main__':\n    sys.exit(prepare.main(sys.argv[1:]))\n"
    )
    script = write(tmp_path / "slow.py", slow)
    marker = f"UML_TEST_MARK={tmp_path}"
    command = [sys.executable, str(script), *arguments(source, out, "--workers", "2")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "UML_TEST_MARK": str(tmp_path)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(children(marker)) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert len(kept) >= 2 and not (out / "manifest.json").exists()
    while children(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children(marker), "workers outlive their parent"
    run("images", source, out, *SMALL)
    assert contents(out) == contents(tmp_path / "whole")
    again = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert sum(kept[n] == again[n] for n in kept) >= len(kept) - 1, "finished shards are kept"


def test_a_death_at_every_write_is_survived(tmp_path: Path):
    """The process ends without any clean-up at its n-th sync or rename, for every n."""
    source = image_folder(tmp_path / "in", 3)
    write(source / "cat" / "001.jpg", b"no image")
    small = ["--split", "train=1", "--shard-size-mib", "0.005", "--max-errors", "10"]
    config = prepare.parse(["images", str(source), str(tmp_path / "whole"), *small, *ONE])
    build(config.job(), io.StringIO())
    expected = contents(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in expected) >= 3
    for n in range(1, 200):
        out = tmp_path / f"out{n}"
        job = dataclasses.replace(config, out=out).job()
        child = os.fork()
        if child == 0:
            try:
                die_at(n)
                build(job, io.StringIO())
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        build(job, io.StringIO())
        assert contents(out) == expected, n
    assert n > 20 and contents(out) == expected


def die_at(n: int) -> None:
    """End this process before its n-th sync, or behind its n-th rename."""
    left = n
    sync, replace = os.fsync, Path.replace

    def counted_sync(file: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)
        sync(file)

    def counted_replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        done = replace(self, target)
        if left == 0:
            os._exit(9)
        return done

    os.fsync = counted_sync  # type: ignore[assignment]
    Path.replace = counted_replace  # type: ignore[method-assign,assignment]


def test_a_damaged_shard_of_a_killed_run_is_made_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 25)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(arguments(source, out, "--workers", "1"))
    monkeypatch.undo()
    shards = sorted(out.glob("*.tar"))
    assert len(shards) > 2
    data = bytearray(shards[1].read_bytes())
    data[600] ^= 255
    shards[1].write_bytes(data)
    first = shards[0].stat().st_mtime_ns
    run("images", source, out, *SMALL)
    run("images", source, tmp_path / "whole", *SMALL)
    assert contents(out) == contents(tmp_path / "whole")
    assert shards[0].stat().st_mtime_ns == first


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Ctrl-C at the n-th input."""
    result = Converter.result
    left = [n]

    def counted(self, item):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result(self, item)

    monkeypatch.setattr(Converter, "result", counted)


def test_ctrl_c_keeps_what_is_done_and_says_interrupted(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_after(monkeypatch, 25)
    assert cli.main(["prepare", *arguments(source, out, "--workers", "1")]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    run("images", source, out, *SMALL)
    assert "going on after" in capsys.readouterr().err
    run("images", source, tmp_path / "whole", *SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_changed_inputs_start_anew(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_after(monkeypatch, 25)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(arguments(source, out, "--workers", "1"))
    monkeypatch.undo()
    write(source / "cat" / "new.jpg", image(99))
    run("images", source, out, *SMALL)
    assert "starting anew" in capsys.readouterr().err
    run("images", source, tmp_path / "whole", *SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_later(source, tmp_path, capsys):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code = cli.main(["prepare", *arguments(source, out, "--workers", "1")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert (
        "free some space, or name a folder on another disk as OUT. The same command goes on"
        in capsys.readouterr().err
    )
    run("images", source, out, *SMALL)
    run("images", source, tmp_path / "whole", *SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_two_at_a_time_are_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = Converter.result

    def nested(self, item):
        monkeypatch.setattr(Converter, "result", result)
        with pytest.raises(DataError, match="another process prepares into"):
            prepare.main(arguments(source, out, "--workers", "1"))
        return result(self, item)

    monkeypatch.setattr(Converter, "result", nested)
    run("images", source, out, *SMALL)
    assert read_manifest(out)["splits"]["train"]["samples"] > 0


class Dies(Converter):
    """Ends its process at one input."""

    def convert(self, item):
        if item.name.endswith("3"):
            os._exit(7)
        return Sample(b"x", "txt", (1,))


def test_a_worker_that_dies_is_said_with_the_files_it_may_have_died_of(monkeypatch):
    monkeypatch.setattr(pool, "_CHUNK_ITEMS", 2)
    items = [Item(f"in/{i}", None, None) for i in range(8)]
    with pytest.raises(DataError, match=r"a worker process died, .* between in/\d and in/\d"):
        list(pool.convert_all(items, Dies(), 2))


def test_progress_shows_rate_and_time_left(source, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "TERMINAL_INTERVAL_S", 0.0)
    stream = Terminal()
    build(prepare.parse(arguments(source, tmp_path / "out", "--workers", "1")).job(), stream)
    lines = stream.getvalue().split("\r")
    assert "images  60/60" in lines[-2] and "/s  left 0:00  problems 2" in lines[-2]
    assert lines[-1].startswith("images  60 inputs in 0:0")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["problems"] == {
        "broken image": 2
    }
