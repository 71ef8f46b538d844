"""Transfer by initialisation (paper 1.5): image classification from a language model's weights.

The paper names no learning rate, batch or length; those here are usual ones for a ViT.
"""

from __future__ import annotations

from uml_fast.config import (
    CheckpointConfig,
    EvalConfig,
    MixConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)
from uml_fast.data.folders import FoldersConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.model.transformer import TransformerConfig

WIDTH = 768


def transfer() -> RunConfig:
    """Images on a BERT's, GPT-2's, Llama's or ViT's blocks against random ones (BERT to ViT).

    --backbone.init-from FOLDER --data.image SHARDS. Frozen blocks as they are; trained from step
    2000 with --backbone.unfreeze-at 2000; from the start with --backbone.no-freeze.
    """
    return RunConfig(
        recipe="transfer",
        target="image",
        modalities=(ImageConfig(name="image", height=224, width=224, class_token=True),),
        data=FoldersConfig(),
        backbone=TransformerConfig(
            width=WIDTH, layers=12, heads=12, feed_forward=4 * WIDTH, dropout=0.1,
            pooling="first", freeze=True,
        ),
        objective=ObjectiveConfig(kind="classification", head_hidden=WIDTH),
        mix=MixConfig(batch=64),
        optim=OptimConfig(lr=5e-4, weight_decay=0.05, warmup_steps=500, clip_norm=1.0),
        eval=EvalConfig(probe=False, every=500),
        checkpoint=CheckpointConfig(every=1000),
        modes=("random", "pretrained"),
        steps=10_000,
        seeds=3,
    )  # fmt: skip
