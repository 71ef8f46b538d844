"""The search: combinations, the choice by validation alone, what is resumed, what failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from uml_fast import search
from uml_fast.config import ConfigError, RunConfig
from uml_fast.data.multibench_made import write_benchmark
from uml_fast.experiment.run import open_run
from uml_fast.training.log import write_json
from uml_fast.training.trial import TrainingError

SMALL = [
    "mosi",
    "--epochs",
    "1",
    "--seeds",
    "2",
    "--backbone.layers",
    "1",
    "--backbone.width",
    "10",
    "--backbone.feed-forward",
    "16",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]
Numbers = Callable[[RunConfig, int], tuple[float, float]]
"""Validation and test of a run with a seed."""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small recipe, on a small generated file."""
    monkeypatch.chdir(tmp_path)
    write_benchmark(tmp_path / "mosi_data.pkl", "mosi", (60, 24, 24))
    return [*SMALL, "--data.file", "mosi_data.pkl"]


def rig(monkeypatch: pytest.MonkeyPatch, numbers: Numbers) -> list[RunConfig]:
    """Training that leaves the given numbers; the list of what was trained."""
    trained: list[RunConfig] = []

    def train(config: RunConfig) -> Path:
        trained.append(config)
        folder = open_run(config)
        print("probe 0.999")
        results = []
        for seed in range(config.seeds):
            validation, test = numbers(config, seed)
            results.append({"mode": config.modes[0], "seed": seed, "shots": None, "probe": test,
                            "validation": validation})  # fmt: skip
        write_json(folder / "summary.json", {"results": results, "baselines": []})
        return folder

    monkeypatch.setattr(search, "train", train)
    return trained


