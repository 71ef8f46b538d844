"""What a trained model is worth on the target: embeddings, head accuracy, probe, prediction error.

Legend: N samples, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.analysis.probe import LinearProbe
from uml_fast.config import MixConfig, RunConfig
from uml_fast.data.in_memory import for_evaluation
from uml_fast.data.loading.loader import iterate_once, layouts_of
from uml_fast.data.source import Samples, Task
from uml_fast.model.compat import release_batches
from uml_fast.model.objective import losses
from uml_fast.model.uml import Encoded, Uml
from uml_fast.packing.layout import ROW_ALIGN
from uml_fast.packing.pack import PackedBatch


@dataclass(frozen=True, slots=True)
class Measurement:
    """Numbers of one model on the target's test samples; None where the run has no such number."""

    probe: float | None
    """Accuracy (0..1) of a logistic regression on frozen embeddings."""
    head: float | None
    """Accuracy (0..1) of the shared head."""
    error: float | None
    """Mean prediction error (next_embedding)."""
    validation: float | None = None
    """The run's metric on the validation samples, for choosing; None: not asked for."""


_EVALUATION_ROWS = 4096
"""Rows of an evaluation pack, more where a sample is longer."""


@dataclass(frozen=True, slots=True)
class PackedSource:
    """A source with its packs made, for being evaluated many times."""

    source: Samples
    packs: tuple[PackedBatch, ...]
    """Every sample once, in order."""


def pack_source(
    source: Samples, device: torch.device, config: RunConfig | None = None
) -> PackedSource:
    """Pack every sample of ``source`` that can be read once (of a large one ``for_evaluation``).

    ``config`` says whether they are padded in batches, for comparison with the release.
    """
    source = for_evaluation(source, "evaluation")
    if config is not None and config.compat == "release":
        samples = [source.sample(i) for i in range(len(source))]
        batches = release_batches(source.name, samples, source.labels.tolist(), config.mix.batch)
        return PackedSource(source, tuple(b.to(device) for b in batches))
    total, longest = int(source.offsets[-1]), int(source.lengths.max())
    # of one size and all nearly full: packs are computed whole, the last one too
    rows = max(total // -(-total // _EVALUATION_ROWS) + longest + ROW_ALIGN, 2 * longest)
    (layout,) = layouts_of((source,), MixConfig(token_budget=rows))
    return PackedSource(source, tuple(iterate_once(source, layout, device)))


def _device(model: Uml) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _encode(model: Uml, packed: PackedSource) -> Iterator[tuple[PackedBatch, Encoded, Tensor]]:
    """Packs with their encoding and a mask (S,) of the slots that hold samples."""
    for batch in packed.packs:
        yield batch, model(batch), batch.sample_S >= 0


def embed(model: Uml, packed: PackedSource) -> np.ndarray:
    """Embeddings (N, E) fp32 of all samples, in their order."""
    parts = [encoded.embedding_SE[used].cpu() for _, encoded, used in _encode(model, packed)]
    return torch.cat(parts).numpy()


def head_accuracy(model: Uml, packed: PackedSource) -> float:
    """Accuracy (0..1) of the shared head over the labelled samples."""
    right = 0
    for batch, encoded, used in _encode(model, packed):
        logits = model.logits(encoded.embedding_SE[used], packed.source.name)
        right += int((logits.argmax(1) == batch.label_S[used]).sum())
    return right / max(1, int((packed.source.labels >= 0).sum()))


@torch.no_grad()
def prediction_error(model: Uml, packed: PackedSource, config: RunConfig) -> float:
    """Prediction loss, the mean over all rows that predict something."""
    modality = model.modality(packed.source.name)
    total, rows = 0.0, 0
    for batch in packed.packs:
        n = int(modality.predicts_C(batch.region(0)).sum())
        total += n * float(losses(model, batch, config, None)[packed.source.name])
        rows += n
    return total / max(1, rows)


def embeddings_and_labels(model: Uml, packed: PackedSource) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, E) and classes (n,) of the labelled samples."""
    has_label = packed.source.labels >= 0
    return embed(model, packed)[has_label], packed.source.labels[has_label]


def probe_accuracy(
    model: Uml,
    config: RunConfig,
    train: PackedSource,
    held_out: Sequence[PackedSource],
    class_names: tuple[str, ...],
) -> list[float]:
    """Linear probe (paper 1.2) fitted on embeddings of ``train``: accuracy on each held-out set."""
    probe = LinearProbe(
        *embeddings_and_labels(model, train), preset=config.eval.probe_kind, class_names=class_names
    )
    return [probe.accuracy(*embeddings_and_labels(model, packed)) for packed in held_out]


@dataclass(frozen=True, slots=True)
class AlignedSources:
    """The splits of a task whose modalities belong together, with their packs made."""

    splits: Mapping[str, tuple[PackedSource, ...]]
    """train, validation and test -> each modality."""

    @staticmethod
    def of(task: Task, config: RunConfig, device: torch.device) -> AlignedSources:
        """Pack every split of a task that has ``aligned`` samples."""
        validation, test = zip(*task.aligned, strict=True)
        splits = {"train": task.train, "validation": validation, "test": test}
        return AlignedSources(
            {k: tuple(pack_source(s, device, config) for s in v) for k, v in splits.items()}
        )


def aligned_probes(
    model: Uml, config: RunConfig, sources: AlignedSources, class_names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Linear probes (paper 1.2) of each modality and of all of them side by side.

    Every split is embedded once and every probe is fitted once. Returns, under the modality's name
    or the names joined by ``+``, the accuracies on validation and test.
    """
    embedded = {
        split: {packed.source.name: embed(model, packed) for packed in modalities}
        for split, modalities in sources.splits.items()
    }
    labels = {split: modalities[0].source.labels for split, modalities in sources.splits.items()}
    names = list(embedded["train"])
    views = [(name,) for name in names] + ([tuple(names)] if len(names) > 1 else [])
    out = {}
    for view in views:
        x = {s: np.concatenate([parts[name] for name in view], 1) for s, parts in embedded.items()}
        probe = LinearProbe(
            x["train"], labels["train"], preset=config.eval.probe_kind, class_names=class_names
        )
        out["+".join(view)] = {
            split: probe.accuracy(x[split], labels[split]) for split in ("validation", "test")
        }
    return out


