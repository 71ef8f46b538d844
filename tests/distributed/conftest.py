"""Shards that runs over ranks train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from uml_fast.prepare import main as prepare


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """143 JPEG images and some 60 texts to train on, in shards of a few kilobytes."""
    Image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    for split, count in (("train", 143), ("val", 6), ("test", 6)):
        for i in range(count):
            folder = root / "pictures" / split / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    rows = [
        {"text": f"{i} " + "x" * int(rng.integers(1, 30)), "label": ("cat", "dog")[i % 2]}
        for i in range(80)
    ]
    (root / "texts").mkdir()
    (root / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shards = root / "shards"
    assert prepare(["images", str(root / "pictures"), str(shards / "image")]) == 0
    assert prepare(["text", str(root / "texts"), str(shards / "text")]) == 0
    return shards
