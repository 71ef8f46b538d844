"""Files of every kind become shards; what cannot be used is counted and named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.made_files import (
    ALL,
    SKIP,
    image,
    image_folder,
    problems,
    run,
    samples,
    sound,
    tar,
    write,
)  # fmt: skip
from uml_fast import cli
from uml_fast.config import ConfigError
from uml_fast.data.prepare.audio import AudioConverter
from uml_fast.data.prepare.features import FeatureConverter
from uml_fast.data.prepare.images import ImageConverter
from uml_fast.data.prepare.items import Item, Moments, Problem, Sample
from uml_fast.data.prepare.listing import natural_order, parse_split
from uml_fast.data.shards.files import ShardSet, read_manifest
from uml_fast.data.source import DataError

PIL_Image = pytest.importorskip("PIL.Image")


class TestLayouts:
    def test_class_folders_keep_their_bytes(self, tmp_path):
        source = image_folder(tmp_path / "in", 3)
        made = run("images", source, tmp_path / "out", *ALL)
        assert made["class_names"] == ["cat", "dog"]
        assert made["splits"]["train"]["classes"] == {"cat": 3, "dog": 3}
        expected = {f"{c}/{i:03d}" for c in ("cat", "dog") for i in range(3)}
        got = samples(tmp_path / "out")
        assert got.keys() == expected
        for key, (payload, name) in got.items():
            assert payload == (source / f"{key}.jpg").read_bytes() and key.startswith(name)

    def test_split_folders_are_kept_inside_of_a_tar_with_a_common_folder(self, tmp_path):
        members = [
            (f"data/set/{split}/{c}/{i}.jpg", image(i))
            for split in ("train", "valid", "test") for c in ("a", "b") for i in range(2)
        ]  # fmt: skip
        made = run("images", tar(tmp_path / "in.tar", members), tmp_path / "out")
        assert {n: s["samples"] for n, s in made["splits"].items()} == {
            "train": 4,
            "val": 4,
            "test": 4,
        }
        assert samples(tmp_path / "out", "val").keys() == {
            f"valid/{c}/{i}" for c in "ab" for i in "01"
        }

    @pytest.mark.parametrize("as_source", [False, True])
    def test_flat_folder_with_a_table(self, tmp_path, as_source):
        for i in range(4):
            write(tmp_path / "in" / f"{i}.png", image(i, form="PNG"))
        rows = ["filename,category,split", "0.png,x,train", "1.png,y,train", "2.png,x,val"]
        table = write(tmp_path / "in" / "labels.csv", "\n".join(rows))
        made = run("images", table if as_source else tmp_path / "in", tmp_path / "out")
        assert {n: s["classes"] for n, s in made["splits"].items()} == {
            "train": {"x": 1, "y": 1}, "val": {"x": 1, "y": 0},
        }  # fmt: skip
        assert ("files that the table does not name" in made["notes"]) != as_source

    def test_flat_folder_without_labels(self, tmp_path):
        write(tmp_path / "in" / "a.jpg", image(0))
        made = run("images", tmp_path / "in", tmp_path / "out", *ALL)
        assert made["class_names"] == [] and samples(tmp_path / "out") == {"a": (image(0), "")}
        assert "cls" not in (tmp_path / "out" / "train-000000.idx").read_text()

    def test_class_names_that_are_numbers_are_in_their_order(self):
        assert natural_order(["10", "9", "1"]) == ("1", "9", "10")
        assert natural_order(["10", "9", "x"]) == ("10", "9", "x")

    def test_keys_are_unique_ascii_and_free_of_dots(self, tmp_path):
        for name in ("a.b.jpg", "a_b.jpg", "ä b.jpg", "c.jpg", "c.png", "d" * 200 + ".jpg"):
            form = "PNG" if name.endswith("png") else "JPEG"
            write(tmp_path / "in" / "k" / name, image(len(name), form=form))
        run("images", tmp_path / "in", tmp_path / "out", *ALL)
        keys = samples(tmp_path / "out").keys()
        assert len(keys) == 6 and "k/a_b" not in keys
        for key in keys:
            assert key.isascii() and not set(key) & set(". ") and len(key) <= 90

    def test_litter_is_no_problem_and_nothing_is_an_error(self, tmp_path):
        source = image_folder(tmp_path / "in", 2)
        for name in (".DS_Store", "cat/Thumbs.db", "__MACOSX/cat/._0.jpg"):
            write(source / name, b"x")
        assert run("images", source, tmp_path / "out")["problems"] == {}
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="holds no files"):
            run("images", tmp_path / "empty", tmp_path / "out2")
        with pytest.raises(DataError, match="does not exist"):
            run("images", tmp_path / "gone", tmp_path / "out2")

    def test_an_empty_class_is_reported(self, tmp_path, capsys):
        source = image_folder(tmp_path / "in", 2)
        (source / "ape").mkdir()
        made = run("images", source, tmp_path / "out", *ALL)
        assert made["empty_classes"] == ["ape"] and made["class_names"][0] == "ape"
        assert "class 'ape' has no sample" in capsys.readouterr().out
        assert cli.main(["inspect", str(tmp_path / "out")]) == 1

    def test_ten_files_by_the_command_of_the_readme(self, tmp_path, capsys):
        source = image_folder(tmp_path / "in", 5)
        out = tmp_path / "out"
        assert cli.main(["prepare", "images", str(source), str(out), "--workers", "1"]) == 0
        assert cli.main(["inspect", str(out), "--verify"]) == 0
        assert "nothing wrong found" in capsys.readouterr().out


class TestSplits:
    def test_an_input_keeps_its_split_when_others_are_added(self, tmp_path):
        def where(out: Path) -> dict[str, str]:
            splits = read_manifest(out)["splits"]
            return {key: name for name in splits for key in samples(out, name)}

        split = ("--split", "train=0.5,val=0.3,test=0.2")
        run("images", image_folder(tmp_path / "in", 12), tmp_path / "a", *split)
        run("images", image_folder(tmp_path / "in", 20), tmp_path / "b", *split)
        run("images", image_folder(tmp_path / "in", 20), tmp_path / "c", *split, "--seed", "1")
        a, b, c = (where(tmp_path / n) for n in "abc")
        assert len(a) == 24 and len(b) == 40 and a.items() <= b.items()
        assert b.keys() == c.keys() and b != c
        counts = [list(b.values()).count(n) for n in ("train", "val", "test")]
        assert counts[0] > counts[1] > 0 and counts[2] > 0

    def test_shards_mix_the_classes(self, tmp_path):
        run("images", image_folder(tmp_path / "in", 20), tmp_path / "out", *ALL)
        with ShardSet.open(tmp_path / "out") as s:
            assert 5 < (np.diff(s.label) != 0).sum() < 35

    @pytest.mark.parametrize("text", ["", "train", "train=0.5", "train=2,val=-1", "a/b=1", "x=nan"])
    def test_a_split_that_cannot_be_is_refused(self, text):
        with pytest.raises(ConfigError, match="sum to 1"):
            parse_split(text)


class TestImages:
    def test_resize_and_crop(self, tmp_path):
        write(tmp_path / "in" / "k" / "a.jpg", image(0, (40, 20)))
        write(tmp_path / "in" / "k" / "b.png", image(1, (20, 50), "PNG"))
        write(tmp_path / "in" / "k" / "c.jpg", image(2, (8, 8)))
        made = run("images", tmp_path / "in", tmp_path / "o", *ALL, "--resize", "8")
        with ShardSet.open(tmp_path / "o") as s:
            sizes = {(s.key(i), s.extension(i)): tuple(s.length[i]) for i in range(3)}
        assert sizes == {("k/a", "jpg"): (8, 16), ("k/b", "png"): (20, 8), ("k/c", "jpg"): (8, 8)}
        assert made["notes"] == {"resized": 2}
        assert samples(tmp_path / "o")["k/c"][0] == image(2, (8, 8))
        run("images", tmp_path / "in", tmp_path / "c", *ALL, "--resize", "8", "--crop")
        with ShardSet.open(tmp_path / "c") as s:
            assert s.length.tolist() == [[8, 8]] * 3

    def test_formats_that_loaders_do_not_take_become_png(self, tmp_path):
        for form in ("BMP", "GIF", "TIFF", "PPM", "WEBP"):
            write(tmp_path / "in" / "k" / f"x.{form.lower()}", image(3, form=form))
        write(tmp_path / "in" / "k" / "wrong_name.jpg", image(3, form="PNG"))
        run("images", tmp_path / "in", tmp_path / "out", *ALL)
        with ShardSet.open(tmp_path / "out") as s:
            stored = sorted(s.extension(i) for i in range(len(s)))
            pixels = {
                PIL_Image.open(io.BytesIO(s.payload(i))).convert("RGB").tobytes()
                for i in range(len(s)) if s.extension(i) == "png" and "gif" not in s.key(i)
            }  # fmt: skip
        assert stored == ["png"] * 5 + ["webp"]
        assert image(3, form="PNG") and len(pixels) <= 2  # GIF has its own colours

    def test_statistics_are_those_of_the_training_pixels(self, tmp_path):
        source = image_folder(tmp_path / "in", 10)
        made = run("images", source, tmp_path / "out", "--split", "train=0.7,val=0.3")
        pixels = [
            np.asarray(PIL_Image.open(io.BytesIO(p))).reshape(-1, 3) / 255
            for p, _ in samples(tmp_path / "out").values()
        ]
        assert 0 < len(pixels) < 20
        x = np.concatenate(pixels)
        np.testing.assert_allclose(made["normalisation"]["mean"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(made["normalisation"]["std"], x.std(0), rtol=1e-12)

    def test_bad_files_are_named_and_skipped(self, tmp_path):
        source = image_folder(tmp_path / "in", 5)
        whole = image(0, (64, 64))
        write(source / "cat" / "truncated.jpg", whole[: len(whole) // 2])
        write(source / "cat" / "zero.jpg", b"")
        write(source / "cat" / "noise.png", bytes(range(256)))
        write(source / "cat" / "movie.mp4", b"x")
        write(source / "outside.jpg", image(0))
        (source / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
        deep = io.BytesIO()
        PIL_Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep, "PNG")
        write(source / "cat" / "deep.png", deep.getvalue())
        made = run("images", source, tmp_path / "out", *ALL, *SKIP)
        assert problems(tmp_path / "out") == {
            "cat/truncated.jpg": "broken image",
            "cat/zero.jpg": "empty file",
            "cat/noise.png": "broken image",
            "cat/movie.mp4": "unknown extension",
            "outside.jpg": "missing label",
            "cat/gone.jpg": "unreadable file",
            "cat/deep.png": "unknown pixels",
        }
        assert made["problems"]["broken image"] == 2 and made["splits"]["train"]["samples"] == 10

    def test_a_hundredth_may_be_bad_and_no_more(self, tmp_path, capsys):
        source = image_folder(tmp_path / "in", 50)
        write(source / "cat" / "zero.jpg", b"")
        run("images", source, tmp_path / "out")  # 1 of 101
        assert "1 inputs were skipped (1 x empty file)" in capsys.readouterr().out
        write(source / "cat" / "zz.jpg", b"not a jpeg")
        with pytest.raises(DataError, match=r"zz\.jpg: broken image .*2 of 102") as error:
            run("images", source, tmp_path / "out2")
        assert "--max-errors" in str(error.value)
        assert set(problems(tmp_path / "out2")) == {"cat/zero.jpg", "cat/zz.jpg"}
        with pytest.raises(DataError, match=r"1 of 102|2 of 102"):
            run("images", source, tmp_path / "out3", "--max-errors", "0")
        run("images", source, tmp_path / "out2", "--max-errors", "2")


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "wav", "flac", "ogg", "npy"])
def test_flipped_bytes_give_a_sample_or_a_problem(tmp_path, form):
    array = io.BytesIO()
    np.save(array, np.ones((5, 3), np.float32))
    whole, converter = {
        "jpg": (image(0), ImageConverter(6, True, 90)),
        "png": (image(0, form="PNG"), ImageConverter(0, False, 90)),
        "webp": (image(0, form="WEBP"), ImageConverter(6, False, 90)),
        "wav": (sound(0), AudioConverter(8000, True)),
        "flac": (sound(0, form="FLAC"), AudioConverter(8000, False)),
        "ogg": (sound(0, form="OGG"), AudioConverter(8000, False)),
        "npy": (array.getvalue(), FeatureConverter(3, True)),
    }[form]
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    good = 0
    for _ in range(60):
        data = bytearray(whole)
        # half of the flips in the header
        for place in rng.integers(0, [len(data), 60][rng.integers(2)], 3):
            data[min(place, len(data) - 1)] = rng.integers(256)
        path.write_bytes(data)
        made = converter.result(Item("x", None, None, path, 0, len(data)))
        good += isinstance(made, Sample)
        assert isinstance(made, Problem) or (made.payload and min(made.length) > 0)
    assert good < 60


def test_moments_in_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x = rng.normal(1e6, 1e-3, (1000, 3))
    total = Moments.of(x[:1])
    for row in x[1:]:
        total = total + Moments.of(row[None])
    np.testing.assert_allclose(total.std, x.std(0), rtol=1e-5)
    assert Moments.from_json(json.loads(json.dumps(total.to_json()))).mean.tobytes() == (
        total.mean.tobytes()
    )


def test_missing_packages_are_said_with_the_line_that_installs_them(tmp_path, monkeypatch, capsys):
    import sys

    source = image_folder(tmp_path / "in", 1)
    for name in ("PIL", "PIL.Image", "soundfile"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["prepare", "images", str(source), str(tmp_path / "out")]) == 2
    assert "pip install pillow" in capsys.readouterr().err
    sounds = write(tmp_path / "s" / "k" / "a.wav", b"x").parents[1]
    assert cli.main(["prepare", "audio", str(sounds), str(tmp_path / "out")]) == 2
    assert "pip install soundfile" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--workers 0", "--seed -1", "--shard-size-mib 0", "--max-errors -1", "--resize -1", "--crop",
     "--quality 0", "--split train=2"],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(tmp_path, option, capsys):
    source = image_folder(tmp_path / "in", 1)
    argv = ["prepare", "images", str(source), str(tmp_path / "out"), *option.split()]
    assert cli.main(argv) == 2
    assert option.split()[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    source = image_folder(tmp_path / "in", 2)
    for name in ("notes.txt", "train-000000.tar"):
        out = tmp_path / name.replace(".", "_")
        write(out / name, "mine")
        with pytest.raises(DataError, match="name another folder"):
            run("images", source, out)
        assert [p.name for p in out.iterdir()] == [name]


def test_shards_of_other_options_are_replaced_only_when_asked(tmp_path):
    source, out = image_folder(tmp_path / "in", 4), tmp_path / "out"
    run("images", source, out, *ALL)
    with pytest.raises(DataError, match="--overwrite"):
        run("images", source, out, "--split", "val=1")
    assert samples(out)
    assert list(run("images", source, out, "--split", "val=1", "--overwrite")["splits"]) == ["val"]
    assert not (out / "train-000000.tar").exists() and not (out / ".prepare").exists()
