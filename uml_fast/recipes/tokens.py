"""Self-supervised learning on tokens of frozen encoders (paper 1.3, table 1 for Pets, UCF101, DTD).

The release has no code for it. Tokens are made with the encoders of the paper (patch tokens of
DINOv2 ViT-B/14, token embeddings of OpenLLaMA-3B) or any others and prepared as features: an .npz
with ``rows`` (all tokens), ``offsets`` and ``labels``, or arrays (n, tokens, features).
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
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.model.transformer import TransformerConfig


def tokens() -> RunConfig:
    """Next-token prediction on patch tokens of images and token embeddings of texts (paper 1.3).

    Sizes, network and schedule are the paper's; of its grid (table 5) the middle.
    """
    return RunConfig(
        recipe="tokens",
        target="image",
        modalities=(
            FeaturesConfig(name="image", size=768, share=8.0),
            FeaturesConfig(name="text", size=3200, share=1.0),
        ),
        data=FoldersConfig(),
        backbone=TransformerConfig(
            width=256, layers=4, heads=4, feed_forward=1024, dropout=0.1, causal=True
        ),
        objective=ObjectiveConfig(kind="next_embedding"),
        mix=MixConfig(batch=32),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, schedule="release", warmup_steps=50),
        eval=EvalConfig(every=100, patience=10),
        checkpoint=CheckpointConfig(every=500, keep=1),
        metric="probe",
        steps=12_800,
        seeds=3,
    )
