"""Folds of sounds: no recording is trained on and tested, and what is missing is named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.real_files import DATA, needs_real_files
from uml_fast.data.esc import folds_of, read_class_map, shared_classes, split_fold, usable_folds
from uml_fast.data.source import DataError


def made_clips(folds: int = 5, each: int = 8, classes: int = 3) -> tuple[list[str], np.ndarray]:
    """Names and labels; recordings have two takes."""
    keys, labels = [], []
    for c in range(classes):
        for fold in range(1, folds + 1):
            for i in range(each):
                keys.append(f"c{c}/{fold}-{1000 * c + 100 * fold + i // 2}-{'AB'[i % 2]}")
                labels.append(c)
    return keys, np.array(labels)


def recordings(keys: list[str], places: np.ndarray) -> set[str]:
    return {keys[i].split("/")[1].split("-")[1] for i in places}


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("shots", [1, 2, 4])
def test_a_split_trains_on_one_fold_and_tests_on_the_others(shots: int, seed: int) -> None:
    keys, labels = made_clips()
    folds = folds_of(keys)
    for fold in usable_folds(folds, labels, shots, 3):
        split = split_fold(folds, labels, keys, fold, shots, seed, ("a", "b", "c"))
        assert set(folds[split.train]) == set(folds[split.validation]) == {fold}
        assert len(split.test) == 4 * 3 * 8
        assert fold not in folds[split.test]
        for part in (split.train, split.validation):
            assert np.bincount(labels[part]).tolist() == [shots] * 3
        assert not set(split.train) & set(split.validation)
        assert not recordings(keys, split.test) & recordings(keys, split.train)


def test_the_first_clips_by_name_are_trained_on_and_seeds_draw_others() -> None:
    keys, labels = made_clips()
    turned = np.random.default_rng(0).permutation(len(keys))
    shuffled, folds = [keys[i] for i in turned], folds_of(keys)[turned]
    split = split_fold(folds, labels[turned], shuffled, 2, 2, 0, ("a", "b", "c"))
    names = sorted(shuffled[i] for i in split.train)
    assert names == [f"c{c}/2-{1000 * c + 200}-{take}" for c in range(3) for take in "AB"]
    assert shuffled[split.validation[0]].split("-")[1] not in recordings(shuffled, split.train)
    draws = [
        split_fold(folds, labels[turned], shuffled, 2, 2, seed, ("a", "b", "c")).train.tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_recording_in_two_folds_is_refused() -> None:
    with pytest.raises(DataError, match=r"recording 17 is in fold 1 \(a/1-17-A\) and in fold 2"):
        folds_of(["a/1-17-A", "a/1-18-A", "b/2-17-B"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "no names"),
        (["a/rain"], "sound a/rain: its name does not begin with FOLD-RECORDING"),
        (["1-2-A", "1-3-A"], "all sounds are in fold 1"),
    ],
)
def test_names_without_folds_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        folds_of(keys)


def test_a_class_with_too_few_clips_is_named() -> None:
    keys, labels = made_clips(folds=2, each=4)
    folds = folds_of(keys)
    assert usable_folds(folds, labels, 2, 3) == [1, 2]
    assert usable_folds(folds, labels, 4, 3) == []
    with pytest.raises(DataError, match="fold 1 has 4 clips of cow; 4 shots take 8"):
        split_fold(folds, labels, keys, 1, 4, 0, ("cow", "pig", "hen"))


@needs_real_files
def test_the_real_clips_have_folds_that_share_no_recording() -> None:
    assert DATA is not None
    with tarfile.open(DATA / "esc10_ogg.tar") as tar:
        keys = [m.name for m in tar if m.isfile()]
    folds = folds_of(keys)
    labels = np.unique([k.split("/")[1] for k in keys], return_inverse=True)[1]
    assert np.bincount(folds).tolist() == [0, 80, 40]
    assert usable_folds(folds, labels, 4, 10) == [1]
    assert usable_folds(folds, labels, 2, 10) == [1, 2]


def test_classes_that_all_modalities_have_remain(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"dog_bark": "dog", "rooster": "bird"}))
    names = {
        "audio": ["rain", "dog_bark", "rooster"],
        "image": ["bird", "cat", "dog"],
        "text": ["cat", "bird", "dog"],
    }
    common, places = shared_classes(names, read_class_map(file))
    assert common == ("dog", "bird")
    assert {m: p.tolist() for m, p in places.items()} == {
        "audio": [-1, 0, 1], "image": [1, -1, 0], "text": [-1, 1, 0],
    }  # fmt: skip


def test_class_maps_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    names = {"audio": ["rain", "dog_bark"], "image": ["cat", "dog"]}
    with pytest.raises(DataError, match="0 classes are in all of audio, image"):
        shared_classes(names, {})
    with pytest.raises(DataError, match="dog_brak=dog: no modality has a class 'dog_brak'"):
        shared_classes(names, {"dog_brak": "dog"})
    file = tmp_path / "map.json"
    for content in ("[1]", "{", '{"a": 1}'):
        file.write_text(content)
        with pytest.raises(DataError, match=r"map\.json"):
            read_class_map(file)
