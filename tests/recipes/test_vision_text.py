"""A user's path: prepare, extract, train heads with unpaired text, evaluate, export, load again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.data.made_files import run, write
from tests.encoders import local_models
from tests.real_files import DATA, needs_real_files
from uml_fast import evaluate, export, extract, train
from uml_fast.cli import run_main
from uml_fast.encoders.image import ImageEncoder

CLASSES = ("cat", "dog", "wings")


def call(verb: object, *arguments: object) -> None:
    assert run_main(verb.main, [str(a) for a in arguments]) == 0  # type: ignore[attr-defined]


def photos(root: Path) -> Path:
    """Class folders of 14 images: a class has a colour."""
    for c, name in enumerate(CLASSES):
        for i in range(14):
            pixels = local_models.smooth_pixels(100 * c + i, 40, 48) // 3
            pixels[..., c] += 120
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def test_from_files_to_a_head_of_ones_own_images(tmp_path: Path, capsys) -> None:
    feats, out = tmp_path / "feats", tmp_path / "run"
    run("images", photos(tmp_path / "photos"), tmp_path / "shards")
    sentences = {c: [f"a {s} {c} .", f"the {s} {c}"] for c in CLASSES for s in ("big",)}
    prompts = write(tmp_path / "prompts.json", json.dumps(sentences))
    image, text = local_models.dinov2(tmp_path / "dinov2"), local_models.llama(tmp_path / "llama")
    call(extract, "image", tmp_path / "shards", "--encoder", image, "--size", 32, "--out", feats)
    call(extract, "text", prompts, "--encoder", text, "--out", feats)
    options = ("--schedule.steps", 200, "--schedule.eval-every", 50, "--search.points", 4)
    call(train, "vision_text", "--data.where", feats, "--shots", 1, 4, "--seeds", 2, "--out", out,
         *options)  # fmt: skip
    rows = json.loads((out / "summary.json").read_text())["comparison"]
    assert [(r["mode"], r["shots"], r["n"]) for r in rows] == [
        ("uml", 1, 2), ("uml", 4, 2), ("uml_init", 1, 2), ("uml_init", 4, 2)]  # fmt: skip
    assert "<svg" in (out / "report.html").read_text()
    call(evaluate, out)
    call(export, out, "--mode", "uml_init", "--shots", 4)
    capsys.readouterr()
    with safe_open(out / "image.safetensors", "pt") as file:
        weight, metadata = file.get_tensor("weight"), file.metadata()
    made_by, classes = json.loads(metadata["encoder"]), json.loads(metadata["classes"])
    encoder = ImageEncoder(made_by["name"], torch.device("cpu"), torch.float32, size=32)
    assert encoder.facts["weights"] == made_by["weights"] and classes == list(CLASSES)
    mine = encoder.prepare([p.read_bytes() for p in sorted((tmp_path / "photos").glob("*/*.png"))])
    found = (encoder.encode(mine) @ weight).argmax(1)
    right = np.repeat(np.arange(3), 14) == found.numpy()
    assert right.mean() > 0.6, "a head that was read the wrong way round tells nothing apart"


@pytest.mark.slow
@needs_real_files
def test_cifar_with_sentences_of_its_classes(tmp_path: Path) -> None:
    """Real photographs and sentences, encoders learned here without labels."""
    assert DATA is not None
    feats = tmp_path / "feats"
    run("images", DATA / "cifar10_jpeg.tar", tmp_path / "shards")
    call(extract, "image", tmp_path / "shards", "--encoder", "patches", "--out", feats)
    call(extract, "text", DATA / "cifar10_prompts.json", "--encoder", "sentences", "--out", feats)
    call(train, "vision_text", "--data.where", feats, "--shots", 4, "--search.points", 4,
         "--out", tmp_path / "run")  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(0.15 < r["head"] < 0.6 for r in summary["results"])
    assert len(summary["comparison"]) == 2 and summary["comparison"][0]["n"] == 3
