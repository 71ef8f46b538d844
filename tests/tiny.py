"""A run of seconds with all four modalities and ragged lengths, as a user's own recipe file."""

import dataclasses

from uml_fast.config import CheckpointConfig, EvalConfig, MixConfig, ObjectiveConfig, RunConfig
from uml_fast.data.synthetic import SyntheticConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.recipes.throughput import mixed


def tiny() -> RunConfig:
    """All modalities, classification, dropout, two epochs of the smallest source."""
    return dataclasses.replace(
        mixed(),
        recipe="tiny",
        data=SyntheticConfig(shape="mixed", samples=40, held_out=12, classes=3),
        backbone=TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, dropout=0.1),
        objective=ObjectiveConfig(kind="classification", classes=3),
        mix=MixConfig(token_budget=700),
        checkpoint=CheckpointConfig(every=5, keep=2),
        eval=EvalConfig(probe=True, every=10),
        modes=("unimodal", "uml"),
        steps=30,
        log_every=1,
    )


def tiny_prediction() -> RunConfig:
    """The same data, predicting the next row of every modality."""
    return dataclasses.replace(
        tiny(),
        recipe="tiny_prediction",
        objective=ObjectiveConfig(kind="next_embedding"),
        backbone=TransformerConfig(
            width=16, layers=1, heads=2, feed_forward=32, dropout=0.1, causal=True, norm="post"
        ),
        metric="error",
    )
