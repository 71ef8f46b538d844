"""Full fine-tuning of an image network with unpaired text (paper 1.4; tables 2, 6-9, 28, 29)."""

from __future__ import annotations

import dataclasses

from uml_fast.config import (
    CheckpointConfig,
    EvalConfig,
    MixConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)
from uml_fast.data.folders import FoldersConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import TransformerConfig, vit

BATCH = 64
"""Images of a step, and at ratio 1 as many texts."""


def finetune() -> RunConfig:
    """Fine-tune an image network with frozen text features (tables 2, 6-9): --data.image, .text.

    --modalities.0.encoder.init-from FOLDER starts from a ViT, DINO, DINOv2 or CLIP. The head starts
    from the texts' class means; --objective.init-head-from None: at random. Texts for an image:
    --modalities.1.share (table 28).
    """
    image = ImageConfig(
        name="image", height=224, width=224, patch_height=14, patch_width=14, class_token=True,
        encoder=dataclasses.replace(vit("s"), pooling="first"), pooled=True,
    )  # fmt: skip
    text = FeaturesConfig(name="text", size=0, vector=True, identity=True)
    return RunConfig(
        recipe="finetune",
        target="image",
        modalities=(image, text),
        data=FoldersConfig(),
        backbone=TransformerConfig(width=0, layers=0, heads=1, feed_forward=1),
        objective=ObjectiveConfig(kind="classification", init_head_from="text"),
        mix=MixConfig(batch=BATCH, share_of="samples"),
        optim=OptimConfig(lr=5e-5, weight_decay=0.0, schedule="release", warmup_steps=50),
        eval=EvalConfig(probe=False, every=100, patience=10),
        checkpoint=CheckpointConfig(every=1000),
        project_alone=False,
        steps=12_800,
        seeds=3,
        seed=1,
    )  # fmt: skip


def finetune_text() -> RunConfig:
    """The same with a text network that is trained too (table 29): --data.text of token ids.

    --modalities.1.encoder.init-from FOLDER starts from a BERT, RoBERTa, GPT-2, Llama or CLIP;
    --modalities.1.encoder.freeze leaves it as it is. Texts: python -m uml_fast.prepare tokens.
    """
    config = finetune()
    bert = TransformerConfig(
        width=768, layers=12, heads=12, feed_forward=3072, norm="post", input_norm=True,
        pooling="first",
    )  # fmt: skip
    text = TextConfig(name="text", vocabulary=30_522, encoder=bert, pooled=True)
    return dataclasses.replace(
        config, recipe="finetune-text", modalities=(config.modalities[0], text)
    )