def measure(
    model: Uml,
    config: RunConfig,
    train: PackedSource | None,
    test: PackedSource,
    class_names: tuple[str, ...],
    validation: PackedSource | None = None,
) -> Measurement:
    """All numbers the run asks for, on ``test``; ``train`` fits the probe, if there is one."""
    has_labels = bool((test.source.labels >= 0).any())
    predicts = config.objective.kind == "next_embedding"
    held_out = [test] if validation is None else [test, validation]
    probe: list[float] = []
    if config.eval.probe and has_labels:
        assert train is not None
        probe = probe_accuracy(model, config, train, held_out, class_names)
    chosen_by = None
    if validation is not None and config.metric == "probe":
        chosen_by = probe[1] if probe else None
    elif validation is not None:
        chosen_by = run_metric(model, config, train, validation, class_names)
    return Measurement(
        probe=probe[0] if probe else None,
        head=head_accuracy(model, test) if has_labels and not predicts else None,
        error=prediction_error(model, test, config) if predicts else None,
        validation=chosen_by,
    )


def run_metric(
    model: Uml,
    config: RunConfig,
    train: PackedSource | None,
    test: PackedSource,
    class_names: tuple[str, ...],
) -> float:
    """The number the run is judged by, on ``test``."""
    if config.metric == "head":
        return head_accuracy(model, test)
    if config.metric == "error":
        return prediction_error(model, test, config)
    assert train is not None
    return probe_accuracy(model, config, train, [test], class_names)[0]


def init_head(model: Uml, source: Samples) -> None:
    """Set the shared head's rows to the class means of ``source`` (paper 1.4, "init")."""
    assert model.head is not None
    device = _device(model)
    embedding, label = embeddings_and_labels(model, pack_source(source, device))
    model.head.set_class_means(
        torch.from_numpy(embedding).to(device), torch.from_numpy(label).long().to(device)
    )
