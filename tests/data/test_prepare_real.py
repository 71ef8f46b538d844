"""Preparation of the real files in ../shared/data, where they are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.data.made_files import run, samples
from tests.real_files import DATA, needs_real_files
from uml_fast import cli
from uml_fast.data.shards.files import ShardSet

soundfile = pytest.importorskip("soundfile")
pytestmark = needs_real_files


def subset(source: Path, target: Path, every: int) -> Path:
    """A tar file with every n-th member."""
    with tarfile.open(source) as whole, tarfile.open(target, "w") as part:
        for i, member in enumerate(m for m in whole if m.isreg()):
            if i % every == 0:
                part.addfile(member, whole.extractfile(member))
    return target


def test_cifar_images(tmp_path: Path):
    assert DATA is not None
    source = subset(DATA / "cifar10_jpeg.tar", tmp_path / "cifar.tar", 50)
    made = run("images", source, tmp_path / "out")
    assert {n: s["samples"] for n, s in made["splits"].items()} == {"train": 200, "test": 40}
    assert made["splits"]["train"]["classes"]["horse"] == 20 and len(made["class_names"]) == 10
    # the means usually given for CIFAR-10 are 0.491, 0.482 and 0.447
    assert made["normalisation"]["mean"] == pytest.approx([0.491, 0.482, 0.447], abs=0.03)
    assert cli.main(["inspect", str(tmp_path / "out"), "--verify"]) == 0
    with tarfile.open(source) as file:
        original = {
            m.name.removeprefix("cifar10/").removesuffix(".jpg"): file.extractfile(m).read()  # type: ignore[union-attr]
            for m in file
        }
    got = samples(tmp_path / "out", "train") | samples(tmp_path / "out", "test")
    assert {k: p for k, (p, _) in got.items()} == original


def test_prompts(tmp_path: Path):
    assert DATA is not None
    source = DATA / "cifar10_prompts.json"
    made = run("text", source, tmp_path / "out", "--split", "train=1")
    got = sorted((name, p.decode()) for p, name in samples(tmp_path / "out").values())
    texts = json.loads(source.read_text())
    assert got == sorted((c, t.strip()) for c, sentences in texts.items() for t in sentences)
    assert made["class_names"] == sorted(texts)


def test_sounds(tmp_path: Path):
    assert DATA is not None
    source = subset(DATA / "esc10_ogg.tar", tmp_path / "esc.tar", 12)
    made = run("audio", source, tmp_path / "out", "--split", "train=1")
    assert made["sample_rate"] == 44100 and made["notes"] == {} and len(made["class_names"]) == 10
    made = run("audio", source, tmp_path / "low", "--split", "train=1", "--sample-rate", "8000")
    assert made["notes"] == {"resampled from 44100 Hz": 10, "stored as flac": 10} | {
        k: v for k, v in made["notes"].items() if k == "clipped"
    }
    with ShardSet.open(tmp_path / "low") as s:
        assert s.extension(0) == "flac"
        for i in range(3):
            wave, rate = soundfile.read(io.BytesIO(s.payload(i)))
            assert rate == 8000 and len(wave) == s.length[i, 0]
        assert s.length.min() > 39_000 and s.length.max() < 65_000
