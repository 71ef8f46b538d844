"""The verb analyse on real run folders: against the run's own results, and what it leaves out."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.report.test_report import Page
from tests.tiny import tiny_prediction
from uml_fast.analyse import main
from uml_fast.cli import run_main
from uml_fast.config import (
    CheckpointConfig,
    EvalConfig,
    MixConfig,
    ObjectiveConfig,
    OptimConfig,
)
from uml_fast.data.folders import FoldersConfig
from uml_fast.data.shards.files import ShardSet
from uml_fast.experiment.trained import load_model
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.prepare import main as prepare
from uml_fast.recipes import load_recipe
from uml_fast.report.analyses import section
from uml_fast.train import train
from uml_fast.training.measure import embed, pack_source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COLOURS = {"cat": (200, 60, 60), "dog": (60, 200, 60), "owl": (60, 60, 200), "eel": (9, 9, 9)}
TRAINED = ("cat", "dog", "owl")


def write_pictures(folder: Path, names: tuple[str, ...], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.array(COLOURS[name]) + rng.normal(0, 300, (8, 8, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image and text of a run, a shifted set that lacks a class and has another, partners."""
    root = tmp_path_factory.mktemp("analyse")
    write_pictures(root / "pictures" / "train", TRAINED, 12, 0)
    write_pictures(root / "pictures" / "test", TRAINED, 8, 1)
    write_pictures(root / "sketch" / "test", ("dog", "cat", "eel"), 6, 2)
    write_pictures(root / "strange" / "test", ("eel",), 6, 3)
    (root / "texts").mkdir()
    rows = [{"text": f"a {name} number {i}", "label": name} for name in TRAINED for i in range(9)]
    (root / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, name in (
        ("images", "pictures"), ("images", "sketch"), ("images", "strange"), ("text", "texts"),
    ):  # fmt: skip
        assert prepare([kind, str(root / name), str(root / "shards" / name)]) == 0
    own = ShardSet.open(root / "shards" / "pictures", "test")
    (root / "shards" / "pairs").mkdir()
    with tarfile.open(root / "shards" / "pairs" / "test-0.tar", "w") as tar:
        for i in range(len(own)):
            text = f"picture of {own.class_names[own.label[i]]} {i}".encode()
            member = tarfile.TarInfo(f"{own.key(i)}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return root / "shards"


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds that kept its checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = dataclasses.replace(
        load_recipe("folders"),
        modalities=(
            ImageConfig(name="image", height=8, width=8, patch_height=4, patch_width=4),
            TextConfig(name="text", vocabulary=256, positions=40),
        ),
        data=FoldersConfig(image=shards / "pictures", text=shards / "texts"),
        backbone=TransformerConfig(width=16, layers=1, heads=2, feed_forward=32),
        mix=MixConfig(token_budget=300), optim=OptimConfig(lr=1e-2),
        eval=EvalConfig(probe=False, every=10), checkpoint=CheckpointConfig(every=6, keep=9),
        steps=18, seeds=2, log_every=6, out=folder,
    )  # fmt: skip
    assert train(config) == folder
    return folder


@pytest.fixture(scope="module")
def analysed(run: Path, shards: Path) -> dict[str, Any]:
    """analysis.json with a shifted set, the test set as one, and true pairs."""
    arguments = [
        str(run), "--shifted", f"sketch={shards / 'sketch'}", f"same={shards / 'pictures'}",
        f"strange={shards / 'strange'}", "--pairs", f"text={shards / 'pairs'}",
    ]  # fmt: skip
    assert main(arguments) == 0
    found: dict[str, Any] = json.loads((run / "analysis.json").read_text())
    return found


def values(analysed: dict[str, Any], quantity: str, what: str = "") -> dict[tuple[str, int], float]:
    return {
        (v["mode"], v["seed"]): v["value"]
        for v in analysed["values"]
        if v["quantity"] == quantity and v["what"] == what
    }


def row(analysed: dict[str, Any], title: str) -> dict[str, Any]:
    (found,) = [r for r in analysed["rows"] if r["title"] == title]
    return found


def test_the_run_s_own_test_set_has_the_accuracy_of_its_results(
    run: Path, analysed: dict[str, Any]
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    expected = {(r["mode"], r["seed"]): r["head"] for r in summary["results"]}
    assert values(analysed, "shift", "same") == pytest.approx(expected)
    assert values(analysed, "shift_all", "same") == {}  # it has every class
    assert values(analysed, "test") == pytest.approx(expected)
    (bars,) = [c for c in analysed["charts"] if c["kind"] == "bars"]
    assert bars["names"] == ["test", "sketch", "same"]
    assert bars["bars"]["uml"][0] == bars["bars"]["uml"][2]
    comparison = summary["comparison"][0]
    shown = row(analysed, "accuracy on same")
    assert shown["paired_diff_mean"] == pytest.approx(comparison["paired_diff_mean"])
    assert shown["n"] == 2 and shown["in_points"]


def test_a_set_of_other_classes_is_judged_on_those_it_shares(
    run: Path, analysed: dict[str, Any], shards: Path
) -> None:
    note = row(analysed, "accuracy on sketch")["note"]
    assert note == "12 samples, 2 of the head's 3 classes"
    got = values(analysed, "shift", "sketch")
    everywhere = values(analysed, "shift_all", "sketch")
    assert all(got[t] >= everywhere[t] for t in got)
    assert "none of the set's classes (eel" in analysed["skipped"]["shift to strange"]


def test_margins_and_boundary_are_those_of_the_trained_head(
    run: Path, analysed: dict[str, Any]
) -> None:
    model, _, task = load_model(run, "uml", 1)
    assert model.head is not None
    x = embed(model, pack_source(task.test, next(model.parameters()).device)).astype(np.float64)
    w, y = model.head.weight.detach().numpy().astype(np.float64), task.test.labels
    logits = x @ w.T
    margins = []
    for i, c in enumerate(y):
        j = max((k for k in range(3) if k != c), key=lambda k: logits[i, k])
        margins.append((logits[i, c] - logits[i, j]) / np.linalg.norm(w[c] - w[j]))
    assert values(analysed, "margin")["uml", 1] == pytest.approx(np.mean(margins), rel=1e-5)
    (chart,) = [c for c in analysed["charts"] if c["kind"] == "boundary"]
    assert [p["mode"] for p in chart["panels"]] == ["unimodal", "uml"]
    assert [len(p) for p in chart["panels"][0]["points"]] == [8, 8]
    assert set(chart["names"]) < set(TRAINED)


def test_alignment_is_of_the_head_with_texts_in_uml_alone(analysed: dict[str, Any]) -> None:
    assert set(values(analysed, "alignment", "text")) == {("uml", 0), ("uml", 1)}
    shown = row(analysed, "alignment of the head with text")
    assert shown["unimodal_mean"] is None and shown["uml_mean"] > 0
    assert shown["note"].count(",") >= 2  # a permutation p for every seed
    (heat,) = [c for c in analysed["charts"] if c["kind"] == "heat"]
    assert np.shape(heat["matrix"]) == (3, 3) and heat["names"] == list(TRAINED)


def test_neurons_are_measured_on_pairs_and_tracked_over_checkpoints(
    analysed: dict[str, Any],
) -> None:
    what = "image and text"
    strongest = values(analysed, "neuron", what)
    assert set(strongest) == {("uml", 0), ("uml", 1)}
    assert row(analysed, f"strongest unit between {what}")["note"] == (
        "largest |r| over 24 true pairs"
    )
    (bars,) = [c for c in analysed["charts"] if c["kind"] == "neurons"]
    assert abs(bars["overall"][0]) == pytest.approx(strongest["uml", 0], abs=1e-4)
    assert set(bars["by_label"]) == set(TRAINED)
    (tracked,) = [c for c in analysed["charts"] if c["kind"] == "lines"]
    assert tracked["x"] == [0, 6, 12, 18]
    first = next(iter(tracked["lines"].values()))
    assert first[-1] == pytest.approx(bars["overall"][0], abs=1e-4)
    assert abs(first[0]) <= bars["baseline"] + 1e-4


def test_report_shows_the_analyses(run: Path, analysed: dict[str, Any]) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert (page.open, page.crossed) == ([], [])
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    for chart in analysed["charts"]:
        assert re.search(re.escape(f'aria-label="{chart["title"]}"'), text)
    assert "mean functional margin paper: F.3, figure 44" in page.all_text
    assert "Left out, and why" in page.all_text and "exchange rate" in page.all_text
    compared = [r for r in analysed["rows"] if r["paired_diff_mean"] is not None]
    judged = sum(r["better"] != "neither" for r in compared)
    assert f"of the {judged} that have a better direction" in page.all_text
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", text)
    assert len(text) < 600_000


def test_what_is_left_out_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = (run / "analysis.json").read_text(), (run / "report.html").read_text()
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "left out: robustness under shift: no shifted set is given" in printed
    assert "left out: multimodal neurons: the data have no true pairs" in printed
    assert "95 % interval" in printed
    assert "mutual neighbours of embeddings of both modes, %\n" in printed
    for name, text in zip(("analysis.json", "report.html"), before, strict=True):
        (run / name).write_text(text)


def test_a_report_of_fewer_trials_says_so(run: Path, analysed: dict[str, Any]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    plain = analysed | {"charts": []}
    fewer = plain | {"trials": analysed["trials"][:2]}
    assert "Made of 2 trials, the run has 4: analyse it again" in section(fewer, summary)
    assert "analyse it again" not in section(plain, summary)


def test_a_run_without_a_head_gets_what_it_allows(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_prediction(), out=tmp_path / "run", seeds=1, steps=4)
    assert train(config) is not None
    assert main([str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert "the run has no head" in found["skipped"]["margins"]
    assert {r["quantity"] for r in found["rows"]} == {"silhouette", "davies_bouldin", "cka", "knn"}
    compared = [r for r in found["rows"] if r["paired_diff_mean"] is not None]
    assert all("one seed: no interval" in r["verdict"] for r in compared)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shifted", "sketch"], "--shifted sketch: write NAME=SHARDS, every name once"),
        (["--shifted", "a=x", "a=y"], "--shifted a=y: write NAME=SHARDS, every name once"),
        (["--shifted", "a=/absent"], "/absent"),
        (["--pairs", "image=x"], "--pairs names 'image'; auxiliaries are ['text']"),
        (["--pairs", "text={shards}/texts"], "have the name of a test sample of image"),
        (["--shifted", "a={shards}/pairs"], "the shards hold text, this takes images"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    run: Path, shards: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.format(shards=shards) for a in arguments]
    assert run_main(main, [str(run), *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, [str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_what_the_head_reads_gives_its_logits() -> None:
    from uml_fast.experiment.observe import read_by_head
    from uml_fast.model.head import SharedHead

    class Model:
        def __init__(self, head: SharedHead) -> None:
            self.head, self.logits = head, head

    v = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    for hidden in (0, 7):
        config = ObjectiveConfig(classes=3, project=("a",), learn_scale=True, head_hidden=hidden)
        head = SharedHead(config, 6, ("a", "b"))
        with torch.no_grad():
            head.scale["a"].fill_(2.5)
        rows, weight = read_by_head(Model(head), "a", v)  # type: ignore[arg-type]
        assert weight is not None
        expected = head(torch.from_numpy(v), "a").detach().numpy()
        np.testing.assert_allclose(rows @ weight.T, expected, rtol=1e-5, atol=1e-6)


def test_multibench_has_true_pairs_of_its_own(tmp_path: Path) -> None:
    from tests.recipes.test_multibench import recipe

    assert train(recipe(tmp_path, "mustard")) is not None
    assert main([str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    shown = row(found, "strongest unit between vision and text")
    _, _, task = load_model(tmp_path / "run", "uml", 0)
    assert shown["note"] == f"largest |r| over {len(task.test)} true pairs"
    assert 0 < shown["uml_mean"] <= 1
    assert "multimodal neurons" not in found["skipped"]
    assert row(found, "CKA of vision and text over true pairs, untrained")["n"] == 1


def test_samples_without_classes_are_compared_by_their_embeddings(tmp_path: Path) -> None:
    config = dataclasses.replace(
        load_recipe("gaussian"), out=tmp_path / "run", seeds=1, steps=2,
        eval=EvalConfig(probe=False),
    )  # fmt: skip
    assert train(config) is not None
    assert main([str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert {r["quantity"] for r in found["rows"]} == {"cka", "knn"}
    assert found["skipped"]["what needs classes"] == "the test samples have none"
