"""``python -m uml_fast.extract``: from shards, tables and templates to files of features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.made_files import ALL, image_folder, run, write
from tests.encoders import local_models
from uml_fast import extract
from uml_fast.cli import run_main
from uml_fast.config import EvalConfig, MixConfig
from uml_fast.data.folders import FoldersConfig
from uml_fast.encoders.cache import load_features
from uml_fast.recipes import load_recipe
from uml_fast.train import train
from uml_fast.training.measure import embed, pack_source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extract")
    local_models.dinov2(root / "dinov2")
    local_models.gpt2(root / "gpt2")
    run("images", image_folder(root / "photos", 20), root / "shards")
    return root


def call(*arguments: object) -> int:
    return run_main(extract.main, [str(a) for a in arguments])


def test_every_split_of_shards_becomes_a_file(root: Path, tmp_path: Path, capsys) -> None:
    arguments = ("image", root / "shards", "--encoder", root / "dinov2", "--size", 32,
                 "--out", tmp_path, "--batch", 7)  # fmt: skip
    assert call(*arguments) == 0
    files = {p.name: load_features(p) for p in tmp_path.glob("*.safetensors")}
    assert sorted(files) == [f"image-{s}.safetensors" for s in ("test", "train", "val")]
    assert sum(map(len, files.values())) == 40
    train = files["image-train.safetensors"]
    assert train.class_names == ("cat", "dog") and train.rows.shape[1] == 24
    for key, label in zip(train.keys, train.labels.tolist(), strict=True):
        assert key.startswith(train.class_names[label])
    capsys.readouterr()
    assert call(*arguments) == 0
    assert capsys.readouterr().err.count("there already") == 3


def test_texts_come_from_tables_shards_and_templates(root: Path, tmp_path: Path) -> None:
    sentences = {"dog": ["a big dog .", "the dog has fur ."], "bird": ["wings ."]}
    table = write(tmp_path / "prompts.json", json.dumps(sentences))
    run("text", table, tmp_path / "texts", *ALL)
    for name, source in (("table", table), ("shards", tmp_path / "texts")):
        more = (
            "--name",
            name,
            "--encoder",
            root / "gpt2",
            "--out",
            tmp_path,
            "--precision",
            "fp32",
        )
        assert call("text", source, *more) == 0
    a, b = (load_features(tmp_path / f"{n}-train.safetensors") for n in ("table", "shards"))
    assert a.class_names == b.class_names == ("bird", "dog") and len(a) == 3
    assert sorted(a.labels.tolist()) == sorted(b.labels.tolist()) == [0, 1, 1]
    torch.testing.assert_close(a.rows.sum(0), b.rows.sum(0), rtol=1e-4, atol=1e-4)
    template = ("--template", "a photo of a {}.", "the {} .", "--encoder", root / "gpt2")
    more = ("--out", tmp_path, "--precision", "fp32")
    assert call("text", root / "shards", *template, *more) == 0
    c = load_features(tmp_path / "text-train.safetensors")
    assert c.class_names == ("cat", "dog") and c.labels.tolist() == [0, 0, 1, 1]


def test_features_of_elsewhere_are_averaged(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    np.savez(tmp_path / "x.npz", x=rows, y=np.array([0, 1, 0, 1]))
    run("features", tmp_path / "x.npz", tmp_path / "shards", "--names.features", "x",
        "--names.labels", "y", *ALL)  # fmt: skip
    more = ("--out", tmp_path, "--name", "sensor")
    assert call("features", tmp_path / "shards", *more) == 0
    found = load_features(tmp_path / "sensor-train.safetensors")
    assert sorted(found.rows.tolist()) == rows.mean(1).tolist()


def test_what_cannot_be_done_is_one_line(root: Path, tmp_path: Path, capsys) -> None:
    encoder = ("--encoder", root / "gpt2", "--out", tmp_path)
    for arguments, message in (
        (("text", root / "shards", *encoder), "the samples are images"),
        (("text", root / "shards", "--template", "no place", *encoder), "has no {}"),
        (("image", root / "shards", "--encoder", root, "--out", tmp_path),
         "holds no model of timm or transformers"),
        (("text", write(tmp_path / "t.csv", "text\nhello\n"), *encoder),
         "no text has a class"),
    ):  # fmt: skip
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_a_run_folder_is_an_encoder(root: Path, tmp_path: Path) -> None:
    """Its features are the embeddings that its own evaluation uses."""
    config = replace(
        load_recipe("folders"), out=tmp_path / "run", data=FoldersConfig(image=root / "shards"),
        steps=2, seeds=1, modes=("uml",), eval=EvalConfig(probe=False),
        mix=MixConfig(token_budget=256), precision="fp32",
    )  # fmt: skip
    assert train(config) == tmp_path / "run"
    more = ("--encoder", tmp_path / "run", "--out", tmp_path, "--batch", 3)
    assert call("image", root / "shards", *more) == 0
    model, _, task = extract.load_model(tmp_path / "run", "uml", 0)
    expected = embed(model, pack_source(task.test, torch.device("cpu")))
    found = load_features(tmp_path / "image-test.safetensors")
    np.testing.assert_allclose(found.rows.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == task.test.labels.tolist()
