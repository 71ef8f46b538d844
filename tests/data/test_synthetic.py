"""Synthetic data keeps what speed depends on, and is a function of its seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from uml_fast.config import ConfigError
from uml_fast.data.synthetic import SHAPES, SyntheticConfig
from uml_fast.recipes.throughput import mixed, throughput


def test_mosi_has_the_lengths_of_the_paper() -> None:
    task = SyntheticConfig(shape="mosi", samples=2048).load(0, "uml")
    assert [(s.name, s.rows.shape[1], s.rows.dtype.name) for s in task.train] == [
        ("x", 20, "float32"),
        ("y", 300, "float32"),
    ]
    for source in task.train:
        assert source.lengths.min() >= 3 and source.lengths.max() == 50
        assert source.lengths.mean() == pytest.approx(19, abs=0.8)
        assert source.lengths.std() > 8
        assert source.rows.mean() == pytest.approx(0, abs=0.02)
        assert source.rows.std() == pytest.approx(1, abs=0.02)


def test_mixed_has_four_raw_types_with_real_spread() -> None:
    task = SyntheticConfig(shape="mixed", samples=256, classes=10).load(0, "uml")
    image, audio, text, features = task.train
    assert [s.rows.dtype.name for s in task.train] == ["uint8", "int16", "int32", "float32"]
    assert (image.lengths == 16).all() and np.ptp(audio.lengths) > 50
    pixels = image.rows.astype(float)
    assert 30 < pixels.std() < 90
    assert np.abs(np.diff(pixels, axis=1)).mean() < 0.2 * pixels.std()
    assert 2000 < audio.rows.astype(float).std() < 4000
    ids, counts = np.unique(text.rows, return_counts=True)
    assert ids.min() >= 0 and ids.max() < SHAPES["mixed"]["text"].vocabulary
    assert ids[counts.argmax()] == 0 and counts.max() > 20 * np.median(counts)
    assert features.rows.shape[1] == 35


def test_unimodal_has_the_same_target_samples() -> None:
    config = SyntheticConfig(samples=64)
    alone, both = config.load(3, "unimodal"), config.load(3, "uml")
    assert [s.name for s in alone.train] == ["x"]
    np.testing.assert_array_equal(alone.train[0].rows, both.train[0].rows)
    np.testing.assert_array_equal(alone.test.rows, both.test.rows)


def test_seeds_and_splits_differ() -> None:
    config = SyntheticConfig(samples=64, held_out=64)
    task, other = config.load(0, "uml"), config.load(1, "uml")
    firsts = [s.rows[0, 0] for t in (task, other) for s in (*t.train, t.validation, t.test)]
    assert len(set(firsts)) == len(firsts)
    np.testing.assert_array_equal(task.train[0].rows, config.load(0, "uml").train[0].rows)


def test_every_class_has_samples() -> None:
    task = SyntheticConfig(samples=10, held_out=10, classes=10).load(0, "uml")
    for source in (*task.train, task.validation, task.test):
        assert sorted(source.labels.tolist()) == list(range(10))


@pytest.mark.parametrize("field", ["samples", "held_out"])
def test_too_few_samples_for_the_classes_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        SyntheticConfig(classes=5, **{field: 4})


@pytest.mark.parametrize("recipe", [throughput, mixed])
def test_recipe_matches_its_data(recipe: object) -> None:
    config = recipe()
    task = config.load(0, "uml")
    for modality, source in zip(config.modalities, task.train, strict=True):
        stem = modality.build(config.backbone.width, config.backbone.width, False)
        stem.check(int(source.lengths.max()), source.rows.shape[1], source.rows.dtype.name)
        assert modality.name == source.name
    assert task.validation.name == task.test.name == config.target
