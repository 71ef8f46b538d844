"""The embedded task: what images, texts and sounds hold, and that nothing leaks between parts."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="pip install scikit-learn")

from uml_fast.config import ConfigError
from uml_fast.data import digits, numbers
from uml_fast.data.digits import handwriting
from uml_fast.data.numbers import NumbersConfig, describe, name, phrasings, text


@pytest.fixture(scope="module")
def task():
    return NumbersConfig().load(3, "unimodal")


def test_every_class_has_its_images(task):
    for source, each in ((task.train[0], 2), (task.validation, 5), (task.test, 15)):
        assert np.array_equal(np.bincount(source.labels, minlength=100), np.full(100, each))
        assert source.rows.dtype == np.uint8 and source.rows.shape[1] == 128
        assert np.all(source.lengths == 1)
    assert task.train[0].rows.max() == 255


def test_each_half_shows_the_digit_of_its_place(task):
    pixels, shown = digits._scans()
    known = {p.tobytes(): int(d) for p, d in zip(pixels, shown, strict=True)}
    for i, label in enumerate(task.test.labels):
        picture = task.test.sample(i).reshape(8, 16)
        halves = (picture[:, :8], picture[:, 8:])
        assert [known[half.tobytes()] for half in halves] == [label // 10, label % 10]
        assert describe(task.test, i) == f"{label:02d}"


def test_parts_share_no_scan():
    parts = [handwriting(p, 5) for p in ("train", "validation", "test")]
    assert sum(len(p.digits) for p in parts) == 1797
    whole = np.concatenate([p.pixels for p in parts])
    expected, _ = digits._scans()
    assert np.array_equal(np.sort(whole.view("V64").ravel()), np.sort(expected.view("V64").ravel()))


def test_the_seed_decides_the_images_and_the_mode_does_not(monkeypatch):
    monkeypatch.setattr(numbers, "speech", lambda config: text())
    config = NumbersConfig()
    first, other = config.load(0, "unimodal"), config.load(1, "unimodal")
    numbers._images.cache_clear()
    again = config.load(0, "uml")
    assert np.array_equal(first.train[0].rows, again.train[0].rows)
    assert np.array_equal(first.test.rows, again.test.rows)
    assert not np.array_equal(first.train[0].rows, other.train[0].rows)
    assert [s.name for s in again.train][:2] == ["image", "text"] and len(again.train) == 3


def test_names_and_phrasings():
    assert [name(n) for n in (0, 7, 13, 20, 34, 99)] == [
        "zero", "seven", "thirteen", "twenty", "thirty four", "ninety nine",
    ]  # fmt: skip
    assert len({name(n) for n in range(100)}) == 100
    owners: dict[str, int] = {}
    for n in range(100):
        for phrase in phrasings(n):
            assert owners.setdefault(phrase, n) == n, f"{phrase!r} names two numbers"


def test_text_ids_spell_the_keys():
    source = text()
    assert source.rows.max() < NumbersConfig().vocabulary and source.rows.min() == 0
    for i in range(len(source)):
        words = [numbers._WORDS[w] for w in source.sample(i)[:, 0]]
        assert " ".join(words) == describe(source, i)
        assert describe(source, i) in phrasings(int(source.labels[i]))


def test_sounds_are_whole_rows_of_their_number(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = numbers.speech(NumbersConfig(utterances_per_class=2))
    assert source.rows.dtype == np.int16 and source.rows.shape[1] == 640
    assert np.array_equal(np.bincount(source.labels), np.full(100, 2))
    assert all(
        describe(source, i).startswith(f"{name(int(source.labels[i]))} (")
        for i in range(len(source))
    )
    long = np.isin(source.labels, [77, 73, 37])
    short = np.isin(source.labels, [2, 8, 10])
    assert source.lengths[long].min() > source.lengths[short].max()
    assert source.lengths.max() <= 40


def test_baselines_beat_chance_and_the_code_is_worth_most(task):
    scores = dict(task.baselines)
    told = scores.pop("two digit readers, told the code")
    assert all(0.2 < score < told for score in scores.values())
    assert len(scores) == 4


def test_one_image_of_each_number_is_enough():
    task = NumbersConfig(images_per_class=1).load(0, "unimodal")
    assert len(task.train[0]) == 100
    assert dict(task.baselines)["nearest neighbour"] > 0.2


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="images_per_class is 0"):
        NumbersConfig(images_per_class=0)
    with pytest.raises(ConfigError, match="utterances_per_class is 99"):
        NumbersConfig(utterances_per_class=99)
    with pytest.raises(ConfigError, match="mode 'both'"):
        NumbersConfig().load(0, "both")
