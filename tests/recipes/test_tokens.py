"""The recipe of paper 1.3 on made-up tokens: from arrays to shards to the comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from uml_fast.data.folders import FoldersConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.prepare import main as prepare
from uml_fast.recipes import load_recipe
from uml_fast.train import train


def test_tokens_become_a_probe_of_both_modes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, width, rows in (("image", 6, 9), ("text", 10, 5)):
        labels = np.repeat([0, 1, 2], 12)
        centres = rng.normal(size=(3, 1, width))
        tokens = (centres[labels] + rng.normal(size=(36, rows, width))).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", features=tokens, labels=labels)
        source, out = tmp_path / f"{name}.npz", tmp_path / "shards" / name
        assert prepare(["features", str(source), str(out)]) == 0
    config = load_recipe("tokens")
    small = dataclasses.replace(
        config, out=tmp_path / "run", steps=4, seeds=1, optim=dataclasses.replace(
            config.optim, warmup_steps=2),
        modalities=(FeaturesConfig(name="image", size=6), FeaturesConfig(name="text", size=10)),
        data=FoldersConfig(image=tmp_path / "shards" / "image", text=tmp_path / "shards" / "text"),
        backbone=TransformerConfig(width=8, layers=1, heads=2, feed_forward=16, causal=True),
        mix=dataclasses.replace(config.mix, batch=8),
    )  # fmt: skip
    assert train(small) == tmp_path / "run"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "probe"
    assert {r["mode"] for r in summary["results"]} == {"unimodal", "uml"}
    assert all(0 <= r["probe"] <= 1 and r["error"] > 0 for r in summary["results"])


def test_sizes_of_the_paper() -> None:
    config = load_recipe("tokens")
    assert isinstance(config.backbone, TransformerConfig)
    b = config.backbone
    assert (b.width, b.layers, b.heads, b.causal) == (256, 4, 4, True)
    assert (config.steps, config.seeds, config.mix.batch, config.metric) == (12800, 3, 32, "probe")
    with pytest.raises(ValueError, match="no folder; give --data"):
        config.load(0, "uml")
