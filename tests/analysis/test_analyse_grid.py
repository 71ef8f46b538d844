"""The verb analyse on a run of heads on frozen features: margins, alignment, shift, rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.grid.made_features import NAMES, write_all, write_features
from uml_fast.analyse import main
from uml_fast.cli import run_main
from uml_fast.encoders.cache import load_features
from uml_fast.experiment.observe_grid import chosen_heads, mean_words
from uml_fast.grid.cells import HeadSchedule
from uml_fast.grid.data import FeatureFiles
from uml_fast.grid.run import GridConfig, SearchConfig
from uml_fast.recipes import load_recipe
from uml_fast.train import train

SUBSET = ("cat", "dog", "elk")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_all(tmp_path_factory.mktemp("features"))
    (folder / "shifted").mkdir()
    write_features(folder / "shifted", "image", "test", 15, noise=2.5, names=SUBSET, seed=5)
    return folder


@pytest.fixture(scope="module")
def run(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe exchange_rate, small: 2 image shots x 2 text shots x 3 seeds."""
    folder = tmp_path_factory.mktemp("run") / "run"
    base = load_recipe("exchange_rate")
    assert isinstance(base, GridConfig)
    search = SearchConfig(lr=(0.03, 0.01), alpha=(1.5,), points=2, auxiliary_shots=(1, 6))
    small = replace(
        base, data=FeatureFiles(where=(str(where),)), shots=(1, 4), seeds=3, out=folder,
        schedule=HeadSchedule(steps=120, eval_every=20, patience=5), search=search,
    )  # fmt: skip
    assert train(small) == folder
    return folder


@pytest.fixture(scope="module")
def analysed(run: Path, where: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    texts = tmp_path_factory.mktemp("texts") / "texts.json"
    texts.write_text(json.dumps({"ant": ["a small ant", "ants"], "bee": ["bees are very loud"]}))
    assert mean_words(texts) == pytest.approx(8 / 3)
    shifted = f"far={where / 'shifted' / 'image-test.safetensors'}"
    assert main([str(run), "--shifted", shifted, "--texts", str(texts)]) == 0
    found: dict[str, Any] = json.loads((run / "analysis.json").read_text())
    return found


def values(analysed: dict[str, Any], quantity: str, setting: str) -> dict[tuple[str, int], float]:
    return {
        (v["mode"], v["seed"]): v["value"]
        for v in analysed["values"]
        if v["quantity"] == quantity and v["setting"] == setting
    }


def stored(run: Path, name: str) -> np.ndarray:
    with safe_open(run / "heads" / name, "np") as file:
        return np.asarray(file.get_tensor("weight"), np.float64)


def test_shift_is_measured_among_the_classes_of_the_set(
    run: Path, where: Path, analysed: dict[str, Any]
) -> None:
    far = load_features(where / "shifted" / "image-test.safetensors")
    places = [NAMES.index(n) for n in far.class_names]
    name = next(p.name for p in (run / "heads").glob("unimodal-4shots-*seed2*"))
    logits = far.rows.numpy() @ stored(run, name)
    expected = float((logits[:, places].argmax(1) == far.labels.numpy()).mean())
    for setting in ("4 shots, auxiliary shots 1", "4 shots, auxiliary shots 6"):
        assert values(analysed, "shift", setting)["unimodal", 2] == pytest.approx(expected)
        assert ("uml", 2) in values(analysed, "shift", setting)
    shown = next(r for r in analysed["rows"] if r["quantity"] == "shift")
    assert shown["note"] == "45 samples, 3 of the head's 5 classes" and shown["n"] == 3


def test_alignment_is_that_of_the_head_behind_the_projection(analysed: dict[str, Any]) -> None:
    """More texts, more alignment; it is only there because training once more gave the same."""
    few = values(analysed, "alignment", "4 shots, auxiliary shots 1")
    many = values(analysed, "alignment", "4 shots, auxiliary shots 6")
    assert set(few) == set(many) == {("uml", s) for s in (1, 2, 3)}
    assert np.mean(list(many.values())) > np.mean(list(few.values()))
    assert not any(k.startswith("alignment") for k in analysed["skipped"])


def test_rate_is_the_plane_through_the_chosen_heads(run: Path, analysed: dict[str, Any]) -> None:
    (rate,) = analysed["exchange_rates"]
    points = []
    for h in chosen_heads(run):
        texts = 0 if h.mode == "unimodal" else dict(h.row)["auxiliary_shots"]
        points.append((1.0, h.cell.shots, texts, h.test))
    assert len(points) == 3 * 2 * 3
    table = np.array(points)
    fitted = np.linalg.lstsq(table[:, :3], table[:, 3])[0]
    assert rate["per_image"]["mean"] == pytest.approx(fitted[1])
    assert rate["per_text"]["mean"] == pytest.approx(fitted[2])
    assert rate["words_per_image"] == pytest.approx(fitted[1] / fitted[2] * 8 / 3)
    (plane,) = [c for c in analysed["charts"] if c["kind"] == "plane"]
    assert sorted(set(plane["text_shots"])) == [0, 1, 6]
    assert 'aria-label="exchange rate (uml)"' in (run / "report.html").read_text()


def test_settings_head_their_rows(run: Path, analysed: dict[str, Any]) -> None:
    settings = list(dict.fromkeys(r["setting"] for r in analysed["rows"]))
    assert settings == [f"{s}, auxiliary shots {t}" for s in ("1 shot", "4 shots") for t in (1, 6)]
    text = (run / "report.html").read_text()
    assert text.count('<th colspan="8">4 shots, auxiliary shots 6</th>') == 1
    assert {c["kind"] for c in analysed["charts"]} == {
        "histogram", "boundary", "heat", "plane", "bars",
    }  # fmt: skip


def test_one_number_of_texts_gives_no_rate_and_other_features_no_alignment(
    where: Path, tmp_path: Path
) -> None:
    base = load_recipe("vision_text")
    assert isinstance(base, GridConfig)
    small = replace(
        base, data=FeatureFiles(where=(str(where),)), shots=(2,), seeds=1, out=tmp_path / "run",
        schedule=HeadSchedule(steps=40, eval_every=20, patience=1), search=SearchConfig(points=1),
    )  # fmt: skip
    assert train(small) is not None
    path = next((tmp_path / "run" / "heads").glob("uml-*"))
    with safe_open(path, "pt") as file:
        changed, metadata = 1.5 * file.get_tensor("weight"), file.metadata()
    save_file({"weight": changed}, path, metadata)
    assert main([str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert "the run has one number of texts alone" in found["skipped"]["exchange rate"]
    assert "once more gives another head" in found["skipped"]["alignment with text"]
    aligned = {v["setting"] for v in found["values"] if v["quantity"] == "alignment"}
    assert aligned == {"2 shots, uml_init"}
    assert found["exchange_rates"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "text=x"], "--pairs is for runs of models"),
        (["--shifted", "a=/absent.safetensors"], "/absent.safetensors does not exist"),
        (["--texts", "/absent.json"], "/absent.json"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    run: Path, analysed: dict[str, Any], arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_main(main, [str(run), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_shifted_features_of_another_encoder_are_left_out(run: Path, tmp_path: Path) -> None:
    write_features(tmp_path, "image", "test", 3, width=7)
    before = (run / "analysis.json").read_text()
    assert main([str(run), "--shifted", f"other={tmp_path / 'image-test.safetensors'}"]) == 0
    found = json.loads((run / "analysis.json").read_text())
    assert "other has 7 features, the head reads 12" in found["skipped"]["shift to other"]
    (run / "analysis.json").write_text(before)
