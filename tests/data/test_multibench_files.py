"""MultiBench's files: what a sample, a label and a split is, quirk by quirk, and broken files.

The expectations are worked out here on their own from the stored arrays, by paper 1.2's rules.
"""

from __future__ import annotations

import itertools
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uml_fast.analysis.probe import linear_probe
from uml_fast.data import multibench_files
from uml_fast.data.multibench_files import BENCHMARKS, ICD9_TASK, Dataset, read_benchmark
from uml_fast.data.multibench_made import write_benchmark
from uml_fast.data.source import DataError

COUNTS = (40, 12, 14)
AFFECT: tuple[Dataset, ...] = ("mosi", "mosei", "mustard", "ur_funny")
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def made(folder: Path, dataset: Dataset) -> tuple[Path, dict[str, Any]]:
    """A generated file and what pickle itself reads from it."""
    path = folder / BENCHMARKS[dataset].files[0]
    write_benchmark(path, dataset, COUNTS)
    return path, pickle.loads(path.read_bytes())


def stored(folder: Path, change: Callable[[dict[str, Any]], None], dataset: Dataset) -> Path:
    """A generated file after a change of its content."""
    path, content = made(folder, dataset)
    change(content)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


@pytest.mark.parametrize("dataset", AFFECT)
def test_generated_files_have_the_benchmarks_layout_and_quirks(
    dataset: Dataset, tmp_path: Path
) -> None:
    _, content = made(tmp_path, dataset)
    assert list(content) == ["train", "valid", "test"]
    for split, n in zip(content.values(), COUNTS, strict=True):
        for name, size in BENCHMARKS[dataset].sizes.items():
            assert split[name].shape == (n, 50, size) and split[name].dtype == np.float32
        assert split["labels"].size == n == len(split["id"])
    train = content["train"]
    assert (train["text"].sum((1, 2)) == 0).any(), "samples without text"
    assert np.isneginf(train["audio"]).any()
    assert len(np.unique(train["vision"][train["vision"].any(2)][:, -1])) == 1, "constant feature"
    has_text = train["text"].any((1, 2))
    is_left = not train["text"][has_text, 0].any(1).all()
    assert is_left == (BENCHMARKS[dataset].labels == "sign")