def test_the_choice_is_validations_even_where_test_would_choose_otherwise(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = {1e-3: 0.7, 1e-2: 0.6, 1e-1: 0.5}
    test = {1e-3: 0.41, 1e-2: 0.62, 1e-1: 0.93}
    uml = {"unimodal": 0.0, "uml": 0.05}

    def numbers(config: RunConfig, seed: int) -> tuple[float, float]:
        lr, mode = config.optim.lr, config.modes[0]
        flip = 0.25 if mode == "uml" and lr == 1e-2 else 0.0
        return validation[lr] + flip, test[lr] + uml[mode] + seed / 100

    rig(monkeypatch, numbers)
    assert search.main([*base, "--over", "optim.lr=1e-3,1e-2,1e-1"]) == 0
    summary = json.loads(Path("runs/mosi-search/summary.json").read_text())
    chosen = {m: [t["name"] for t in ts if t["is_chosen"]] for m, ts in summary["tried"].items()}
    assert chosen == {"unimodal": ["optim.lr=1e-3"], "uml": ["optim.lr=1e-2"]}
    row = summary["comparison"][0]
    assert row["unimodal_mean"] == pytest.approx(0.415) and row["n"] == 2
    assert row["uml_mean"] == pytest.approx(0.675)
    assert summary["searched"] == 3
    printed = capsys.readouterr().out
    assert "of 3, that was best on the validation samples" in printed
    assert "not the choice among 3 unimodal and 3 uml combinations" in printed
    assert "0.999" not in printed and "93" not in printed, "test numbers that choose nothing"
    assert "optim.lr=1e-3  70.0 %" in printed
    assert "best on the validation samples" in Path("runs/mosi-search/report.html").read_text()


def test_lower_is_better_for_errors(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = rig(monkeypatch, lambda config, seed: (config.optim.lr, 1.0))
    over = {"optim.lr": ("1e-2", "1e-3")}
    outcomes = [search.run_candidate(c) for c in search.candidates(base, over)]
    assert len(trained) == 4
    unimodal = [o for o in outcomes if o is not None and o.candidate.mode == "unimodal"]
    assert search.choose(unimodal, lower_is_better=True).candidate.name == "optim.lr=1e-3"
    assert search.choose(unimodal, lower_is_better=False).candidate.name == "optim.lr=1e-2"


def test_unimodal_is_not_trained_twice_for_what_it_has_not(base: list[str]) -> None:
    over = {"optim.lr": ("1e-3", "1e-2"), "mix.warmup-epochs": ("0", "10", "20")}
    warm = [*base, "--mix.policy", "warmup"]
    found = search.candidates(warm, over)
    by_mode = {m: [c for c in found if c.mode == m] for m in ("unimodal", "uml")}
    assert [len(v) for v in by_mode.values()] == [2, 6]
    assert {c.config.mix.warmup_epochs for c in by_mode["uml"]} == {0, 10, 20}
    assert len({c.config.folder for c in found}) == len(found)
    share = search.candidates(base, {"modalities.0.share": ("1", "2")})
    assert [c.mode for c in share] == ["unimodal", "uml", "unimodal", "uml"], "its rows change"
    other = search.candidates(base, {"modalities.1.weight": ("1", "2")})
    assert [c.mode for c in other] == ["unimodal", "uml", "uml"]


def test_a_search_goes_on_where_it_was(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = rig(monkeypatch, lambda config, seed: (0.5, 0.5))
    arguments = [*base, "--over", "optim.lr=1e-3,1e-2"]
    fake = search.train
    monkeypatch.setattr(search, "train", lambda c: fake(c) if len(trained) < 3 else None)
    assert search.main(arguments) == 0 and len(trained) == 3
    assert "the same command continues" in capsys.readouterr().err
    assert not Path("runs/mosi-search/summary.json").exists()
    monkeypatch.setattr(search, "train", fake)
    search.main(arguments)
    assert len(trained) == 4, "only what was missing"
    search.main([*arguments[:-1], "optim.lr=1e-3,1e-2,1e-1"])
    assert len(trained) == 6, "another value"
    search.main([*arguments, "--seeds", "3"])
    assert len(trained) == 10, "another seed"


def test_a_combination_that_diverges_is_named_and_not_chosen(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def numbers(config: RunConfig, seed: int) -> tuple[float, float]:
        if config.optim.lr == 1.0 and config.modes == ("uml",):
            raise TrainingError("the loss is nan at step 3")
        return config.optim.lr, 0.5

    rig(monkeypatch, numbers)
    search.main([*base, "--over", "optim.lr=1e-3,1"])
    printed = capsys.readouterr().out
    assert "  optim.lr=1  failed: the loss is nan at step 3" in printed
    assert "* optim.lr=1e-3  0.1 %" in printed and "* optim.lr=1  100.0 %" in printed

    def fail(config: RunConfig, seed: int) -> tuple[float, float]:
        raise TrainingError("the loss is nan")

    rig(monkeypatch, fail)
    with pytest.raises(ConfigError, match="every combination failed; the last: the loss is nan"):
        search.main([*base, "--over", "optim.lr=2,1", "--out", "runs/failing"])


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing to search"),
        (["--over"], "nothing to search"),
        (["--over", "optim.lr=1e-3"], "give FIELD=VALUE,VALUE"),
        (["--over", "optim.lr=1,1"], "all different"),
        (["--over", "optim.lr"], "give FIELD=VALUE,VALUE"),
        (["--over", "optim.lr=1,2", "optim.lr=3,4"], r"names optim\.lr twice"),
        (["--over", "optim.lr=1,2", "--resume", "runs/x"], "give it as --out"),
    ],
)
def test_bad_searches_are_said_in_words(base: list[str], over: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search.main([*base, *over])
    assert not Path("runs").exists()


def test_an_unknown_field_or_value_is_refused_before_anything_trains(
    base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for over, said in (("optim.rate=1,2", "optim.rate"), ("optim.lr=1,-2", "must be positive")):
        with pytest.raises(SystemExit):
            search.main([*base, "--over", over])
        assert said in capsys.readouterr().err and not Path("runs").exists()


def test_a_search_of_real_trials_leaves_ordinary_runs(base: list[str]) -> None:
    assert search.main([*base, "--over", "optim.lr=1e-3,1e-2"]) == 0
    folder = Path("runs/mosi-search")
    summary = json.loads((folder / "summary.json").read_text())
    assert (folder / "report.html").exists()
    for mode, tried in summary["tried"].items():
        for t in tried:
            run = json.loads((folder / t["folder"] / "summary.json").read_text())
            own = [r["validation"] for r in run["results"]]
            assert {r["mode"] for r in run["results"]} == {mode} and len(own) == 2
            assert t["validation"] == pytest.approx(sum(own) / 2)
        best = max(t["validation"] for t in tried)
        assert next(t["validation"] for t in tried if t["is_chosen"]) == best
