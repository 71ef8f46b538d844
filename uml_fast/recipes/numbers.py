"""The embedded default: handwritten numbers, two pictures each, with written and spoken names."""

from __future__ import annotations

from uml_fast.config import EvalConfig, MixConfig, ObjectiveConfig, OptimConfig, RunConfig
from uml_fast.data.numbers import CLASSES, NumbersConfig
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import TransformerConfig

IMAGES, TEXTS, SOUNDS = 64, 128, 16
"""Samples of each modality in a pack."""


def numbers() -> RunConfig:
    """Handwritten numbers 00..99, two pictures of each; written and spoken names, never paired.

    The shared part is the head alone, as in the paper's linear probe (1.4): with two pictures of
    each class a transformer in front of it overfits, with or without the names (docs/log.md).
    """
    data = NumbersConfig()
    return RunConfig(
        recipe="numbers",
        target="image",
        modalities=(
            ImageConfig(
                name="image", height=8, width=16, channels=1, patch_height=8, patch_width=16,
                share=IMAGES,
            ),
            TextConfig(
                name="text", vocabulary=data.vocabulary, positions=4, weight=3.0, share=2.5 * TEXTS
            ),
            AudioConfig(
                name="audio", sample_rate=data.sample_rate, row_samples=data.row_samples,
                positions=32, share=13.5 * SOUNDS,
            ),
        ),
        data=data,
        backbone=TransformerConfig(width=128, layers=0, heads=1, feed_forward=128),
        objective=ObjectiveConfig(kind="classification", classes=CLASSES),
        mix=MixConfig(token_budget=round(IMAGES + 2.5 * TEXTS + 13.5 * SOUNDS)),
        optim=OptimConfig(lr=4e-3, weight_decay=1.0, warmup_steps=80),
        eval=EvalConfig(every=100),
        steps=800,
    )  # fmt: skip
