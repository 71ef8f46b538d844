"""What loading cost, from the loader's clocks to the progress line and the report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.data.test_produce import MIX, SOURCES, Lazy
from uml_fast.data.loading.loader import Loader, layouts_of, look_ahead
from uml_fast.experiment.summary import throughput
from uml_fast.packing.pack import Layout, Region
from uml_fast.report.sections import throughput as shown
from uml_fast.training.live import PlannedTrial
from uml_fast.training.log import RunLog


@pytest.mark.native
def test_the_slow_source_is_the_one_that_stalls() -> None:
    lazy = (Lazy(SOURCES[0], delay_s=0.01), Lazy(SOURCES[1]))
    with Loader(lazy, layouts_of(SOURCES, MIX), MIX, seed=0, readers=2) as loader:
        for _ in range(20):
            next(loader)
        stats = loader.stats()
    stalls = {k.removeprefix("stall_s/"): v for k, v in stats.items() if k.startswith("stall_s/")}
    assert max(stalls, key=lambda k: stalls[k]) == "a"
    assert 0.8 * stats["stall_s"] < sum(stalls.values()) <= stats["stall_s"]
    assert stats["read_s/a"] > 0.1 > stats["read_s/b"] > 0
    stages = {k: v for k, v in stats.items() if k.startswith("stage_s/")}
    assert stages["stage_s/read"] > 0.5 * sum(stages.values()) - stages["stage_s/free"]


def test_the_progress_line_names_the_cause_of_a_stall(tmp_path: Path) -> None:
    for stall, expected in ((3.25, "stall 3.2 % (audio)  ready 40 %"), (0.4, "stall 0.4 %  ready")):
        stream = io.StringIO()
        with RunLog(tmp_path / str(stall), [PlannedTrial("uml", 0, 9)], stream=stream) as log:
            log.begin("uml", 0)
            log.write(1, loss=1.0, stall_pct=stall, stages={"ready": 40.0, "read": 20.0},
                      stall_ms={"audio": 3.0, "plan": 0.1})  # fmt: skip
        assert expected in stream.getvalue()


def test_the_report_shows_stages_and_the_bottleneck(tmp_path: Path) -> None:
    laps = [
        {"mode": "uml", "seed": 0, "step": s, "tokens_per_s": 10.0, "stages": {"ready": r},
         "read_ms": {"audio": 2.0 * s}, "stall_ms": stall}
        for s, r, stall in ((1, 0.0, {"audio": 99.0}), (2, 60.0, {"audio": 4.0}), (3, 80.0, {}))
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(lap) + "\n" for lap in laps))
    rates = throughput(tmp_path)
    assert rates["stages"] == {"ready": 70.0}, "the first lap pays for warm-up"
    assert rates["read_ms"] == {"audio": 5.0} and rates["stall_ms"] == {"audio": 2.0}
    html = shown({"throughput": rates}, laps)
    assert "Stage occupancy" in html and "70 %" in html
    assert "Training waited longest for audio." in html


def test_look_ahead_is_what_memory_holds() -> None:
    def slots(rows: int) -> int:
        region = Region(name="a", rows=rows, slots=1, row_elems=1024, dtype="uint8", max_len=8)
        return look_ahead((Layout(regions=(region,)),))

    assert [slots(8), slots(16 << 10), slots(64 << 10), slots(1 << 20)] == [32, 16, 4, 2]
