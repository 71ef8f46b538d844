"""Traces are valid, complete, and there however a trial ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_produce import MIX, SOURCES, Lazy
from tests.tiny import tiny
from uml_fast import train
from uml_fast.config import RunConfig
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.runtime import native
from uml_fast.runtime.trace import CAPACITY, Event, Trace, chrome_trace, span
from uml_fast.training.step import TrainStep


def check(trace: dict[str, Any]) -> dict[str, dict[str, list[dict]]]:
    """Hold a trace to the format; its stretches by group and lane."""
    names: dict[tuple[str, int, int], str] = {}
    lanes: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for e in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "ts", "args"} <= e.keys()
        assert isinstance(e["pid"], int) and isinstance(e["tid"], int) and e["ts"] >= 0
        if e["ph"] == "M":
            names[e["name"], e["pid"], e["tid"]] = e["args"].get("name", "")
        else:
            assert e["ph"] in "XC"
    for e in trace["traceEvents"]:
        if e["ph"] == "X":
            assert e["dur"] >= 0
            group = names["process_name", e["pid"], 0]
            lanes[group][names["thread_name", e["pid"], e["tid"]]].append(e)
        elif e["ph"] == "C":
            assert all(n >= 0 for n in e["args"].values())
    for group in lanes.values():
        for lane in group.values():
            for a, b in itertools.pairwise(lane):
                assert a["ts"] + a["dur"] <= b["ts"] + 1e-3, (a, b)
    return lanes


def event(lane: str, begin: int, end: int) -> Event:
    return Event("g", lane, f"{begin}", begin, end, {})


def test_stretches_that_overlap_have_rows_of_their_own() -> None:
    events = [event("a", 0, 10), event("a", 2, 5), event("a", 5, 8), event("b", 1, 3),
              event("a", 10, 12)]  # fmt: skip
    lanes = check(chrome_trace(sorted(events, key=lambda e: e.begin_ns)))["g"]
    assert {lane: [e["name"] for e in x] for lane, x in lanes.items()} == {
        "a": ["0", "10"], "a (2)": ["2", "5"], "b": ["1"],
    }  # fmt: skip


def test_a_trace_begins_where_every_recorder_still_knows() -> None:
    trace = Trace()
    for i in range(CAPACITY + 100):
        trace.add("g", "many", str(i), 10 * i, 10 * i + 9)
    trace.add_recorder(lambda: [event("few", 0, 500), event("few", 0, 2_000), event("few", 5, 8)])
    events = trace.events()
    assert len(events) == CAPACITY + 1
    few = next(e for e in events if e.lane == "few")
    assert (few.begin_ns, few.end_ns) == (min(e.end_ns for e in events if e.lane == "many"), 2_000)
    check(chrome_trace(events))


def test_no_trace_costs_a_branch_and_no_event() -> None:
    assert span(None, "step", step=1) is span(None, "checkpoint")


@pytest.mark.native
def test_a_loader_shows_every_stage_of_every_pack() -> None:
    lazy = (Lazy(SOURCES[0], delay_s=0.001), SOURCES[1])
    trace = Trace()
    with Loader(lazy, layouts_of(SOURCES, MIX), MIX, seed=3, trace=trace, slots=3) as loader:
        for _ in range(20):
            next(loader)
    content = chrome_trace(trace.events())
    lanes = check(content)
    assert {"packs", "a", "b"} == lanes.keys()
    assert lanes["packs"].keys() == {"slot 0", "slot 1", "slot 2"}
    assert "read" in lanes["a"] and lanes["b"].keys() == {"assemble"}
    for number in range(20):
        mine = [e["name"] for lane in lanes["packs"].values() for e in lane
                if e["args"]["pack"] == number]  # fmt: skip
        stages = ["plan", "wait for the device", "assemble", "read", "upload", "ready"]
        assert mine == [*stages, "in use"][: len(mine)] and len(mine) >= 6
        assert all(e["args"]["slot"] == number % 3 for e in lanes["a"]["read"]
                   if e["args"]["pack"] == number)  # fmt: skip
    counts = [e["args"]["ready"] for e in content["traceEvents"] if e["ph"] == "C"]
    assert counts[-1] == 0 and 1 <= max(counts) <= 3


def config(folder: Path, **changes: object) -> RunConfig:
    return dataclasses.replace(tiny(), out=folder / "run", seeds=1, steps=12,
                               trace=folder / "new" / "trace.json", **changes)  # fmt: skip


def test_a_run_writes_the_trace_of_its_first_uml_trial(tmp_path: Path) -> None:
    run = config(tmp_path)
    train.train(run)
    assert run.trace is not None
    lanes = check(json.loads(run.trace.read_text()))
    work = [e["name"] for e in lanes["compute"]["compute"]]
    assert work.count("step") == 12 and work.count("validation") == 2
    assert work.count("checkpoint") == 3 and work.count("wait for a pack") == 12
    if native.available():
        assert lanes.keys() == {"compute", "packs", "image", "audio", "text", "features"}
    assert [p.name for p in run.trace.parent.iterdir()] == ["trace.json"]


def test_a_run_that_fails_or_is_stopped_has_its_trace(tmp_path: Path, monkeypatch) -> None:
    run = config(tmp_path, modes=("uml",))
    monkeypatch.setattr(TrainStep, "__call__", failing(TrainStep.__call__, at=4))
    with pytest.raises(RuntimeError, match="out of memory"):
        train.train(run)
    assert run.trace is not None
    work = [e["name"] for e in check(json.loads(run.trace.read_text()))["compute"]["compute"]]
    assert work.count("step") == 5


def failing(call: Any, at: int) -> Any:
    def step(self: TrainStep, batch: Any, number: int, flags: Any) -> Any:
        if number == at:
            raise RuntimeError("out of memory")
        return call(self, batch, number, flags)

    return step


def test_a_trace_that_cannot_be_written_does_not_cost_the_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "new").write_text("a file where a folder should be")
    assert train.train(config(tmp_path, modes=("uml",))) is not None
    assert "could not be written" in capsys.readouterr().err


def test_events_may_be_added_from_any_thread() -> None:
    trace = Trace()

    def add_many(lane: str) -> None:
        for k in range(500):
            trace.add("g", lane, "x", k, k + 1)

    add = [threading.Thread(target=add_many, args=(str(i),)) for i in range(4)]
    for t in add:
        t.start()
    for t in add:
        t.join()
    assert {k: len(v) for k, v in check(chrome_trace(trace.events()))["g"].items()} == {
        str(i): 500 for i in range(4)
    }