def test_generated_modalities_share_what_the_label_says_and_hide_it_unequally(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mosi_data.pkl"
    write_benchmark(path, "mosi", (400, 30, 200))
    got = read_benchmark(path, "mosi")

    def accuracy(name: str) -> float:
        x, y = {}, {}
        for split in ("train", "test"):
            source = got[split][name]  # type: ignore[index]
            x[split] = np.stack([source.sample(i).mean(0) for i in range(len(source))])
            y[split] = source.labels
        return linear_probe(x["train"], y["train"], x["test"], y["test"], preset="mosi")

    assert 0.6 < accuracy("vision") < accuracy("text") - 0.05
    rows = got["train"]["text"].sample(0)
    near = np.mean(
        [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(rows) if a.any() and b.any()]
    )
    assert near > 0.2, "a row tells something of the next"


@pytest.mark.parametrize("dataset", AFFECT)
def test_a_sample_goes_from_its_first_word_to_its_last_row(
    dataset: Dataset, tmp_path: Path
) -> None:
    path, content = made(tmp_path, dataset)
    got = read_benchmark(path, dataset)
    for key, split in SPLITS.items():
        arrays = content[key]
        kept = [i for i in range(len(arrays["text"])) if arrays["text"][i].sum() != 0]
        assert len(kept) < len(arrays["text"])
        for name in BENCHMARKS[dataset].sizes:
            source = got[split][name]  # type: ignore[index]
            assert [source.key(j) for j in range(len(source))] == [arrays["id"][i] for i in kept]
            for j, i in enumerate(kept):
                start = int(np.argwhere(arrays["text"][i])[0][0])
                rows = [
                    t for t in range(50)
                    if any(arrays[m][i, t].any() for m in BENCHMARKS[dataset].sizes)
                ]  # fmt: skip
                expected = arrays[name][i, start : rows[-1] + 1].copy()
                expected[np.isneginf(expected)] = 0
                np.testing.assert_array_equal(source.sample(j), expected)


def test_zero_frames_inside_a_sample_stay_and_padding_on_either_side_goes(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        train = content["train"]
        for name in ("vision", "audio", "text"):
            train[name][:] = 0
            train[name][:, 10:14] = 1.0
        train["vision"][0, 13] = 0  # no face in the last row, which has text
        train["text"][1, 10] = 0  # first word unknown: the sample begins at the next one
        train["vision"][2, 10:14] = 0  # never a face

    got = read_benchmark(stored(tmp_path, change, "mosi"), "mosi")["train"]
    assert got["vision"].lengths[:4].tolist() == [4, 3, 4, 4]
    assert got["vision"].sample(0)[-1].tolist() == [0.0] * 20
    assert not got["vision"].sample(2).any()
    assert all((s.lengths == got["text"].lengths).all() for s in got.values())


@pytest.mark.parametrize("labels", [(-3.0, 1), (-0.1, 1), (0.0, 1), (2.4, 1)])
def test_sentiment_is_positive_from_zero_on(labels: tuple[float, int], tmp_path: Path) -> None:
    value = labels[0]
    path = stored(tmp_path, lambda c: c["train"]["labels"].fill(value), "mosi")
    assert set(read_benchmark(path, "mosi")["train"]["text"].labels) == {int(value >= 0)}


def test_minus_one_and_zero_are_the_class_without(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["train"]["labels"] = np.resize([-1.0, 0.0, 1.0], COUNTS[0])
        content["train"]["text"][:] = 1.0

    labels = read_benchmark(stored(tmp_path, change, "ur_funny"), "ur_funny")["train"]["text"]
    assert labels.labels[:6].tolist() == [0, 0, 1, 0, 0, 1]


def test_mimic_has_three_splits_in_the_releases_order(tmp_path: Path) -> None:
    path, content = made(tmp_path, "mimic")
    n = sum(COUNTS)
    assert content["ep_tdata"].shape == (n, 24, 12) and content["adm_features_all"].shape == (n, 5)
    assert np.isnan(content["ep_tdata"]).any() and np.isinf(content["ep_tdata"]).any()
    got = read_benchmark(path, "mimic")
    order = list(range(n))
    random.seed(10)
    random.shuffle(order)
    ids = {
        split: [int(s["static"].key(i)) for i in range(len(s["static"]))]
        for split, s in got.items()
    }
    tenth = n // 10
    assert ids["validation"] == order[:tenth]
    assert ids["test"] == order[tenth : n // 5]
    assert ids["train"] == order[n // 5 :]
    for split, sources in got.items():
        assert sources["static"].lengths.tolist() == [1] * len(ids[split])
        assert set(sources["series"].lengths) == {24}
        series = content["ep_tdata"][ids[split]].astype(np.float32)
        series[~np.isfinite(series)] = 0
        np.testing.assert_array_equal(sources["series"].rows.reshape(series.shape), series)
        expected = content["y_icd9"][ids[split], ICD9_TASK]
        assert sources["static"].labels.tolist() == expected.tolist()


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = made(tmp_path, "mosi")
    reads = []
    load = multibench_files.load_arrays
    monkeypatch.setattr(multibench_files, "load_arrays", lambda p: reads.append(p) or load(p))
    first = read_benchmark(path, "mosi")
    assert read_benchmark(path, "mosi") is first and len(reads) == 1
    content["test"]["labels"][:] = 1.0
    path.write_bytes(pickle.dumps(content))
    os.utime(path, ns=(1, 1))
    assert set(read_benchmark(path, "mosi")["test"]["text"].labels) == {1} and len(reads) == 2
    with pytest.raises(ValueError, match="read-only"):
        first["train"]["text"].rows[0, 0] = 1.0


class Opens:
    """A pickle of this writes a file when it is loaded by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = stored(tmp_path, lambda c: c["train"].update(extra=Opens(trap)), "mosi")
    with pytest.raises(DataError, match=r"mosi_data\.pkl asks for posix\.mkdir"):
        read_benchmark(path, "mosi")
    assert not trap.exists()


def set_nan(content: dict[str, Any]) -> None:
    at = int(np.flatnonzero(content["valid"]["text"].sum((1, 2)))[0])
    content["valid"]["text"][at, -1, 0] = np.nan


BAD: dict[str, tuple[Dataset, Callable[[dict[str, Any]], Any], str]] = {
    "no split": ("mosi", lambda c: c.pop("valid"), r"has no 'valid'; it has train, test"),
    "no modality": (
        "mosi", lambda c: c["test"].pop("vision"),
        r"split test has no 'vision'; it has text, audio, labels, id",
    ),
    "no labels": ("mosi", lambda c: c["test"].pop("labels"), "has no 'labels'"),
    "a list for a split": ("mosi", lambda c: c.update(train=[1]), "train: a list, not a dict"),
    "flat rows": (
        "mosi", lambda c: c["train"].update(text=c["train"]["text"][:, :, 0]),
        r"'text' has shape \(40, 50\); needed is \(samples, rows, features\)",
    ),
    "words for rows": ("mosi", lambda c: c["train"].update(text=["good"]), "'text' is no array"),
    "another count": (
        "mosi", lambda c: c["train"].update(vision=c["train"]["vision"][:9]), "must be aligned",
    ),
    "rows not aligned": (
        "mosi", lambda c: c["train"].update(vision=c["train"]["vision"][:, :9]), "must be aligned",
    ),
    "NaN in text": ("mosi", set_nan, r"text: sample mosi0\d+ holds NaN or infinity \(row \d+\)"),
    "infinite vision": (
        "mosi", lambda c: c["train"]["vision"].fill(np.inf), "vision: sample mosi0.* holds NaN",
    ),
    "no text at all": ("mosi", lambda c: c["train"]["text"].fill(0), "train: no sample has text"),
    "no number": (
        "mosi", lambda c: c["train"]["labels"].fill(np.nan), "sample 0 has label nan; it must be",
    ),
    "no class": (
        "mustard", lambda c: c["train"]["labels"].fill(7), "label 7; -1, 0 and 1 are classes",
    ),
    "several labels": (
        "mosi", lambda c: c["train"].update(labels=np.zeros((40, 7))),
        r"labels have shape \(40, 7\) for 40 samples",
    ),
    "no diagnosis": ("mimic", lambda c: c.pop("y_icd9"), "has no 'y_icd9'"),
    "few tasks": ("mimic", lambda c: c.update(y_icd9=c["y_icd9"][:, :3]), "task 7 is needed"),
    "other patients": ("mimic", lambda c: c.update(ep_tdata=c["ep_tdata"][:20]), "must be as many"),
    "few patients": (
        "mimic", lambda c: c.update({k: v[:6] for k, v in c.items()}), "6 patients; ten or more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_said_in_words(name: str, tmp_path: Path) -> None:
    dataset, change, message = BAD[name]
    path = stored(tmp_path, change, dataset)
    with pytest.raises(DataError, match=message):
        read_benchmark(path, dataset)


def test_torn_and_foreign_files_are_said_in_words(tmp_path: Path) -> None:
    path, _ = made(tmp_path, "mosi")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="is no whole pickle"):
        read_benchmark(path, "mosi")
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds a list, not a dictionary"):
        read_benchmark(path, "mosi")
    with pytest.raises(DataError, match="cannot be read"):
        read_benchmark(tmp_path / "absent.pkl", "mosi")


def test_ids_of_several_parts_and_of_objects_are_read(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["train"]["id"] = np.array([[b"clip", b"%d" % i] for i in range(COUNTS[0])])
        content["valid"]["id"] = np.array([[f"clip{i}", i] for i in range(COUNTS[1])], dtype=object)
        del content["test"]["id"]

    got = read_benchmark(stored(tmp_path, change, "mosi"), "mosi")
    assert got["train"]["text"].key(0).startswith("clip/")
    assert got["validation"]["text"].key(0).startswith("clip")
    assert got["test"]["text"].key(0).isdigit()
