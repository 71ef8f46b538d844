"""Rows and tables of docs/results.md: pairs, corrections and what a reader sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import effects
from uml_fast.analysis.statistics import paired_comparison


def made_run(folder: Path, accuracy: dict[tuple[str, int | None], list[float]],
             shots: int | None = None) -> Path:  # fmt: skip
    """A finished run: accuracies of seeds 0, 1, ... by mode and shots."""
    folder.mkdir()
    info = {"machine": {"cpu": "chip"}, "versions": {"torch": "2"}, "commit": "0123456789ab"}
    results = [
        {"mode": mode, "seed": seed, "shots": k, "head": value, "cell": {"lr": 1}}
        for (mode, k), values in accuracy.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    simple = [{"name": "nearest class mean", "shots": k, "mean": 0.25}
              for k in dict.fromkeys(k for _, k in accuracy)]  # fmt: skip
    summary = info | {"recipe": "r", "target": "image", "metric": "head", "results": results,
                      "comparison": [], "baselines": simple}  # fmt: skip
    data = {} if shots is None else {"shots": shots}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = info | {"started": "2026-01-02T03:04", "config": {"data": data}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "RESULTS", tmp_path / "rows")


ALONE, BETTER = [0.1, 0.2, 0.15, 0.12], [0.31, 0.42, 0.34, 0.33]


def test_modes_are_compared_with_the_target_alone_and_with_each_other(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {
        (m, k): list(np.array(v) + k / 100)
        for k in (1, 4) for m, v in (("unimodal", ALONE), ("uml", BETTER), ("network", ALONE))
    })  # fmt: skip
    path = effects.keep("made", [str(run)], {"uml": "network"})
    content = json.loads(path.read_text())
    rows = {(r["mode"], r["against"], r["shots"]): r for r in content["rows"]}
    assert set(rows) == {
        (m, o, k) for k in (1, 4, "mean")
        for m, o in (("uml", "unimodal"), ("network", "unimodal"), ("uml", "network"))
    }  # fmt: skip
    expected = paired_comparison(ALONE, BETTER)
    for k in (1, 4, "mean"):
        row = rows["uml", "network", k]
        assert row["paired_diff_mean"] == pytest.approx(expected.paired_diff_mean)
        assert row["ci95_low"] == pytest.approx(expected.ci95_low)
        assert row["p_holm"] > row["p_value"] == pytest.approx(expected.p_value)
    assert "cell" not in content["results"][0]
    table = effects.effect_tables()["made"].splitlines()
    assert table[0] == (
        "| shots | image alone | uml - image alone | network - image alone | uml - network "
        "| nearest class mean |"
    )
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| 1", "| 4", "| mean"]
    assert "**+20.8 [" in table[2] and "+0.0 (no interval)" in table[2]
    assert "4 paired seeds" in table[-1] and "for 9 comparisons" in table[-1]


def test_runs_of_other_shots_and_controls_become_one_table(tmp_path: Path) -> None:
    runs = [
        str(made_run(tmp_path / f"run{k}", {("unimodal", None): ALONE, ("uml", None): BETTER}, k))
        for k in (2, 8)
    ]
    control = made_run(tmp_path / "control", {("uml", None): ALONE}, 2)
    other = made_run(tmp_path / "control8", {("uml", None): ALONE}, 8)
    given = [*runs, f"shifted@{control}", f"shifted@{other}"]
    content = json.loads(effects.keep("made", given, {"uml": "shifted"}).read_text())
    assert {(r["mode"], r["shots"]) for r in content["results"]} == {
        (m, k) for m in ("unimodal", "uml", "shifted") for k in (2, 8)
    }
    shown = effects.effect_tables()["made"]
    assert "| uml - shifted |" in shown
    with pytest.raises(ValueError, match="no seed has both shifted and unimodal at 8 shots"):
        effects.keep("made", given[:3], {"uml": "shifted"})


def test_differences_that_chance_explains_are_not_bold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = {("unimodal", 1): rng.normal(0.3, 0.05, 10), ("uml", 1): rng.normal(0.3, 0.05, 10)}
    run = made_run(tmp_path / "run", {k: v.tolist() for k, v in noise.items()})
    effects.keep("made", [str(run)], {})
    assert "**" not in effects.effect_tables()["made"]
