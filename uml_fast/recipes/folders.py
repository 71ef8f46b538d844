"""Your own files: prepared folders of images, sounds, text and features, never paired."""

from __future__ import annotations

from uml_fast.config import EvalConfig, MixConfig, ObjectiveConfig, OptimConfig, RunConfig
from uml_fast.data.folders import FoldersConfig
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import TransformerConfig


def folders() -> RunConfig:
    """Your own shards (python -m uml_fast.prepare): --data.image DIR --data.text DIR ...

    A small ViT from scratch that a laptop trains; modalities without a folder are left out. Classes
    meet by their names (--data.same dog_bark=dog for names that differ).
    """
    return RunConfig(
        recipe="folders",
        target="image",
        modalities=(
            ImageConfig(
                name="image", height=32, width=32, channels=3, patch_height=8, patch_width=8,
                share=4.0,
            ),
            TextConfig(name="text", vocabulary=256, positions=256, share=2.0),
            AudioConfig(
                name="audio", sample_rate=16000, row_samples=1280, frames=8, positions=64,
                share=2.0,
            ),
        ),
        data=FoldersConfig(),
        backbone=TransformerConfig(
            width=128, layers=4, heads=4, feed_forward=512, dropout=0.1
        ),
        objective=ObjectiveConfig(kind="classification"),
        mix=MixConfig(token_budget=4096),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=1.0),
        eval=EvalConfig(every=200),
        steps=1000,
        seeds=3,
    )  # fmt: skip
