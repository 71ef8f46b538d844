"""Speed alone: synthetic ragged data of a named shape through a named model size."""

from __future__ import annotations

from uml_fast.config import EvalConfig, MixConfig, ObjectiveConfig, OptimConfig, RunConfig
from uml_fast.data.synthetic import SHAPES, SyntheticConfig
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import multibench, vit


def mosi(width: int, batch: int, dropout: float = 0.1) -> RunConfig:
    """Two modalities of CMU-MOSI's shape through the paper's 5 layers, trained as in paper 1.2.

    Args:
        width: d of the shared encoder, a multiple of 5 (the paper has 10, 40, 150 and 300).
        batch: samples of each modality in a pack, on average.
        dropout: probability of dropout.
    """
    streams = SHAPES["mosi"]
    return RunConfig(
        recipe="throughput",
        target="x",
        modalities=tuple(
            FeaturesConfig(name=name, size=s.row_elems) for name, s in streams.items()
        ),
        data=SyntheticConfig(shape="mosi"),
        backbone=multibench(width, dropout),
        objective=ObjectiveConfig(kind="next_embedding"),
        mix=MixConfig(token_budget=round(batch * sum(s.mean for s in streams.values()))),
        optim=OptimConfig(kind="adam", lr=1e-4, weight_decay=0.0, schedule="constant"),
        eval=EvalConfig(probe=False),
        metric="error",
        modes=("uml",),
        steps=100,
        seeds=1,
    )


def throughput() -> RunConfig:
    """Speed alone: synthetic ragged rows of MOSI's shape, the paper's encoder at width 150."""
    return mosi(width=150, batch=128)


def mixed() -> RunConfig:
    """Speed alone: images, audio, text and features in one pack, an encoder of ViT-S size."""
    streams = SHAPES["mixed"]
    return RunConfig(
        recipe="throughput",
        target="image",
        modalities=(
            ImageConfig(name="image", height=32, width=32, patch_height=8, patch_width=8),
            AudioConfig(name="audio", row_samples=streams["audio"].row_elems),
            TextConfig(name="text", vocabulary=streams["text"].vocabulary),
            FeaturesConfig(name="features", size=streams["features"].row_elems),
        ),
        data=SyntheticConfig(shape="mixed", classes=10),
        backbone=vit("s"),
        objective=ObjectiveConfig(kind="classification", classes=10),
        mix=MixConfig(token_budget=4096),
        eval=EvalConfig(probe=False),
        modes=("uml",),
        steps=100,
        seeds=1,
    )
