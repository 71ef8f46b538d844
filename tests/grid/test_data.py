"""Features of several modalities meet by the names of their classes; who lacks one is told."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.grid.made_features import NAMES, write_all, write_features
from uml_fast.config import ConfigError
from uml_fast.data.source import DataError, say_once
from uml_fast.encoders.cache import load_features
from uml_fast.grid.data import FeatureFiles


@pytest.fixture(autouse=True)
def _say_it_again() -> None:
    say_once.cache_clear()


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return write_all(tmp_path)


def load(files: FeatureFiles, *modalities: str):
    return files.load(("image", *(modalities or ("text",))), 1, 0)


def test_splits_and_classes_of_whole_files(where: Path) -> None:
    data = load(FeatureFiles(where=(str(where),)))
    heads = data.heads
    assert data.class_names == NAMES and heads.classes == 5 and heads.target == "image"
    assert [len(heads.train["image"]), len(heads.validation), len(heads.test)] == [40, 20, 100]
    assert len(heads.train["text"]) == 30 and data.encoder == {"name": "made image"}
    train = load_features(where / "image-train.safetensors")
    assert torch.equal(heads.train["image"].rows, train.rows)


def test_a_modality_comes_from_the_first_folder_that_has_it(where: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_features(other, "text", "train", 2, width=16)
    assert len(load(FeatureFiles(where=(str(other), str(where)))).heads.train["text"]) == 10
    assert len(load(FeatureFiles(where=(str(where), str(other)))).heads.train["text"]) == 30


def test_classes_in_one_modality_alone_are_named_and_handled_as_asked(
    where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_features(where, "text", "train", 6, width=16, names=("dog", "cat", "fox", "ant"))
    files = FeatureFiles(where=(str(where),))
    with caplog.at_level(logging.INFO):
        data = load(files)
    assert "classes that image does not have are left out: fox" in caplog.text
    assert "classes that only image has learn from image alone: bee, elk" in caplog.text
    text = load_features(where / "text-train.safetensors")
    assert data.class_names == NAMES and len(data.heads.train["text"]) == 18
    dogs = data.heads.train["text"].rows[data.heads.train["text"].labels == NAMES.index("dog")]
    assert torch.equal(dogs, text.rows[text.labels == 0])
    common = load(replace(files, classes="common"))
    assert common.class_names == ("ant", "cat", "dog") and len(common.heads.test) == 60
    everything = load(replace(files, classes="all"))
    assert everything.class_names == (*NAMES, "fox") and len(everything.heads.train["text"]) == 24
    renamed = load(replace(files, same=("fox=elk",)))
    assert len(renamed.heads.train["text"]) == 24


def test_classes_that_never_meet_need_names_or_numbers(where: Path) -> None:
    write_features(where, "cars", "train", 3, width=16, names=("a", "b", "c", "d", "e", "f", "g"))
    files = FeatureFiles(where=(str(where),))
    with pytest.raises(DataError, match=r"none of its classes \(a, b, c, d, e, \.\.\. \(7\)\)"):
        load(files, "cars")
    data = load(replace(files, numbered=("cars",)), "cars")
    cars = load_features(where / "cars-train.safetensors")
    assert torch.equal(data.heads.train["cars"].rows, cars.rows[cars.labels < 5])
    assert torch.equal(data.heads.train["cars"].labels, cars.labels[cars.labels < 5])
    assert data.class_names == NAMES
    with pytest.raises(DataError, match=r"data\.same: x=dog"):
        load(replace(files, same=("x=dog",)))
    with pytest.raises(ConfigError, match="write auxiliary=target names"):
        FeatureFiles(same=("x",))


def test_without_val_and_test_a_tenth_of_each_class_is_held_out(where: Path, caplog) -> None:
    for split in ("val", "test"):
        (where / f"image-{split}.safetensors").unlink()
    with caplog.at_level(logging.INFO):
        heads = load(FeatureFiles(where=(str(where),))).heads
    assert [len(heads.train["image"]), len(heads.validation), len(heads.test)] == [30, 5, 5]
    rows = torch.cat([heads.train["image"].rows, heads.validation.rows, heads.test.rows])
    assert len(rows.unique(dim=0)) == 40 and "no split 'test'" in caplog.text


def test_an_averaged_modality_has_one_mean_of_each_class(where: Path) -> None:
    data = load(FeatureFiles(where=(str(where),)))
    mean, text = data.averaged().heads.train, data.heads.train["text"]
    assert mean["text"].labels.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(mean["text"].rows[3], text.rows[text.labels == 3].mean(0))
    assert mean["image"] is data.heads.train["image"]


def test_what_is_not_there_is_named(where: Path) -> None:
    with pytest.raises(
        DataError, match=r"audio: no audio-train\.safetensors in .*uml_fast\.extract"
    ):
        load(FeatureFiles(where=(str(where),)), "audio")
    with pytest.raises(ConfigError, match=r"data\.where names no folder"):
        load(FeatureFiles())
