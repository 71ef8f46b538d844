"""Reads that hang are named; runs that end in the middle of a read leave nothing behind."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_produce import MIX, SOURCES, Lazy
from uml_fast.data.loading import packs, produce
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.loading.reading import Reading, my_reading
from uml_fast.data.source import DataError, Source

pytestmark = pytest.mark.native

ROOT = Path(__file__).parents[2]
LAYOUTS = layouts_of(SOURCES, MIX)


class Stuck(Lazy):
    """Decodes for ever from its ``at``-th part on, until ``release`` is set."""

    def __init__(self, source: Source, at: int = 0) -> None:
        super().__init__(source)
        self.at = at
        self.release = threading.Event()
        self.is_stuck = threading.Event()

    def read(
        self, samples: np.ndarray, out: np.ndarray, epochs: np.ndarray | None = None
    ) -> list[int]:
        self.reads += 1
        if self.reads > self.at:
            my_reading().enter("decode", min(1, len(samples) - 1))
            self.is_stuck.set()
            self.release.wait()
        return super().read(samples, out, epochs)

    def key(self, i: int) -> str:
        return f"sound/{i}"


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("uml-read")]


@pytest.fixture
def stuck() -> Stuck:
    source = Stuck(SOURCES[1], at=3)
    yield source
    source.release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("uml-read"):
            thread.join(5)


def test_a_hanging_read_is_warned_of_then_an_error_with_worker_stage_and_samples(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packs, "_WARN_S", 0.3)
    monkeypatch.setattr(produce, "_CLOSE_S", 0.1)
    sources = (SOURCES[0], stuck)
    with (
        caplog.at_level(logging.WARNING, "uml_fast"),
        pytest.raises(TimeoutError) as error,
        Loader(sources, LAYOUTS, MIX, seed=0, timeout_s=0.9, readers=2) as loader,
    ):
        for _ in range(50):
            next(loader)
    said = str(error.value)
    assert "no pack for 0.9 s; the loader hangs in: read b (pack " in said
    assert "reader uml-read-" in said
    assert "has b: in decode for " in said and "samples in hand for " in said
    assert "sound/" in said and "has a:" not in said
    warned = [r.message for r in caplog.records if "no pack for 0 s" in r.message]
    assert len(warned) == 1 and "in decode" in warned[0]
    assert any("reads that do not end are left behind" in r.message for r in caplog.records)


def test_a_pack_that_comes_late_is_warned_of_once_and_no_error(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packs, "_WARN_S", 0.2)
    threading.Timer(1.0, stuck.release.set).start()
    with Loader((SOURCES[0], stuck), LAYOUTS, MIX, seed=0, timeout_s=30) as loader:
        for _ in range(10):
            next(loader)
    assert sum("no pack for" in r.message for r in caplog.records) == 1


def test_a_state_cannot_be_loaded_over_a_hanging_read(stuck: Stuck) -> None:
    with Loader((SOURCES[0], stuck), LAYOUTS, MIX, seed=0, timeout_s=0.5, slots=8) as loader:
        start = loader.state_dict()
        next(loader)
        assert stuck.is_stuck.wait(5)
        with pytest.raises(TimeoutError, match=r"a read under way did not end.*\n.*in decode"):
            loader.load_state_dict(start)
        stuck.release.set()
        loader.load_state_dict(start)
        next(loader)


def test_readers_that_are_never_scheduled_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: None)
    lazy = (Lazy(SOURCES[0]), SOURCES[1])
    with (
        Loader(lazy, LAYOUTS, MIX, seed=0, timeout_s=0.3, readers=3) as loader,
        pytest.raises(TimeoutError, match=r"wait for a reader of a .*\n  0 of 3 readers are alive"),
    ):
        next(loader)


def test_readers_start_with_the_first_pack() -> None:
    before = readers()
    with Loader((Lazy(SOURCES[0]), SOURCES[1]), LAYOUTS, MIX, seed=0, readers=3) as loader:
        assert readers() == before
        next(loader)
        assert len(readers()) == len(before) + 3
    assert readers() == before


def test_a_loader_that_is_dropped_ends_its_threads() -> None:
    before = threading.active_count()
    tasks = len(list(Path("/proc/self/task").iterdir()))
    loader = Loader((Lazy(SOURCES[0], delay_s=0.01), SOURCES[1]), LAYOUTS, MIX, seed=0)
    next(loader)
    del loader
    gc.collect()
    assert threading.active_count() == before
    assert len(list(Path("/proc/self/task").iterdir())) <= tasks


def test_a_source_that_raises_anything_ends_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends(Lazy):
        def read(self, samples: np.ndarray, out: np.ndarray, epochs: object = None) -> list[int]:
            raise SystemExit("the reader was ended")

    with (
        Loader((Ends(SOURCES[0]), SOURCES[1]), LAYOUTS, MIX, seed=0) as loader,
        pytest.raises(
            DataError, match=r"a: thread uml-read-\d was ended from outside \(SystemExit"
        ),
    ):
        next(loader)


def test_a_reader_that_ends_between_parts_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, calls = Reading.begin, []

    def ended(self: Reading, *args: Any) -> None:
        calls.append(0)
        if len(calls) == 20:
            raise SystemExit
        begin(self, *args)

    monkeypatch.setattr(Reading, "begin", ended)
    with (
        Loader((Lazy(SOURCES[0]), Lazy(SOURCES[1])), LAYOUTS, MIX, seed=0) as loader,
        pytest.raises(DataError, match="was ended from outside"),
    ):
        while True:
            next(loader)


SCRIPT = """
import signal, sys, threading, time
# ignored in what a shell runs in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.data.test_produce import MIX, SOURCES, Lazy
from tests.data.test_stall import LAYOUTS, Stuck
from uml_fast.data.loading import produce
from uml_fast.data.loading.loader import Loader
produce._CLOSE_S = 0.2
kind, how = sys.argv[1:]
source = {"slow": Lazy(SOURCES[1], delay_s=0.05), "stuck": Stuck(SOURCES[1], at=6)}[kind]
loader = Loader((SOURCES[0], source), LAYOUTS, MIX, seed=0)
next(loader)
print("ready", flush=True)
if how == "forgotten":
    pass
elif how == "error":
    raise ValueError("an error of the run")
else:
    for batch in loader:
        pass
"""


@pytest.mark.parametrize("kind", ["slow", "stuck"])
@pytest.mark.parametrize(
    ("how", "status"), [("forgotten", 0), ("error", 1), ("SIGINT", -2), ("SIGTERM", -15)]
)
def test_a_process_ends_at_once_with_reads_under_way(kind: str, how: str, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, kind, how], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if how.startswith("SIG"):
        time.sleep(0.3)
        assert "/dev/shm" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(getattr(signal, how))
    _, error = process.communicate(timeout=30)
    assert process.returncode in (status, 130 if how == "SIGINT" else status), error
    assert "Fatal Python error" not in error and "terminate called" not in error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
