"""Folders of ten files, as a new user has them: sane splits, clear words, a run that works."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.made_files import image, run, samples, write
from uml_fast import prepare
from uml_fast.config import CheckpointConfig, EvalConfig, MixConfig, RunConfig
from uml_fast.data import in_memory, source
from uml_fast.data.folders import FoldersConfig
from uml_fast.data.held_out import hold_out
from uml_fast.data.prepare.listing import order
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.source import DataError
from uml_fast.evaluate import evaluate
from uml_fast.modalities.image import ImageConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.recipes import load_recipe
from uml_fast.train import train

IMAGE = ImageConfig(name="image", height=8, width=12, patch_height=4, patch_width=4)


@pytest.fixture(autouse=True)
def _say_it_again():
    source.say_once.cache_clear()


def folder(root: Path, **classes: int) -> Path:
    for c, (name, count) in enumerate(classes.items()):
        for i in range(count):
            write(root / name / f"{i}.jpg", image(100 * c + i))
    return root


def config(place: Path | str, **changes: object) -> RunConfig:
    return dataclasses.replace(
        load_recipe("folders"),
        modalities=(IMAGE,),
        data=FoldersConfig(image=place),
        backbone=TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, dropout=0.1),
        mix=MixConfig(token_budget=200),
        eval=EvalConfig(every=2),
        checkpoint=CheckpointConfig(every=2),
        steps=3,
        seeds=1,
        **changes,
    )


def counts(out: Path, split: str) -> dict[str, int]:
    return dict(Counter(name for _, name in samples(out, split).values()))


def test_two_classes_of_five_train_and_are_evaluated(tmp_path: Path, caplog):
    out = tmp_path / "shards"
    run("images", folder(tmp_path / "in", cat=5, dog=5), out)
    for split in ("train", "val", "test"):
        assert set(counts(out, split)) == {"cat", "dog"}
    done = train(config(out, out=tmp_path / "run"))
    assert done is not None and {r["mode"] for r in evaluate(done)} == {"unimodal", "uml"}
    assert "test samples; each is worth" in caplog.text
    assert "only image is given, so that UML has nothing else to learn from" in caplog.text


def test_the_end_of_a_run_says_which_share_could_not_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder(tmp_path / "in", cat=20, dog=20)
    out = tmp_path / "shards"
    run("images", place, out)
    before = [len(path.read_bytes()) for path in sorted(out.glob("train*.tar"))]
    with ShardSet.open(out, "train") as shards:
        path, total = shards.paths[0], len(shards)
        starts = [int(shards.index.offset[i]) + int(shards.index.size[i]) // 2 for i in (1, 2)]
    content = bytearray(Path(path).read_bytes())
    for start in starts:
        content[start : start + 60] = bytes(60)
    Path(path).write_bytes(content)
    assert before == [len(p.read_bytes()) for p in sorted(out.glob("train*.tar"))]
    assert train(config(out, out=tmp_path / "run")) is not None
    said = capsys.readouterr().out
    assert f"2 of 40 (5 %) samples of image could not be read, named in {tmp_path}" in said
    assert total < 40


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counted", [(9, 1), (8, 2), (1, 1), (3, 3), (4, 6), (2, 200)])
def test_small_classes_go_to_training_first_then_to_test(
    tmp_path: Path, seed: int, counted: tuple[int, int]
):
    found = prepare.Images(
        source=folder(tmp_path / "in", cat=counted[0], dog=counted[1]), out=tmp_path / "out"
    ).find()
    splits = order(found, "train=0.8,val=0.1,test=0.1", seed).splits
    have = {name: Counter(label for _, label, _ in rows) for name, rows in splits.items()}
    for label, n in enumerate(counted):
        there = [name for name in ("train", "test", "val") if have.get(name, {}).get(label)]
        assert there == ["train", "test", "val"][: min(n, 3)]
        assert sum(count[label] for count in have.values()) == n


def test_large_classes_keep_the_split_of_their_hash(tmp_path: Path):
    def splits(n: int) -> dict[str, str]:
        place = folder(tmp_path / str(n), cat=n)
        found = prepare.Images(source=place, out=tmp_path / "out").find()
        rows = order(found, "train=0.8,val=0.1,test=0.1", 0).splits
        return {item.name: split for split, part in rows.items() for _, _, item in part}

    few, more = splits(60), splits(90)
    assert {name: more[name] for name in few} == few


def test_one_class_alone_is_told_by_prepare_and_before_training(tmp_path: Path, capsys):
    out = tmp_path / "shards"
    run("images", folder(tmp_path / "in", cat=10), out)
    assert "1 class\ntraining to tell classes apart takes two or more" in capsys.readouterr().out
    with pytest.raises(
        DataError, match="every sample is of the class 'cat'; to tell classes apart"
    ):
        train(config(out, out=tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_images_without_folders_are_told(tmp_path: Path, capsys):
    for i in range(10):
        write(tmp_path / "in" / f"{i}.jpg", image(i))
    run("images", tmp_path / "in", tmp_path / "shards")
    assert "takes two or more: a folder each, or a column label" in capsys.readouterr().out
    with pytest.raises(
        DataError, match="no training sample has a class; prepare them from a folder"
    ):
        config(tmp_path / "shards").load(0, "uml")


def test_what_lies_beside_the_images(tmp_path: Path, capsys):
    place = folder(tmp_path / "in", cat=5, dog=5)
    for litter in ("Thumbs.db", ".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "__MACOSX/._0.jpg"):
        write(place / litter, b"x")
    write(place / "notes.txt", "seen in May")
    write(place / "cat" / "deeper" / "9.jpg", image(9))
    (place / "dog" / "link.jpg").symlink_to(place / "dog" / "0.jpg")
    made = run("images", place, tmp_path / "shards")
    assert not made["problems"] and made["notes"] == {".txt file left out": 1}
    assert sum(s["samples"] for s in made["splits"].values()) == 12
    assert made["class_names"] == ["cat", "dog"]
    (place / "dog" / "gone.jpg").symlink_to(place / "nowhere.jpg")
    with pytest.raises(DataError, match=r"dog/gone\.jpg: unreadable file .*--max-errors"):
        run("images", place, tmp_path / "again")


def test_a_class_without_a_training_sample_stops_before_the_first_step(tmp_path: Path):
    for split, names in (("train", ("cat", "dog")), ("test", ("cat", "dog", "eel"))):
        for name in names:
            for i in range(3):
                write(tmp_path / "in" / split / name / f"{i}.jpg", image(i))
    run("images", tmp_path / "in", tmp_path / "shards")
    with pytest.raises(
        DataError, match="1 of 3 classes have test samples but no training sample: eel"
    ):
        config(tmp_path / "shards").load(0, "uml")


class TestShardsWithoutSplits:
    def test_a_tenth_of_each_class_is_held_out_and_said(self, tmp_path: Path, caplog):
        out = tmp_path / "shards"
        run("images", folder(tmp_path / "in", cat=30, dog=20), out, "--split", "train=1")
        tasks = [
            config(where).load(seed, "uml")
            for seed, where in enumerate(
                (out, str(out / "train-*.tar"), f"pipe:cat {out}/train-000000.tar")
            )
        ]
        for task in tasks:
            train_keys = {task.train[0].key(i) for i in range(len(task.train[0]))}
            sets = [train_keys, set(task.validation.keys), set(task.test.keys)]
            assert [len(s) for s in sets] == [40, 5, 5] and len(set.union(*sets)) == 50
            assert np.bincount(task.test.labels).tolist() == [3, 2]
            assert task.test.keys == tasks[0].test.keys
        assert tasks[1].class_names == ("0", "1") and tasks[0].class_names == ("cat", "dog")
        assert caplog.text.count("no split 'test'; 5 of its 50 training samples take its") == 3

    def test_too_few_to_hold_out(self, tmp_path: Path):
        run("images", folder(tmp_path / "in", cat=2, dog=1), tmp_path / "s", "--split", "train=1")
        with pytest.raises(DataError, match="no split 'val', and no class has samples to spare"):
            config(tmp_path / "s").load(0, "uml")

    @pytest.mark.parametrize("labels", [[], [0], [0, 1], [0] * 10, [-1] * 9 + [5] * 100, [3, 3]])
    def test_every_sample_is_in_one_set_and_training_has_each_class(self, labels: list[int]):
        given = np.array(labels, np.int32)
        sets = hold_out(given, 2)
        assert sorted(np.concatenate(sets).tolist()) == [*range(len(labels))]
        assert set(given[sets[0]].tolist()) == set(labels)


def test_a_large_source_is_evaluated_on_evenly_spread_samples_and_says_so(
    tmp_path: Path, monkeypatch, caplog
):
    run("images", folder(tmp_path / "in", cat=30, dog=30), tmp_path / "s", "--split", "train=1")
    monkeypatch.setattr(in_memory, "EVALUATED_SAMPLES", 5)
    task = config(tmp_path / "s").load(0, "uml")
    assert len(task.test) == 5 and "image: 5 of 6 samples, evenly spread, for test" in caplog.text
    row_bytes = IMAGE.patches * task.train[0].row_elems
    monkeypatch.setattr(in_memory, "EVALUATED_BYTES", 3 * row_bytes)
    assert len(in_memory.for_evaluation(task.train[0], "probe")) == 3


def test_broken_files_that_empty_a_split_are_said_and_taken_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Splits depend on names alone, so that a killed run goes on: a broken file keeps its place."""
    root = folder(tmp_path / "in", cat=3, dog=3)
    splits = order(
        prepare.Images(source=root, out=tmp_path / "out").find(), "train=0.8,val=0.1,test=0.1", 0
    ).splits
    cat = 0
    for split, rows in splits.items():
        for _, label, item in rows:
            if split == "val" or (split == "test" and label == cat):
                (root / item.name).write_bytes(b"no picture")
    assert prepare.main(["images", str(root), str(tmp_path / "out"), "--max-errors", "9"]) == 0
    said = capsys.readouterr().out
    assert "split val has no sample: none of its inputs can be used" in said
    assert "split test has no sample of cat" in said and said.count("splits are drawn anew") == 2
    for path in root.rglob("*.jpg"):
        if path.read_bytes() == b"no picture":
            path.unlink()
    for i, name in enumerate(("cat", "cat", "dog")):
        write(root / name / f"again-{i}.jpg", image(900 + i))
    again = ["images", str(root), str(tmp_path / "out"), "--overwrite"]
    assert prepare.main(again) == 0 and "no sample" not in capsys.readouterr().out
    assert all(set(counts(tmp_path / "out", s)) == {"cat", "dog"} for s in ("train", "val", "test"))
