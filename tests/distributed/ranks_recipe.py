"""A user's own recipe on prepared shards, which notes the samples of every step and dies on demand.

The folder of shards is in the environment as SHARDS; RECORD is a file, to which each rank adds its
number; DIE_AT is the step before which every rank gets SIGKILL.
"""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

from uml_fast.config import CheckpointConfig, EvalConfig, MixConfig, RunConfig
from uml_fast.data.folders import FoldersConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.packing.pack import PackedBatch
from uml_fast.recipes import load_recipe
from uml_fast.training.step import StepResult, TrainStep

_train = TrainStep.__call__


def _noting(self: TrainStep, batch: PackedBatch, step: int, flags: Any = ()) -> StepResult:
    if str(step) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    samples: dict[str, Any] = {}
    for i, region in enumerate(batch.layout.regions):
        held = batch.sample_S[batch.layout.slot_slice(i)]
        samples[region.name] = held[held >= 0].tolist()
    line = json.dumps({"step": step, "rank": self.ranks.rank, "samples": samples})
    with Path(f"{os.environ['RECORD']}-{self.ranks.rank}").open("a") as file:
        file.write(line + "\n")
    return _train(self, batch, step, flags)


def small() -> RunConfig:
    """``on_shards`` with every sample noted."""
    TrainStep.__call__ = _noting  # type: ignore[method-assign]
    return on_shards()


def on_shards() -> RunConfig:
    """Images and texts, several epochs of each in 24 steps, a checkpoint every 4 steps."""
    shards = Path(os.environ["SHARDS"])
    return dataclasses.replace(
        load_recipe("folders"),
        modalities=(
            ImageConfig(name="image", height=8, width=8, patch_height=4, patch_width=4, share=2.0),
            TextConfig(name="text", vocabulary=256, positions=40),
        ),
        data=FoldersConfig(image=shards / "image", text=shards / "text"),
        backbone=TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, dropout=0.1),
        mix=MixConfig(token_budget=112),
        eval=EvalConfig(probe=False),
        checkpoint=CheckpointConfig(every=4),
        modes=("uml",),
        steps=24,
        seeds=1,
        log_every=1,
    )
