"""What the verbs on a run folder say: help with examples, what is missing, one unit, two seeds."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import tiny
from uml_fast import cli, evaluate
from uml_fast.analysis.statistics import paired_comparison
from uml_fast.report.table import Metric
from uml_fast.runtime.files import advice
from uml_fast.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs") / "run"
    train(dataclasses.replace(tiny(), out=folder, steps=4, seeds=2))
    return folder


def test_a_run_of_several_trials_has_results_without_empty_fields(finished: Path) -> None:
    results = json.loads((finished / "summary.json").read_text())["results"]
    assert len(results) == 4 and all("shots" not in r for r in results)


def test_an_unfinished_run_is_measured_as_far_as_it_is_and_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "trials" / "uml-1" / "result.json").unlink()
    assert cli.main(["evaluate", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "not finished: uml-1 (1 of 4 trials); the command that began the run" in err
    head, *rows = out.split("\n\n")[0].splitlines()
    assert head.split() == ["mode", "seed", "probe", "%", "knn", "%", "head", "%"]
    assert [r.split()[:2] for r in rows] == [["unimodal", "0"], ["uml", "0"], ["unimodal", "1"]]
    (given,) = (r for r in evaluate.evaluate(run) if (r["mode"], r["seed"]) == ("uml", 0))
    assert rows[1].split()[2:] == [f"{100 * given[n]:.1f}" for n in ("probe", "knn", "head")]
    for path in run.glob("trials/*/result.json"):
        path.unlink()
    assert cli.main(["evaluate", str(run)]) == 2
    assert "has no finished trial; train it to the end first" in capsys.readouterr().err


def test_baselines_of_the_run_and_those_that_beat_it_are_said_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for seed in (0, 1):
        path = run / "trials" / f"unimodal-{seed}" / "result.json"
        result = json.loads(path.read_text()) | {"baselines": {"pixels": 0.99 + 0.01 * seed}}
        path.write_text(json.dumps(result))
    assert cli.main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "pixels (baseline)" in out and "99.5" in out
    assert "the baseline pixels has a better mean (99.5) than UML" in out
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["baselines"]
    assert (said["name"], said["n"]) == ("pixels", 2)


def test_a_run_folder_without_runs_in_front_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "mine"]) == 2
    assert capsys.readouterr().err == (
        "error: mine holds no run (no run.json); did you mean runs/mine?\n"
    )


def test_inspect_names_the_verbs_for_a_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"is a run folder, not shards: uml-fast evaluate {tmp_path} measures" in said


@pytest.mark.parametrize("verb", ["evaluate", "inspect", "analyse", "export", "plan", "search"])
def test_help_has_an_example_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    examples = [
        x for x in lines if x.startswith("  ") and (f"fast {verb} " in x or f".{verb} " in x)
    ]
    assert examples, text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "RUN", "--seed", "9"], "no finished trial uml-9; there are: unimodal-0, uml-0"),
        (["export", "RUN", "--shots", "1"], "--shots is for heads on frozen features"),
        (["export", "RUN", "--to", "onnx"], "--to"),
        (["export", "RUN", "--out", "/proc/x/y"], "cannot write /proc/x/y"),
        (["inspect", "RUN", "--samples", "-1"], "--samples is -1; it must not be negative"),
        (["analyse", "RUN", "--shifted", "sketch"], "--shifted sketch: write NAME=SHARDS"),
        (["analyse", "RUN", "--pairs", "smell=x"], "--pairs names 'smell'; auxiliaries are"),
        (["evaluate"], "RUN"),
    ],
)
def test_wrong_use_is_one_message(
    finished: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.replace("RUN", str(finished)) for a in arguments]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_two_seeds_have_an_interval_and_no_verdict() -> None:
    two = paired_comparison([0.1, 0.2], [0.4, 0.51])
    assert two.verdict.startswith(
        "two seeds show nothing, take --seeds 5 (UML - unimodal is +30.5 "
    )
    assert two.ci95_low is not None and two.ci95_low > 0
    assert Metric("head").side(dataclasses.asdict(two)) == ""
    three = paired_comparison([0.1, 0.2, 0.3], [0.4, 0.51, 0.6])
    assert Metric("head").side(dataclasses.asdict(three)) == "better"


def test_intervals_of_mean_accuracies_end_at_0_and_100_those_of_differences_do_not() -> None:
    entry = {"ci95_low": -0.194, "ci95_high": 1.204}
    assert Metric("head").interval(entry) == "0.0..100.0"
    assert Metric("head").interval(entry, "+") == "-19.4..+120.4"
    assert Metric("error").interval(entry) == "-0.194..1.2"


def test_advice_follows_the_reason() -> None:
    assert advice(OSError(errno.ENOSPC, "full")).startswith("free some space")
    assert advice(OSError(errno.EACCES, "no")).startswith("make it writable")
    assert advice(OSError(errno.ENOTDIR, "no"), "as OUT") == "name another folder as OUT"
