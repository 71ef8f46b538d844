"""A grid of heads as a run: equal search for all, choice by validation, resumable, exported."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.grid.made_features import NAMES, write_all, write_features
from uml_fast import evaluate, export, extract
from uml_fast.cli import parse, run_main
from uml_fast.config import ConfigError
from uml_fast.data.source import DataError
from uml_fast.encoders.cache import load_features
from uml_fast.experiment import train_heads
from uml_fast.grid.cells import HeadSchedule
from uml_fast.grid.data import FeatureFiles
from uml_fast.grid.run import GridConfig, SearchConfig
from uml_fast.recipes import load_recipe
from uml_fast.train import main, train
from uml_fast.training.log import RunFolderError

QUICK = HeadSchedule(steps=60, eval_every=20, patience=2)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("features"))


def config(where: Path, out: Path, **changes: Any) -> GridConfig:
    base = load_recipe("vision_text")
    assert isinstance(base, GridConfig)
    small = replace(
        base, data=FeatureFiles(where=(str(where),)), shots=(1, 4), seeds=2, out=out,
        schedule=QUICK, search=SearchConfig(points=3),
    )  # fmt: skip
    return replace(small, **changes)


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def test_the_default_is_the_papers_grid_with_the_same_budget_for_all() -> None:
    base = load_recipe("vision_text")
    assert isinstance(base, GridConfig)
    cells = list(base.cells())
    counts = Counter(c.group for c in cells)
    assert set(counts.values()) == {240} and len(counts) == 3 * 5 * 3 and base.points == 240
    one = [c for c in cells if c.group == ("unimodal", (), 4, 2)]
    assert (
        len({(c.cell.lr, c.cell.weight_decay, c.cell.batch, c.cell.learn_scale) for c in one})
        == 240
    )
    assert all(1e-4 / 3 <= c.cell.lr <= 3e-3 for c in one)
    paper = replace(base, search=SearchConfig(equal=False))
    counts = Counter(c.variant for c in paper.cells() if (c.cell.shots, c.cell.seed) == (4, 2))
    assert counts == {"unimodal": 24, "uml": 240, "uml_init": 240}
    averaged = [c for c in cells if c.is_averaged]
    assert len(averaged) == len(cells) / 3 and all(c.variant != "unimodal" for c in averaged)
    assert {c.cell.init for c in cells if c.variant == "uml_init"} == {"text"}


def test_fewer_points_are_the_same_for_every_seed_and_shots() -> None:
    cells = list(config(Path(), Path()).cells())
    points = {
        c.group: [] for c in cells if c.variant == "uml"
    }  # fmt: skip
    for c in cells:
        if c.group in points:
            points[c.group].append((c.cell.lr, c.cell.alpha, c.cell.batch, c.is_averaged))
    assert len(points) == 4 and len({tuple(p) for p in points.values()}) == 1
    assert all(len(set(p)) == 3 for p in points.values())


def test_a_run_chooses_by_validation_and_compares_with_paired_seeds(
    where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(config(where, out)) == out
    summary, lines = summary_of(out), records(out)
    assert len(lines) == 3 * 2 * 2 * 3 == summary["heads"] and summary["searched"] == 3
    for r in summary["results"]:
        same = [x for x in lines if x["variant"] == r["mode"] and x["cell"]["seed"] == r["seed"]
                and x["cell"]["shots"] == r["shots"]]  # fmt: skip
        assert len(same) == 3 and r["validation"] == max(x["validation"] for x in same)
        (own,) = (x for x in same if x["cell"] == r["cell"] and x["validation"] == r["validation"])
        assert r["head"] == own["test"]
    rows = summary["comparison"]
    assert [(r["mode"], r["shots"], r["n"]) for r in rows] == [
        ("uml", 1, 2), ("uml", 4, 2), ("uml_init", 1, 2), ("uml_init", 4, 2)]  # fmt: skip
    alone = {r["seed"]: r["head"] for r in summary["results"]
             if (r["mode"], r["shots"]) == ("unimodal", 4)}  # fmt: skip
    with_text = {r["seed"]: r["head"] for r in summary["results"]
                 if (r["mode"], r["shots"]) == ("uml", 4)}  # fmt: skip
    assert rows[1]["paired_diff_mean"] == pytest.approx(
        sum(with_text[s] - alone[s] for s in (1, 2)) / 2
    )
    assert [b["shots"] for b in summary["baselines"]] == [1, 1, 4, 4]
    page = (out / "report.html").read_text()
    assert "4 shots, uml_init" in page and "nearest class mean, 1 shot" in page
    chart = page.split("By training samples")[1].split("</svg>")[0]
    assert all(
        f">{name}<" in chart for name in ("unimodal", "UML", "uml_init", "logistic regression")
    )
    shown = capsys.readouterr().out
    assert "of 3, that was best on the validation samples" in shown

    assert run_main(evaluate.main, [str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    expected = {(r["mode"], r["shots"], r["seed"]): r["head"] for r in summary["results"]}
    got = {(r["mode"], r["shots"], r["seed"]): r["head"] for r in again["results"]}
    assert got == pytest.approx(expected) and len(again["comparison"]) == 4
    assert run_main(evaluate.main, [str(out)]) == 0 and "4 shots" in capsys.readouterr().out


def test_an_exported_head_is_one_matrix_for_the_encoders_rows(where: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(where, out, variants=config(where, out).variants[:1]))
    assert run_main(export.main, [str(out), "--shots", "4", "--seed", "2"]) == 0
    with safe_open(out / "image.safetensors", "pt") as file:
        weight, metadata = file.get_tensor("weight"), file.metadata()
    classes = json.loads(metadata["classes"])
    assert weight.shape == (12, 5) and classes == list(NAMES)
    assert json.loads(metadata["encoder"]) == {"name": "made image"}
    test = load_features(where / "image-test.safetensors")
    accuracy = float(((test.rows @ weight).argmax(1) == test.labels).float().mean())
    chosen = [r for r in summary_of(out)["results"]
              if (r["mode"], r["shots"], r["seed"]) == ("uml", 4, 2)]  # fmt: skip
    assert accuracy == pytest.approx(chosen[0]["head"])
    assert json.loads(metadata["head"])["cell"] == chosen[0]["cell"]
    with pytest.raises(ConfigError, match="no chosen head uml, 9 shots; there are: uml-1"):
        export.main([str(out), "--shots", "9"])
    with pytest.raises(RunFolderError, match="holds heads on frozen features, not a trained model"):
        extract.main(["image", "nothing", "--encoder", str(out), "--out", str(tmp_path)])


def test_a_stopped_run_keeps_its_heads_and_ends_as_one_that_was_not(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(config(where, whole))
    take = train_heads._Taker.take
    taken = []

    def stop_at_ten(self: Any, number: int, *more: Any) -> None:
        taken.append(number)
        if len(taken) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        take(self, number, *more)

    monkeypatch.setattr(train_heads._Taker, "take", stop_at_ten)
    assert train(config(where, out)) is None
    assert len(records(out)) == 10 and "10 of 36 heads are kept" in capsys.readouterr().err
    with (out / "cells.jsonl").open("a") as file:
        file.write('{"variant": "uml", "ro')  # killed within a write
    assert train(config(where, out)) == out
    assert len(taken) == len(set(taken)) == 36, "a head that was kept is trained again"
    a, b = summary_of(whole), summary_of(out)
    assert a["results"] == b["results"] and a["comparison"] == b["comparison"]
    names = sorted(p.name for p in (whole / "heads").iterdir())
    for name in names:
        with (
            safe_open(whole / "heads" / name, "pt") as x,
            safe_open(out / "heads" / name, "pt") as y,
        ):
            assert torch.equal(x.get_tensor("weight"), y.get_tensor("weight"))
    assert len(names) == 12
    assert train(config(where, out, seeds=3)) == out and len(taken) == 54


def test_other_features_or_another_search_do_not_go_on(tmp_path: Path) -> None:
    where, out = write_all(tmp_path / "features"), tmp_path / "run"
    one = {"shots": (1,), "seeds": 1}
    train(config(where, out, **one))
    write_features(where, "text", "train", 6, width=16, noise=0.3, seed=1)
    with pytest.raises(ConfigError, match="begun with other features"):
        train(config(where, out, seeds=2, shots=(1,)))
    with pytest.raises(ConfigError, match=r"search\.points"):
        train(config(where, out, search=SearchConfig(points=2), **one))
    assert train(config(where, out, resume="never", **one)) == out


def test_rows_of_the_table_are_not_searched(where: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    search = SearchConfig(points=2, ratio=(0.5, 2.0))
    made = config(where, out, search=search, rows=("ratio",), shots=(4,))
    train(made)
    summary = summary_of(out)
    rows = [(r["mode"], r["ratio"]) for r in summary["comparison"]]
    assert rows == [("uml", 0.5), ("uml", 2.0), ("uml_init", 0.5), ("uml_init", 2.0)]
    assert all(r["cell"]["ratio"] == r.get("ratio", 1.0) for r in summary["results"])
    assert len(records(out)) == 2 * 2 * (1 + 4)
    assert "4 shots, ratio 0.5" in (out / "report.html").read_text()


def test_aligned_encoders_have_no_projection_and_a_fixed_scale(tmp_path: Path) -> None:
    where = tmp_path
    for split, each in (("train", 8), ("val", 4), ("test", 20)):
        write_features(where, "image", split, each, width=16)
    write_features(where, "text", "train", 6, width=16)
    base = load_recipe("vision_text_clip")
    assert isinstance(base, GridConfig)
    out = tmp_path / "run"
    made = replace(
        base, data=FeatureFiles(where=(str(where),)), out=out, seeds=1, shots=(1,),
        search=replace(base.search, points=2), schedule=QUICK,
    )  # fmt: skip
    train(made)
    cells = [r["cell"] for r in records(out)]
    assert all(c["scale"] == 100 and not c["project"] and not c["learn_scale"] for c in cells)
    narrow = write_all(tmp_path / "narrow")
    with pytest.raises(
        DataError, match="no projections, but the features of its modalities differ"
    ):
        train(replace(made, data=FeatureFiles(where=(str(narrow),)), out=tmp_path / "x"))


def test_unrelated_text_meets_by_number(where: Path, tmp_path: Path) -> None:
    write_features(where, "unrelated", "train", 6, width=16, names=("p", "q", "r", "s", "t", "u"))
    arguments = ["unrelated_text", "--data.where", str(where), "--out", str(tmp_path / "run"),
                 "--shots", "1", "--seeds", "1", "--search.points", "1", "--schedule.steps", "40",
                 "--schedule.eval-every", "20"]  # fmt: skip
    assert run_main(main, arguments) == 0
    modes = [r["mode"] for r in summary_of(tmp_path / "run")["comparison"]]
    assert modes == ["unrelated", "unrelated_init", "related_init"]


def test_a_dry_run_says_how_many_heads_on_what_and_checks_the_features(
    where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shots", "1", "4", "--seeds", "2", "--search.points", "3", "--dry-run"]
    command = ["vision_text", "--out", str(tmp_path / "run"), *options, "--data.where"]
    assert run_main(main, [*command, str(where)]) == 0
    text, _, shown = capsys.readouterr().out.partition("configuration:\n")
    made = config(where, tmp_path)
    assert f"{len(list(made.cells()))} heads (unimodal, uml, uml_init; 1, 4 shots; 2 seeds)" in text
    data = made.data.load(made.modalities, 0, 1).heads
    image = f"image: {len(data.train['image'])} training, {len(data.validation)} validation"
    assert image in text and f"text: {len(data.train['text'])} training samples" in text
    assert json.loads(shown)["recipe"] == "vision_text"
    assert run_main(main, [*command, str(tmp_path / "nothing")]) == 2
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_run_is_said_before_anything_is_written(where: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="torchrun"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        train(config(where, out))
    with pytest.raises(DataError, match=r"image-train\.safetensors"):
        train(config(tmp_path / "empty", out))
    assert not out.exists()
    base = config(where, out)
    for change, message in (
        ({"shots": ()}, "shots is empty"),
        ({"seeds": 0}, "seeds is 0"),
        ({"target": "audio"}, "the first is the target 'audio'"),
        ({"search": replace(base.search, lr=(-1.0,))}, "lr is -1"),
        ({"variants": base.variants[:1] * 2}, "not unique"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(base, **change)


def test_a_grid_takes_its_options_from_the_command_line() -> None:
    arguments = (
        "exchange_rate --data.where a b --shots 0 2 --search.lr 0.1 "
        "--search.auxiliary-shots average 3 --variants.0.init text"
    )
    got = parse(arguments.split(), "train")
    assert isinstance(got, GridConfig)
    assert got.data.where == ("a", "b") and got.shots == (0, 2)  # type: ignore[attr-defined]
    assert got.search.auxiliary_shots == ("average", 3) and got.rows == ("auxiliary_shots",)
    assert got.variants[0].init == "text"
