"""Trained models of a run as analyses see them: embeddings, the head, true pairs, shifted sets.

Legend: N samples, E features of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from uml_fast.analysis.findings import Findings, Of
from uml_fast.analysis.inputs import class_means
from uml_fast.analysis.neurons import NeuronCorrelations, neuron_correlations
from uml_fast.analysis.of_heads import Trained
from uml_fast.analysis.probe import linear_probe
from uml_fast.analysis.shift import class_map, shifted_accuracy
from uml_fast.analysis.similarity import linear_cka
from uml_fast.config import RunConfig
from uml_fast.data.outside import Outside, open_outside
from uml_fast.data.source import DataError, Source, Task
from uml_fast.experiment.trained import load_weights
from uml_fast.model.uml import Uml
from uml_fast.training import checkpoint
from uml_fast.training.measure import embed, embeddings_and_labels, pack_source
from uml_fast.training.start import build_model

SHOWN_UNITS = 12
"""Units in the chart of correlations at most."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """True pairs, for measuring alone."""

    target: Source
    """Samples of the target."""
    partner: Source
    """Those of an auxiliary, in the same order."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A model of one trial."""

    model: Uml
    config: RunConfig
    """Of the trial's mode."""
    task: Task
    of: Of

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def embedded(self, source: Source, model: Uml | None = None) -> np.ndarray:
        """(N, E) embeddings of every sample."""
        return embed(model or self.model, pack_source(source, self.device))


def look(o: Observed) -> Trained:
    """Embeddings of the target's labelled test samples (all where none is), and the head."""
    labels = o.task.test.labels
    rows, head = read_by_head(o.model, o.config.target, o.embedded(o.task.test))
    if (labels >= 0).any():
        rows, labels = rows[labels >= 0], labels[labels >= 0]
    else:
        labels = labels[:0]
    aligned = {}
    for source in o.task.train:
        if head is None or source.name == o.config.target or not (source.labels >= 0).any():
            continue
        embedding, label = embeddings_and_labels(o.model, pack_source(source, o.device))
        means = class_means(embedding, label, len(head))
        classes = np.flatnonzero(np.isfinite(means).all(1))
        with torch.no_grad():
            given = torch.from_numpy(means[classes]).float().to(o.device)
            logits = o.model.logits(given, source.name).cpu().numpy()
        # logits of a class's mean are its inner products with every head row, times one scale
        aligned[source.name] = (classes, logits[:, classes].T)
    return Trained(of=o.of, rows=rows, labels=labels, head=head, aligned=aligned)


