"""The metrics file and TensorBoard events over kills and resumes, errors that name the path."""

import contextlib
import io
import json
import logging
import resource
import sys

import pytest

from uml_fast.training.live import PlannedTrial
from uml_fast.training.log import RunFolderError, RunLog, read_metrics

TRIALS = (PlannedTrial("unimodal", 0, 10), PlannedTrial("uml", 0, 10))


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

    @staticmethod
    @contextlib.contextmanager
    def full_disk(room):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_a_disk_that_is_full_for_a_while_loses_nothing(self, tmp_path, caplog):
        with quiet(tmp_path) as log:
            log.begin("uml", 0)
            log.write(1, loss=1.0)
            with self.full_disk(64):
                for step in (2, 3, 4):
                    log.write(step, loss=1.0)
            assert len(read_metrics(tmp_path)) == 1
            log.write(5, loss=1.0)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
        assert caplog.text.count("metrics.jsonl: File too large; its lines wait") == 1

    def test_a_disk_that_stays_full(self, tmp_path):
        log = quiet(tmp_path)
        log.begin("uml", 0)
        with self.full_disk(64):
            log.write(1, loss=1.0)
            log.write(2, loss=1.0)
            with pytest.raises(RunFolderError, match=r"write .*metrics.jsonl: File too large"):
                log.end()

    def test_an_error_under_way_is_told(self, tmp_path):
        with self.full_disk(64), pytest.raises(KeyError, match="the first"), quiet(tmp_path) as log:
            log.begin("uml", 0)
            log.write(1, loss=1.0)
            log.write(2, loss=1.0)
            raise KeyError("the first")


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


def test_a_trial_that_is_not_in_the_run_is_refused(tmp_path):
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
