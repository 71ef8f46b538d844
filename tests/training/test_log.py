"""The metrics file over kills and resumes, errors that name the path, and the progress line."""

import io
import json
import logging
import resource
import sys

import pytest

from uml_fast.training import log as log_module
from uml_fast.training.log import RunFolderError, RunLog, Trial, read_metrics

TRIALS = (Trial("unimodal", 0, 10), Trial("uml", 0, 10))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(log_module, "time", clock)
    return clock


@pytest.fixture
def no_events(monkeypatch):
    """Without TensorBoard, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def train(log: RunLog, mode: str, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write(step, loss=1 / 3 / step, losses={"image": 0.1 / step}, lr=1e-3)


def quiet(folder, trials=()):
    return RunLog(folder, trials, stream=io.StringIO())


@pytest.mark.usefixtures("no_events")
class TestFile:
    def test_lines_are_what_was_written_bit_for_bit(self, tmp_path):
        with quiet(tmp_path / "deep" / "run") as log:
            log.begin("uml", 3)
            log.write(1, loss=0.1 + 0.2, losses={"image": 1 / 3, "text": 2.5}, val=0.75, mfu=None)
            log.write(2, loss=1.0, grad_norm=float("nan"))
        assert read_metrics(tmp_path / "deep" / "run") == [
            {"mode": "uml", "seed": 3, "step": 1, "loss": 0.1 + 0.2,
             "losses": {"image": 1 / 3, "text": 2.5}, "val": 0.75, "mfu": None},
            {"mode": "uml", "seed": 3, "step": 2, "loss": 1.0, "grad_norm": None},
        ]  # fmt: skip

    def test_a_line_can_be_read_while_training_goes_on(self, tmp_path):
        log = quiet(tmp_path)
        log.begin("uml", 0)
        log.write(1, loss=1.0)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1]
        log.end()

    def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(self, tmp_path):
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        with quiet(whole) as log:
            for mode in ("unimodal", "uml"):
                log.begin(mode, 0)
                train(log, mode, 1, 10)
        with quiet(resumed) as log:
            log.begin("unimodal", 0)
            train(log, "unimodal", 1, 10)
            log.begin("uml", 0)
            train(log, "uml", 1, 7)
        with (resumed / "metrics.jsonl").open("a") as file:
            file.write('{"mode": "uml", "seed": 0, "step": 8, "los')
        with quiet(resumed) as log:
            log.begin("uml", 0, resumed_step=4)
            train(log, "uml", 5, 10)
        expected = (whole / "metrics.jsonl").read_bytes()
        assert (resumed / "metrics.jsonl").read_bytes() == expected

    def test_starting_a_trial_anew_leaves_the_others_alone(self, tmp_path):
        with quiet(tmp_path) as log:
            for seed in (0, 1):
                log.begin("uml", seed)
                train(log, "uml", 1, 3)
            log.begin("uml", 0)
        assert [(r["seed"], r["step"]) for r in read_metrics(tmp_path)] == [(1, 1), (1, 2), (1, 3)]

    def test_a_last_line_without_line_end_is_kept_if_whole(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"mode": "uml", "seed": 0, "step": 1}')
        with quiet(tmp_path) as log:
            log.begin("uml", 0, resumed_step=1)
            log.write(2)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]

    def test_damage_before_the_last_line_is_named(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(RunFolderError, match=r"metrics.jsonl line 2 is not a JSON object"):
            read_metrics(tmp_path)

    def test_no_file_is_no_metrics(self, tmp_path):
        assert read_metrics(tmp_path) == []

    def test_write_outside_of_a_trial_is_refused(self, tmp_path):
        with pytest.raises(RuntimeError, match="call begin first"):
            quiet(tmp_path).write(1, loss=1.0)

    def test_missing_tensorboard_is_said_once(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING), quiet(tmp_path) as log:
            for seed in (0, 1):
                log.begin("uml", seed)
                log.write(1, loss=1.0)
        assert caplog.text.count("pip install tensorboard") == 1
        assert len(read_metrics(tmp_path)) == 2


@pytest.mark.usefixtures("no_events")
class TestFolderErrors:
    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(RunFolderError, match=rf"cannot write {tmp_path / 'run'}: .*--out"):
            quiet(tmp_path / "run")

    def test_a_folder_in_place_of_the_file(self, tmp_path):
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(RunFolderError, match=r"metrics.jsonl: Is a directory"):
            quiet(tmp_path).begin("uml", 0)

    def test_a_folder_nothing_can_be_created_in(self):
        with pytest.raises(RunFolderError, match="cannot write /proc/no-such-run"):
            from pathlib import Path

            quiet(Path("/proc/no-such-run"))

    def test_a_full_disk(self, tmp_path):
        log = quiet(tmp_path)
        log.begin("uml", 0)
        log.write(1, loss=1.0)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            with pytest.raises(RunFolderError, match=r"write .*metrics.jsonl: File too large"):
                log.write(2, loss=1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.end()


class TestEvents:
    @staticmethod
    def scalars(folder, tag):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), purge_orphaned_data=True)
        events.Reload()
        return [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]

    def test_scalars_arrive_and_a_resume_replaces_the_lost_steps(self, tmp_path):
        with quiet(tmp_path) as log:
            log.begin("uml", 2)
            train(log, "uml", 1, 6)
        with quiet(tmp_path) as log:
            log.begin("uml", 2, resumed_step=3)
            for step in range(4, 7):
                log.write(step, loss=50.0, losses={"image": 7.0})
        folder = tmp_path / "tensorboard" / "uml-seed2"
        assert [s for s, _ in self.scalars(folder, "loss")] == [1, 2, 3, 4, 5, 6]
        assert self.scalars(folder, "loss")[3:] == [(4, 50.0), (5, 50.0), (6, 50.0)]
        assert self.scalars(folder, "losses/image")[-1] == (6, 7.0)


@pytest.mark.usefixtures("no_events")
class TestProgress:
    def test_terminal_line_is_rewritten_and_says_what_is_left(self, tmp_path, clock, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        stream = Terminal()
        with RunLog(
            tmp_path, [Trial(m, 0, 100) for m in ("unimodal", "uml")], stream=stream
        ) as log:
            log.begin("unimodal", 0)
            for step in (10, 20, 30):
                clock.now += 5.0
                log.write(step, loss=1.25, tokens_per_s=12_340.0, mfu=0.314, stall_pct=0.42)
            shown = stream.getvalue()
        assert "\n" not in shown
        last = shown.split("\r")[-1]
        # 0.5 s a step: 70 steps of this trial, then 100 of the next
        assert last.startswith("[1/2] unimodal seed 0  step 30/100  left 0:35, run 1:25  loss 1.25")
        assert "12.3k tokens/s  MFU 31 %  stall 0.4 %" in last

    def test_a_long_line_does_not_wrap(self, tmp_path, clock, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        stream = Terminal()
        with RunLog(tmp_path, TRIALS, stream=stream) as log:
            log.begin("unimodal", 0)
            log.write(1, loss=1.0, tokens_per_s=1e6)
            shown = stream.getvalue()
        assert len(shown.removesuffix("\x1b[K").removeprefix("\r")) == 39

    def test_time_left_uses_the_rate_of_each_mode(self, tmp_path, clock):
        stream = io.StringIO()
        trials = [Trial(m, s, 100) for s in (0, 1) for m in ("unimodal", "uml")]
        with RunLog(tmp_path, trials, stream=stream) as log:
            log.begin("unimodal", 0)
            clock.now += 100.0
            log.write(100, loss=1.0)
            log.begin("uml", 0)
            clock.now += 40.0
            log.write(10, loss=1.0)
            shown = stream.getvalue()
        # uml at 4 s a step: 90 left, then unimodal at 1 s and uml at 4 s a step
        assert "left 6:00, run 14:20" in shown.splitlines()[-1]

    def test_time_left_follows_steps_since_the_resume(self, tmp_path, clock):
        stream = io.StringIO()
        with RunLog(tmp_path, [Trial("uml", 0, 100)], stream=stream) as log:
            log.begin("uml", 0, resumed_step=90)
            clock.now += 5.0
            log.write(95, loss=1.0)
        assert "step 95/100  left 0:05, run 0:05" in stream.getvalue()

    def test_elsewhere_a_plain_line_every_ten_seconds(self, tmp_path, clock):
        stream = io.StringIO()
        log = RunLog(tmp_path, [Trial("uml", 0, 100)], stream=stream)
        log.begin("uml", 0)
        for step in range(1, 26):
            clock.now += 1.0
            log.write(step, loss=1.0)
        log.end()
        lines = stream.getvalue().splitlines()
        assert "\r" not in stream.getvalue()
        assert [line.split("step ")[1].split("/")[0] for line in lines[:-1]] == ["1", "11", "21"]
        assert lines[-1] == "[1/1] uml seed 0  25 steps in 0:25  loss 1"
        assert len(read_metrics(tmp_path)) == 25

    def test_a_note_stands_on_a_line_of_its_own(self, tmp_path, clock):
        stream = Terminal()
        with RunLog(tmp_path, TRIALS, stream=stream) as log:
            log.begin("unimodal", 0)
            log.write(1, loss=1.0)
            log.note("checkpoint damaged")
            shown = stream.getvalue()
        assert shown.endswith("\rcheckpoint damaged\x1b[K\n")

    def test_a_trial_that_is_not_in_the_run_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="uml seed 7 is not among"):
            quiet(tmp_path, TRIALS).begin("uml", 7)


def test_metrics_are_strict_json(tmp_path, no_events):
    with quiet(tmp_path) as log:
        log.begin("uml", 0)
        log.write(1, loss=float("inf"), losses={"image": float("nan")})

    def refuse(constant):
        raise AssertionError(constant)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["losses"] == {"image": None}