@torch.no_grad()
def read_by_head(
    model: Uml, target: str, embedding_NE: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """What the head's matrix reads of the target, and that matrix with the target's scale.

    Of a linear head the embeddings, and its matrix with the projection folded in; of one with a
    hidden layer that layer. The matrix is None where the model has no head.
    """
    head = model.head
    if head is None:
        return embedding_NE, None
    device = head.weight.device
    if head.hidden is None:
        # linear without bias, so that the logits of unit vectors are the columns
        columns = model.logits(torch.eye(head.weight.shape[1], device=device), target)
        return embedding_NE, columns.T.cpu().numpy()
    weight = head.weight * head.scale[target] if target in head.scale else head.weight
    read = head.inputs(torch.from_numpy(embedding_NE).to(device), target)
    return read.cpu().numpy(), weight.cpu().numpy()


def open_shifted(config: RunConfig, places: Mapping[str, str]) -> dict[str, Outside]:
    """Shifted test sets of the target by their names.

    Raises:
        DataError: shards that cannot be used, or without classes.
    """
    same = dict(pair.split("=") for pair in getattr(config.data, "same", ()))
    found = {}
    for name, place in places.items():
        opened = open_outside(place, config.modality(config.target), same)
        if not (opened.source.labels >= 0).any():
            raise DataError(f"{place} has no classes, so that no accuracy can be measured")
        found[name] = opened
    return found


def shift_findings(found: Findings, o: Observed, sets: Mapping[str, Outside]) -> None:
    """Accuracy on shifted sets: of the head, or of the probe where the run has no head."""
    for name, opened in sets.items():
        with found.attempt(f"shift to {name}"):
            mapping = class_map(opened.class_names, o.task.class_names)
            labelled = opened.source.labels >= 0
            embedding = o.embedded(opened.source)[labelled]
            rows, head = read_by_head(o.model, o.config.target, embedding)
            labels = opened.source.labels[labelled].astype(np.int64)
            if head is None:
                known = mapping[labels] >= 0
                train = pack_source(o.task.source(o.config.target), o.device)
                fitted = embeddings_and_labels(o.model, train)
                value = linear_probe(
                    *fitted,
                    rows[known],
                    mapping[labels][known],
                    preset=o.config.eval.probe_kind,
                    class_names=o.task.class_names,
                )
                found.add("shift_all", value, o.of, name)
                continue
            got = shifted_accuracy(rows @ head.T, labels, mapping)
            found.add("shift", got.accuracy, o.of, name)
            found.notes["shift", name, ""] = (
                f"{got.samples:,} samples, {got.classes} of the head's {len(head)} classes"
            )
            if got.classes < len(head):
                found.add("shift_all", got.accuracy_all, o.of, name)


def open_pairs(o: Observed, places: Mapping[str, str]) -> dict[str, Pairs]:
    """True pairs of the target's test samples: those that the data have (MultiBench), and from
    shards by the samples' names.

    Raises:
        DataError: a modality that the run has not, shards that cannot be used, or fewer than three
            samples whose name is also that of a test sample.
    """
    tested = [test for _, test in o.task.aligned]
    found = {s.name: Pairs(o.task.test, s) for s in tested if s.name != o.config.target}
    numbers = {o.task.test.key(i): i for i in range(len(o.task.test))}
    for name, place in places.items():
        partner = open_outside(place, o.config.modality(name)).source
        both = [(numbers[k], j) for j in range(len(partner)) if (k := partner.key(j)) in numbers]
        if len(both) < 3:
            raise DataError(
                f"{place}: {len(both)} of {len(partner)} samples have the name of a test sample of "
                f"{o.config.target} (such as {o.task.test.key(0)!r}; here {partner.key(0)!r})"
            )
        mine, theirs = np.array(both).T
        found[name] = Pairs(o.task.test.select(mine), partner.select(theirs))
    return found


def neuron_findings(found: Findings, o: Observed, pairs: Mapping[str, Pairs], place: Path) -> None:
    """Units that answer alike in two modalities, against the untrained network (paper 4.5, F.1).

    ``place`` is the trial's folder; with its first trial the chart over its checkpoints is made.
    """
    untrained = build_model(o.config, o.task, o.of.seed).to(o.device).eval()
    for name, both in pairs.items():
        with found.attempt(f"multimodal neurons with {name}"):
            what = f"{o.config.target} and {name}"
            before = _correlations(o, both, untrained)
            after = _correlations(o, both, o.model)
            found.add("neuron", after.strongest, o.of, what)
            found.add("neuron_untrained", before.strongest, o.of, what)
            found.add("neurons", len(after.multimodal(before.strongest)), o.of, what)
            found.notes["neuron", what, ""] = f"largest |r| over {after.pairs} true pairs"
            found.notes["neurons", what, ""] = f"of {len(after.overall)}"
            for model, which in ((o.model, ""), (untrained, ", untrained")):
                rows = [o.embedded(s, model) for s in (both.target, both.partner)]
                found.add("cka", linear_cka(*rows), o.of, f"{what} over true pairs{which}")
            if not any(c["kind"] == "neurons" and c["what"] == what for c in found.charts):
                found.charts.append(_neuron_chart(o, what, after, before))
                found.charts += _tracked(o, what, both, before, place)


def _correlations(o: Observed, both: Pairs, model: Uml) -> NeuronCorrelations:
    rows = [o.embedded(s, model) for s in (both.target, both.partner)]
    return neuron_correlations(rows[0], rows[1], both.target.labels)


def _neuron_chart(
    o: Observed, what: str, after: NeuronCorrelations, before: NeuronCorrelations
) -> dict[str, object]:
    units = after.multimodal(-1.0)[:SHOWN_UNITS]

    def name(label: int) -> str:
        names = o.task.class_names
        return names[label] if label < len(names) else str(label)

    shown = {name(c): r[units].round(4).tolist() for c, r in list(after.by_label.items())[:4]}
    return {
        "kind": "neurons", "what": what, "title": f"units of {what} (seed {o.of.seed})",
        "units": units.tolist(), "overall": after.overall[units].round(4).tolist(),
        "by_label": shown, "baseline": round(before.strongest, 4),
        "note": f"Pearson correlation over {after.pairs} true pairs that training never saw; "
        "dashed: the largest of any unit of the untrained network.",
    }  # fmt: skip


def _tracked(
    o: Observed, what: str, both: Pairs, before: NeuronCorrelations, place: Path
) -> list[dict[str, object]]:
    """The strongest units over the checkpoints that were kept (paper figures 11 and 40)."""
    series = [(0, before.overall)]
    model = build_model(o.config, o.task, o.of.seed).to(o.device).eval()
    for step, saved in _checkpoints(place / "checkpoints"):
        load_weights(model, saved, best=False)
        series.append((step, _correlations(o, both, model).overall))
    if len(series) < 3:
        return []
    r = np.stack([x for _, x in series])
    units = np.argsort(-np.abs(r[-1]), kind="stable")[:6]
    return [{
        "kind": "lines", "title": f"units of {what} over training", "xlabel": "optimiser steps",
        "x": [step for step, _ in series],
        "lines": {f"unit {u}": r[:, u].round(4).tolist() for u in units},
        "note": "Correlation of the strongest units at every checkpoint that was kept "
        "(--checkpoint.every, --checkpoint.keep).",
    }]  # fmt: skip


def _checkpoints(place: Path) -> Iterator[tuple[int, checkpoint.Checkpoint]]:
    for path in reversed(checkpoint.newest_first(place)):
        try:
            saved = checkpoint.load(path)
        except checkpoint.CheckpointError:
            continue
        yield saved.step, saved
