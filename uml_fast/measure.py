"""What a trained model is worth on the target modality: embeddings, head accuracy, probe, prediction error.

Legend: N samples, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.analysis.probe import linear_probe
from uml_fast.config import RunConfig
from uml_fast.data.loader import iterate_once
from uml_fast.data.source import Source, Task
from uml_fast.model.uml import Encoded, Uml
from uml_fast.objective import losses
from uml_fast.pack import PackedBatch


@dataclass(frozen=True, slots=True)
class Measurement:
    """Numbers of one model on the target's test samples; None where the run has no such number."""

    probe: float | None
    """Accuracy (0..1) of a logistic regression on frozen embeddings."""
    head: float | None
    """Accuracy (0..1) of the shared head."""
    error: float | None
    """Mean prediction error (next_embedding)."""


def _device(model: Uml) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _encode(model: Uml, source: Source) -> Iterator[tuple[PackedBatch, Encoded, Tensor, Tensor]]:
    """Packs of the source with their encoding, the slots that hold samples and those samples' indices."""
    device = _device(model)
    for batch in iterate_once(source):
        used = batch.sample_S >= 0
        samples = batch.sample_S[used].clone()
        batch = batch.to(device)
        yield batch, model(batch), used.to(device), samples


def embed(model: Uml, source: Source) -> np.ndarray:
    """Embeddings (N, E) fp32 of all samples, in their order."""
    out = np.empty((len(source), model.backbone.embedding_width), np.float32)
    for _, encoded, used, samples in _encode(model, source):
        out[samples.numpy()] = encoded.embedding_SE[used].cpu().numpy()
    return out


def head_accuracy(model: Uml, source: Source) -> float:
    """Accuracy (0..1) of the shared head over the labelled samples."""
    right = 0
    for batch, encoded, used, _ in _encode(model, source):
        logits = model.logits(encoded.embedding_SE[used], source.name)
        right += int((logits.argmax(1) == batch.label_S[used]).sum())
    return right / max(1, int((source.labels >= 0).sum()))


@torch.no_grad()
def prediction_error(model: Uml, source: Source, config: RunConfig) -> float:
    """Prediction loss over all samples: the mean over packs, weighted by their rows."""
    total, rows = 0.0, 0
    for batch in iterate_once(source):
        n = int(batch.valid_T().sum())
        total += n * float(losses(model, batch.to(_device(model)), config, None)[source.name])
        rows += n
    return total / rows


def labelled(source: Source) -> Source:
    """The samples that have a label."""
    if (source.labels >= 0).all():
        return source
    return source.select(np.flatnonzero(source.labels >= 0))


def probe_accuracy(model: Uml, train: Source, test: Source, class_names: tuple[str, ...]) -> float:
    """Linear probe (paper 1.2): fitted on embeddings of ``train``, accuracy on ``test``."""
    train, test = labelled(train), labelled(test)
    return linear_probe(
        embed(model, train), train.labels, embed(model, test), test.labels, class_names=class_names
    )


def measure(model: Uml, config: RunConfig, task: Task, target_train: Source, test: Source) -> Measurement:
    """All numbers the run asks for, on ``test``; ``target_train`` fits the probe."""
    model.eval()
    has_labels = bool((test.labels >= 0).any())
    predicts = config.objective.kind == "next_embedding"
    probes = config.eval.probe and has_labels
    return Measurement(
        probe=probe_accuracy(model, target_train, test, task.class_names) if probes else None,
        head=head_accuracy(model, test) if has_labels and not predicts else None,
        error=prediction_error(model, test, config) if predicts else None,
    )


def validation_metric(model: Uml, config: RunConfig, task: Task, target_train: Source) -> float:
    """The run's metric on the validation samples."""
    if config.metric == "head":
        return head_accuracy(model, task.validation)
    if config.metric == "error":
        return prediction_error(model, task.validation, config)
    return probe_accuracy(model, target_train, task.validation, task.class_names)


def init_head(model: Uml, source: Source) -> None:
    """Set the shared head's rows to the class means of ``source`` (paper 1.4, "init")."""
    assert model.head is not None
    source = labelled(source)
    embedding = torch.from_numpy(embed(model, source)).to(_device(model))
    model.head.set_class_means(embedding, torch.from_numpy(source.labels).long().to(_device(model)))
