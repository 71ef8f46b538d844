"""Weights & Biases: what wandb itself has in its files afterwards, and that it never ends a run."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny
from uml_fast.config import ConfigError
from uml_fast.training.log import RunLog
from uml_fast.training.wandb_runs import WandbRuns, check_wandb


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, offline and silent."""
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield package
    package.teardown()


def records(path: Path) -> list[Any]:
    """wandb's records in a .wandb file: a LevelDB log of its own messages behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, part, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """For every wandb run, in the order they began: id, group, name, config, history, summary."""
    import wandb

    wandb.teardown()  # its process ends with the files whole
    out: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        run: dict[str, Any] = {"history": []}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run" and "id" not in run:
                config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
                run |= {"id": record.run.run_id, "group": record.run.run_group,
                        "name": record.run.display_name, "project": record.run.project,
                        "config": config}  # fmt: skip
            elif kind == "history":
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                run["history"].append({k: v for k, v in values.items() if k[0] != "_"}
                                      | {"step": record.history.step.num})  # fmt: skip
            elif kind == "summary":
                summary = {u.key or "/".join(u.nested_key): json.loads(u.value_json)
                           for u in record.summary.update}  # fmt: skip
                run["summary"] = run.get("summary", {}) | summary
            elif kind == "exit":
                run["exit"] = record.exit.exit_code
        out.setdefault(run["id"], []).append(run)
    return out


def test_each_trial_is_a_run_of_its_own_that_a_restart_goes_on_with(
    tmp_path: Path, wandb: Any
) -> None:
    folder = tmp_path / "mine"

    def opened() -> RunLog:
        runs = WandbRuns("demo", folder, {"steps": 40, "seed": 7})
        return RunLog(folder, stream=io.StringIO(), wandb=runs)

    with opened() as log:
        log.begin("unimodal", 0)
        log.write(20, loss=0.5, losses={"image": 0.25}, grad_norm=float("nan"))
        log.end({"mode": "unimodal", "seed": 0, "head": 0.5, "probe": None, "baselines": {"k": 1}})
        log.begin("uml", 0)
        log.write(20, loss=0.75)
    with opened() as log:
        log.begin("uml", 0, resumed_step=20)
        log.write(40, loss=0.125)
        log.end({"head": 0.75})
    first, second = parts(folder).values()
    (alone,) = first
    assert (alone["project"], alone["group"], alone["name"]) == ("demo", "mine", "mine unimodal-0")
    assert alone["config"].items() >= {"mode": "unimodal", "seed": 0, "steps": 40}.items()
    assert alone["history"] == [{"loss": 0.5, "losses/image": 0.25, "step": 20}]
    assert alone["summary"]["head"] == 0.5 and alone["exit"] == 0
    stopped, resumed = second
    assert stopped["config"]["mode"] == "uml" and stopped["config"]["seed"] == 0
    assert stopped["history"] == [{"loss": 0.75, "step": 20}] and stopped["exit"] == 1
    assert resumed["history"] == [{"loss": 0.125, "step": 40}] and resumed["exit"] == 0
    assert json.loads((folder / "wandb.json").read_text()) == {
        "unimodal-0": alone["id"], "uml-0": stopped["id"],
    }  # fmt: skip


def test_a_server_that_cannot_be_reached_leaves_an_offline_run(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, modes = wandb.init, []

    def init(*, mode: str | None, **options: Any) -> Any:
        modes.append(mode)
        if mode is None:
            raise wandb.errors.CommError("connection refused")
        return real(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", init)
    runs = WandbRuns("demo", tmp_path, {})
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            runs.begin("uml", seed)
            runs.write(1, {"loss": 1.0})
            runs.end({"head": 1.0})
    assert modes == [None, "offline", "offline"]
    assert caplog.text.count("wandb sync") == 1 and "connection refused" in caplog.text
    assert [r["history"][0]["loss"] for (r,) in parts(tmp_path).values()] == [1.0, 1.0]


def test_what_wandb_raises_does_not_end_the_trial(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = WandbRuns("demo", tmp_path, {})
    runs.begin("uml", 0)

    def gone(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(runs._run, "log", gone)  # what it does where its process is gone
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            runs.write(step, {"loss": 1.0})
        runs.end({})
    assert caplog.text.count("wandb does not log this trial on") == 1


def test_a_time_that_is_no_number_does_not_end_the_trial(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1m")
    with caplog.at_level(logging.WARNING):
        WandbRuns("demo", tmp_path, {}).begin("uml", 0)
    assert "wandb does not log this trial on" in caplog.text and "1m" in caplog.text


def test_asked_for_and_not_installed_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uml_fast.train import train

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb, or leave the option out"):
        train(dataclasses.replace(tiny(), out=tmp_path / "run", wandb="demo"))
    assert not (tmp_path / "run").exists()


def test_not_logged_in_is_said_unless_offline(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wandb()  # offline needs no account
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="wandb login, set WANDB_API_KEY, or set WANDB_MODE"):
        check_wandb()
