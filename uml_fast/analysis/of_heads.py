"""The analyses of one trained model's head and test samples, as findings.

Legend: N samples, D features that the head reads, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from uml_fast.analysis.alignment import alignment
from uml_fast.analysis.boundary import boundary_view, most_confused
from uml_fast.analysis.clusters import cluster_scores
from uml_fast.analysis.findings import Findings, Of
from uml_fast.analysis.inputs import AnalysisError, evenly
from uml_fast.analysis.margins import functional_margins
from uml_fast.analysis.similarity import linear_cka, mutual_knn

SHOWN_POINTS = 150
"""Samples of a class in the picture of a boundary at most."""
SHOWN_CLASSES = 60
"""Classes in a heat map at most, evenly chosen."""
BINS = 40
"""Bars of a histogram."""
NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trained:
    """What is analysed of one trial."""

    of: Of
    rows: np.ndarray
    """float (N, D) labelled test samples of the target, as the head reads them; all of them where
    none has a label."""
    labels: np.ndarray
    """int (N,); empty where none has a label."""
    head: np.ndarray | None
    """float (C, D) the head with projection and scale folded in; None: the run has no head."""
    is_frozen: bool = False
    """The rows are the same in every trial, because the encoder is frozen."""
    aligned: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Auxiliary -> classes (K,) it has samples of, and inner products (K, K) of their head rows
    with their class means."""


def head_findings(found: Findings, t: Trained) -> None:
    """Margins, cluster scores and alignment of one trial."""
    if not t.is_frozen:
        with found.attempt("clusters of embeddings"):
            _clusters(found, t, t.rows, "embeddings")
    if t.head is None:
        for name in ("margins", "alignment", "decision boundary"):
            found.skipped.setdefault(name, "the run has no head (objective next_embedding)")
        return
    with found.attempt("clusters of logits"):
        _clusters(found, t, t.rows @ t.head.T, "logits")
    with found.attempt("margins"):
        margins = functional_margins(t.head, t.rows, t.labels)
        length = np.linalg.norm(t.rows, axis=1)
        unit = np.divide(margins, length, out=np.zeros_like(margins), where=length > 0)
        found.add("margin", float(margins.mean()), t.of)
        if not t.is_frozen:
            found.add("margin_unit", float(unit.mean()), t.of)
            found.notes["margin", "", t.of.setting] = (
                "in the unit of the embeddings, which each mode trains to a length of its own"
            )
    for name, (classes, matrix) in t.aligned.items():
        with found.attempt(f"alignment with {name}"):
            a = alignment(matrix)
            found.add("alignment", a.contrast, t.of, name)
            found.add("alignment_top1", a.top1, t.of, name)
            key = ("alignment", name, t.of.setting)
            others = found.notes.get(key, "")
            found.notes[key] = f"{others}, {a.p_value:.3g}" if others else (
                "the diagonal against the rest, in standard deviations; at random 0; permutation "
                f"p by seed: {a.p_value:.3g}"
            )  # fmt: skip
            chance = f"at random {100 / len(classes):.2g} %"
            found.notes["alignment_top1", name, t.of.setting] = chance


def own_accuracy(found: Findings, t: Trained) -> None:
    """Accuracy of the head on the run's own test samples, which shifted sets are compared with."""
    if t.head is not None:
        right = (t.rows @ t.head.T).argmax(1) == t.labels
        found.add("test", float(right.mean()), t.of)


def _clusters(found: Findings, t: Trained, rows: np.ndarray, space: str) -> None:
    scores = cluster_scores(rows, t.labels)
    found.add("silhouette", scores.silhouette, t.of, space)
    found.add("davies_bouldin", scores.davies_bouldin, t.of, space)


def pair_findings(found: Findings, first: Trained, second: Trained) -> None:
    """How alike the two models of a seed represent the same test samples."""
    with found.attempt("similarity of both modes"):
        if first.is_frozen:
            a, b = (t.rows @ t.head.T for t in (first, second) if t.head is not None)
            what = "logits of both modes"
        else:
            a, b, what = first.rows, second.rows, "embeddings of both modes"
        found.add("cka", linear_cka(a, b), second.of, what)
        k = min(NEIGHBOURS, len(a) - 1)
        found.add("knn", mutual_knn(a, b, k), second.of, what)
        found.notes["knn", what, second.of.setting] = (
            f"of {k}; at random {100 * k / (len(a) - 1):.2g} %"
        )


def pictures(found: Findings, trained: Sequence[Trained], class_names: Sequence[str]) -> None:
    """Charts of one seed: margins, the boundary of the most confused classes, heat maps."""
    with_head = [t for t in trained if t.head is not None]
    if not with_head:
        return

    def name(c: int) -> str:
        return class_names[c] if c < len(class_names) else str(c)

    of = f"seed {with_head[0].of.seed}" + (f", {s}" if (s := with_head[0].of.setting) else "")
    with found.attempt("margins"):
        found.charts.append(_margins(with_head, of))
    with found.attempt("decision boundary"):
        first = with_head[0]
        assert first.head is not None
        a, b = most_confused(first.rows @ first.head.T, first.labels)
        panels = [_boundary(t, a, b) for t in with_head]
        found.charts.append({
            "kind": "boundary", "title": f"boundary of {name(a)} and {name(b)} ({of})",
            "names": [name(a), name(b)], "panels": panels,
            "note": f"The pair that the {first.of.mode} model confuses most. Across: along the "
            "difference of both head rows, the boundary is where it is 0 (F.2).",
        })  # fmt: skip
    for t in with_head:
        for auxiliary, (classes, matrix) in t.aligned.items():
            chosen = evenly(len(classes), SHOWN_CLASSES)
            found.charts.append({
                "kind": "heat", "title": f"head rows and class means of {auxiliary} ({of})",
                "matrix": np.round(matrix[np.ix_(chosen, chosen)], 4).tolist(),
                "names": [name(int(classes[c])) for c in chosen],
                "xlabel": f"class means of {auxiliary}",
                "note": "Inner products (figure 47): a row of the head, a column for each class "
                f"mean of {auxiliary}. " + (f"{len(chosen)} of {len(classes)} classes."
                                            if len(chosen) < len(classes) else ""),
            })  # fmt: skip


def _margins(trained: Sequence[Trained], of: str) -> dict[str, object]:
    values = {
        t.of.mode: functional_margins(t.head, t.rows, t.labels)
        for t in trained
        if t.head is not None
    }
    together = np.concatenate(list(values.values()))
    low, high = float(together.min()), float(together.max())
    if not low < high:
        raise AnalysisError("margins: all are equal")
    edges = np.linspace(low, high, BINS + 1)
    bars = {m: np.histogram(v, edges)[0] / len(v) for m, v in values.items()}
    return {
        "kind": "histogram", "title": f"functional margins ({of})", "xlabel": "margin",
        "edges": np.round(edges, 5).tolist(),
        "bars": {m: np.round(v, 5).tolist() for m, v in bars.items()},
        "note": "Test samples; left of 0 they are misclassified.",
    }  # fmt: skip


def _boundary(t: Trained, a: int, b: int) -> dict[str, object]:
    assert t.head is not None
    view = boundary_view(t.head, t.rows, t.labels, a, b)
    parts = [view.points_M2[view.is_a_M], view.points_M2[~view.is_a_M]]
    shown = [np.round(p[evenly(len(p), SHOWN_POINTS)], 4).tolist() for p in parts]
    return {"mode": t.of.mode, "points": shown}
