"""What is minimised: the weighted sum of one loss per modality (paper 1.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uml_fast.config import RunConfig
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import PackedBatch


def losses(
    model: Uml, batch: PackedBatch, config: RunConfig, rng_key: Tensor | None
) -> dict[str, Tensor]:
    """One fp32 scalar per modality of the pack, not weighted.

    next_embedding: error of the predicted next row (paper 1.2). classification: cross-entropy of
    the shared head over the labelled samples (paper 1.4).
    """
    encoded = model(batch, rng_key)
    out: dict[str, Tensor] = {}
    for i, region in enumerate(batch.layout.regions):
        view = encoded.regions[i]
        if config.objective.kind == "next_embedding":
            modality = model.modality(region.name)
            hidden = encoded.hidden_TD[view.rows]
            out[region.name] = modality.prediction_loss(hidden, encoded.features[i], view)
        else:
            logits = model.logits(encoded.embedding_SE[view.slots], region.name)
            out[region.name] = _cross_entropy(
                logits, batch.label_S[view.slots].long(), config.objective.label_smoothing
            )
    return out


def counts(model: Uml, batch: PackedBatch, config: RunConfig) -> dict[str, Tensor]:
    """Per modality of the pack, the rows or samples that its loss is the mean of: () int64."""
    out: dict[str, Tensor] = {}
    for i, region in enumerate(batch.layout.regions):
        view = batch.region(i)
        if config.objective.kind == "next_embedding":
            counted = model.modality(region.name).predicts_C(view)
        else:
            counted = batch.label_S[view.slots] >= 0
        out[region.name] = counted.sum()
    return out


def total(parts: dict[str, Tensor], config: RunConfig) -> Tensor:
    """The sum of the losses times their modality's weight."""
    return torch.stack([config.modality(name).weight * loss for name, loss in parts.items()]).sum()


def _cross_entropy(logits_SC: Tensor, label_S: Tensor, smoothing: float) -> Tensor:
    """Mean over labelled samples; 0 where there is none."""
    summed = F.cross_entropy(
        logits_SC, label_S, ignore_index=-1, reduction="sum", label_smoothing=smoothing
    )
    return summed / (label_S >= 0).sum().clamp(min=1)
