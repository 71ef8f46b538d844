"""``uml-fast inspect``: what it shows, and that its exit code tells whole from broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.made_files import ALL, SKIP, image, image_folder, run, sound, tar, write
from uml_fast import cli


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = image_folder(tmp_path / "in", 6)
    write(source / "cat" / "zero.jpg", b"")
    run("images", source, tmp_path / "out", *ALL, *SKIP)
    return tmp_path / "out"


def test_shows_splits_classes_lengths_statistics_samples_and_problems(shards, capsys):
    assert cli.main(["inspect", str(shards), "--verify", "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "images", "train: 12 samples in 1 shard(s)", "of jpg", "height: 10 to 10",
        "width: 12 to 12",
        "training mean: 0.4", "problems: 1 x empty file", "cat/zero.jpg: empty file", "10 x 12",
    ):  # fmt: skip
        assert text in shown, text
    rows = [line.split() for line in shown.splitlines()]
    assert ["class", "train"] in rows and ["cat", "6"] in rows and ["dog", "6"] in rows
    assert sum(line.startswith(("  cat/", "  dog/")) for line in shown.splitlines()) == 2


def test_a_flipped_bit_is_found_by_verify_alone(shards, capsys):
    path = shards / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    assert cli.main(["inspect", str(shards)]) == 0
    assert "--verify reads all" in capsys.readouterr().out
    assert cli.main(["inspect", str(shards), "--verify"]) == 1
    assert "WRONG: " in (shown := capsys.readouterr().out) and "train-000000.tar" in shown


def test_a_missing_shard_is_told_and_the_other_splits_are_shown(tmp_path, capsys):
    out = tmp_path / "out"
    run("images", image_folder(tmp_path / "in", 12), out, "--split", "train=0.5,val=0.5")
    (out / "val-000000.tar").unlink()
    assert cli.main(["inspect", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in shown and "val-000000.tar is missing" in shown and "train: " in shown


def test_tar_files_of_others(tmp_path, capsys):
    tar(tmp_path / "a.tar", [("x.wav", sound(0)), ("x.cls", b"3"), ("y.wav", b"no sound")])
    assert cli.main(["inspect", str(tmp_path / "a.tar")]) == 1
    shown = capsys.readouterr().out
    assert "1 samples cannot be read, such as y" in shown and "without a class: 1" in shown
    tar(tmp_path / "b.tar", [("z.jpg", image(0))])
    assert cli.main(["inspect", str(tmp_path / "b.tar"), "--verify"]) == 0


def test_text_is_shown(tmp_path, capsys):
    source = write(tmp_path / "t.json", json.dumps({"cat": ["a cat sleeps"]}))
    run("text", source, tmp_path / "out", *ALL)
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "cat  12: a cat sleeps" in capsys.readouterr().out


def test_nothing_there_is_wrong(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "gone")]) == 1
    assert "WRONG" in capsys.readouterr().out
