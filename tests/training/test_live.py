"""The live line: what it says, that it fits, and that the time left is true of recorded runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from uml_fast.training import live
from uml_fast.training.live import LiveLine, PlannedTrial, TimeLeft

MODES = ("unimodal", "uml")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def steps(line: LiveLine, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        line.tick(step)


FIGURES = {
    "loss": 1.25, "tokens_per_s": 12_340.0, "mfu": 0.314, "stall_pct": 0.42, "memory_mib": 1228.8,
}  # fmt: skip


class TestLine:
    def test_figures_in_a_terminal(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        stream = Terminal()
        line = LiveLine([PlannedTrial(m, 0, 100) for m in MODES], stream)
        line.begin("unimodal", 0, 0)
        steps(line, clock, 1, 29, 0.5)
        clock.now += 0.5
        line.update({"step": 30, "imbalance_pct": 2.0, **FIGURES})
        assert "\n" not in stream.getvalue()
        # 0.5 s a step: 70 steps of this trial, then 100 of the next; no evaluation was seen yet
        assert stream.getvalue().split("\r")[-1] == (
            "[1/2] unimodal-0  30/100  left 0:35+, run 1:25+  loss 1.25  12.3k tok/s  MFU 31 %  "
            "stall 0.4 %  imbalance 2.0 %  1.2 GiB\x1b[K"
        )

    @pytest.mark.parametrize(
        ("columns", "shown_parts"),
        [
            (40, "MFU 31 %"),
            (80, "12.3k tok/s  MFU 31 %  stall 0.4 %  1.2 GiB"),
            (100, "12.3k tok/s  MFU 31 %  stall 0.4 %  imbalance 2.0 %  1.2 GiB"),
        ],
    )
    def test_parts_without_room_are_left_out_whole(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int, shown_parts: str
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        line = LiveLine([PlannedTrial("uml", 0, 10)], stream)
        line.begin("uml", 0, 0)
        line.update({"step": 1, "stages": {"ready": 50.0}, "imbalance_pct": 2.0, **FIGURES})
        shown = stream.getvalue().removesuffix("\x1b[K").removeprefix("\r")
        assert shown == f"[1/1] uml-0  1/10  loss 1.25  {shown_parts}" and len(shown) < columns

    def test_elsewhere_a_line_of_100_columns_every_ten_seconds(self, clock: Clock) -> None:
        stream = io.StringIO()
        line = LiveLine([PlannedTrial("unimodal", 0, 10_000)], stream)
        line.begin("unimodal", 0, 0)
        for step in range(1, 26):
            clock.now += 1.0
            line.update({"step": step, "stages": {"ready": 50.0}, "imbalance_pct": 2.0, **FIGURES})
        line.evaluating()
        clock.now += 5.0
        line.end({"head": 0.721, "probe": None})
        *lines, evaluating, last = stream.getvalue().splitlines()
        assert [text.split("/10000")[0].split()[-1] for text in lines] == ["1", "11", "21"]
        assert all(len(text) <= 100 and "MFU" in text for text in lines)
        assert evaluating == "[1/1] unimodal-0  25 steps, evaluating"
        assert last == "[1/1] unimodal-0  25 steps in 0:30  loss 1.25  head 72.1 %"

    def test_a_note_stands_on_a_line_of_its_own(self, clock: Clock) -> None:
        stream = Terminal()
        line = LiveLine([PlannedTrial("uml", 0, 10)], stream)
        line.begin("uml", 0, 0)
        line.tick(1)
        line.note("checkpoint damaged")
        assert stream.getvalue().endswith("\rcheckpoint damaged\x1b[K\n")


class TestTimeLeft:
    def test_first_steps_do_not_count(self, clock: Clock) -> None:
        left = TimeLeft([PlannedTrial("uml", 0, 100)])
        left.begin(0, 0)
        for step, seconds in ((1, 60.0), (2, 60.0), (3, 1.0), (4, 1.0), (5, 1.0)):
            assert left.seconds() is None
            clock.now += seconds
            left.tick(step, clock.now)
            if step == 4:
                assert left.seconds() == (96.0, 96.0)
                return

    def test_every_mode_has_its_own_start_rate_and_evaluation(self, clock: Clock) -> None:
        left = TimeLeft([PlannedTrial(m, s, 100) for s in (0, 1) for m in MODES])
        for index, start, rate, evaluation in ((0, 10.0, 1.0, 5.0), (1, 20.0, 4.0, 7.0)):
            clock.now += start
            left.begin(index, 0)
            for step in range(1, 101 if index == 0 else 11):
                clock.now += rate
                left.tick(step, clock.now)
            if index == 0:
                clock.now += evaluation
                left.end(is_evaluated=True)
        # this trial: 90 steps of 4 s and an evaluation as the other mode's; then seed 1
        assert left.seconds() == (365.0, 365.0 + (10 + 100 + 5) + (20 + 400 + 5))

    def test_a_resumed_trial_has_the_rate_of_its_new_steps(self, clock: Clock) -> None:
        left = TimeLeft([PlannedTrial("uml", 0, 100)])
        left.begin(0, 90)
        for step in range(91, 96):
            clock.now += 1.0
            left.tick(step, clock.now)
        assert left.seconds() == (5.0, 5.0)

    def test_a_rate_that_changes_is_followed(self, clock: Clock) -> None:
        left = TimeLeft([PlannedTrial("uml", 0, 1000)])
        left.begin(0, 0)
        for step in range(1, 401):
            clock.now += 0.1 if step <= 100 else 0.5
            left.tick(step, clock.now)
        found = left.seconds()
        assert found is not None and found[0] == pytest.approx(300.0, rel=0.01)

    def test_recorded_times_of_a_compiled_run(self, clock: Clock) -> None:
        """numbers, 2 seeds of 200 steps with --compile on 2 cores of an Intel Xeon.

        The first trials compile for 15 and 51 seconds; their time so far over their steps so far
        would be wrong by 963 seconds. The estimate is, from the tenth step on, by 2.
        """
        events = json.loads(Path(__file__).with_name("recorded_times.json").read_text())
        ends = [at for what, at in events if what == "end"]
        clock.now = 0.0
        left = TimeLeft([PlannedTrial(m, s, 200) for s in (0, 1) for m in MODES])
        index, wrong_by, plain_by, begun = -1, [], [], 0.0
        for what, at in events:
            clock.now = at
            if what == "begin":
                index, begun = index + 1, at
                left.begin(index, 0)
            elif what == "end":
                left.end(is_evaluated=True)
            else:
                left.tick(what, at)
                if what >= 10:
                    found = left.seconds()
                    assert found is not None
                    wrong_by.append(abs(found[0] - (ends[index] - at)))
                    plain_by.append(abs((at - begun) / what * (200 - what) - (ends[index] - at)))
        assert max(wrong_by) < 2.5 and max(plain_by) > 900
