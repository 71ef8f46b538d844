"""The chosen heads of a grid run as analyses see them: frozen features and one matrix each.

Legend: N test samples, D features of one, E features of the last modality, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.analysis.alignment import alignment_matrix
from uml_fast.analysis.exchange import ExchangeRate, Point, exchange_rate
from uml_fast.analysis.findings import Findings, Of
from uml_fast.analysis.inputs import AnalysisError, class_means
from uml_fast.analysis.of_heads import Trained
from uml_fast.analysis.shift import class_map, shifted_accuracy
from uml_fast.encoders.cache import NamedFeatures, load_features
from uml_fast.grid.cells import Cell
from uml_fast.grid.data import GridData
from uml_fast.grid.heads import Heads
from uml_fast.grid.results import load_heads
from uml_fast.grid.run import UNIMODAL, GridConfig
from uml_fast.grid.train import chosen_samples, next_lesson

SAME = 1e-2
"""Largest difference, relative to the largest weight, between a head and its repetition."""


@dataclass(frozen=True, slots=True, eq=False)
class ChosenHead:
    """The best head of a (variant, row, shots, seed)."""

    variant: str
    row: tuple[tuple[str, Any], ...]
    """Values of the axes that are rows of the table."""
    is_averaged: bool
    """Whether the auxiliaries had one sample of each class, the mean of all."""
    cell: Cell
    step: int
    """Step of its weights."""
    test: float
    """Test accuracy, 0..1."""
    weight_DC: np.ndarray

    @property
    def mode(self) -> str:
        """unimodal or uml."""
        return UNIMODAL if self.variant == UNIMODAL else "uml"


def chosen_heads(folder: Path) -> list[ChosenHead]:
    """The heads that a grid run kept, by shots, seed and variant.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    found = []
    for head in load_heads(folder):
        r = head.record
        cell = Cell(**r["cell"] | {"modalities": tuple(r["cell"]["modalities"])})
        weight = head.weight.numpy().astype(np.float64)
        found.append(ChosenHead(
            r["variant"], tuple(r["row"].items()), r["is_averaged"], cell, r["step"], r["test"],
            weight,
        ))  # fmt: skip
    return sorted(found, key=lambda h: (h.cell.shots, h.cell.seed, h.variant, h.row))


def settings_of(heads: Sequence[ChosenHead]) -> dict[str, list[ChosenHead]]:
    """Setting -> its UML heads, one a seed; each stands beside the unimodal head of its shots."""
    variants = {h.variant for h in heads if h.mode == "uml"}
    out: dict[str, list[ChosenHead]] = {}
    for h in heads:
        if h.mode == UNIMODAL:
            continue
        shots = f"{h.cell.shots} shot{'s' if h.cell.shots != 1 else ''}" if h.cell.shots else "all"
        parts = [shots] + [h.variant] * (len(variants) > 1)
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in h.row]
        out.setdefault(", ".join(parts), []).append(h)
    return out


class Loaded:
    """The features of a run, loaded once for all heads that share them."""

    def __init__(self, config: GridConfig) -> None:
        self._config, self._key = config, (-1, -1)
        self._data: GridData | None = None

    def of(self, head: ChosenHead) -> GridData:
        """The features that a head was trained and tested on.

        Raises:
            DataError: they are missing or cannot be used.
        """
        c = self._config
        key = (head.cell.seed, head.cell.shots) if c.data.varies else (c.seed, c.shots[0])
        if self._data is None or key != self._key:
            self._data, self._key = c.data.load(c.modalities, *key), key
        return self._data.averaged() if head.is_averaged else self._data


def look_at_head(
    found: Findings, head: ChosenHead, data: GridData, setting: str, config: GridConfig
) -> Trained:
    """A head and the test samples, the same for all heads on these features.

    ``aligned`` is measured on the head proper, in the space of the last modality. With a projection
    only the product of both is kept, so the head is trained once more, from the same draws.
    """
    test = data.heads.test
    aligned = {}
    last = head.cell.modalities[-1]
    if head.mode == "uml" and last != config.target:
        with found.attempt(f"alignment with {last}"):
            own_EC = head_matrix(head, data, config)
            train = data.heads.train[last]
            means = class_means(
                train.rows.numpy().astype(np.float64), train.labels.numpy(), data.heads.classes
            )
            classes = np.flatnonzero(np.isfinite(means).all(1))
            aligned[last] = (classes, alignment_matrix(own_EC.T[classes], means[classes]))
    return Trained(
        of=Of(head.mode, head.cell.seed, setting), rows=test.rows.numpy(),
        labels=test.labels.numpy(), head=head.weight_DC.T, is_frozen=True, aligned=aligned,
    )  # fmt: skip


def head_matrix(head: ChosenHead, data: GridData, config: GridConfig) -> np.ndarray:
    """float64 (E, C) the head in the space of the last modality, without scale and projection.

    Raises:
        AnalysisError: training it once more gives another head, as with other features.
    """
    heads = Heads(data.heads, [head.cell], 1)
    heads.start(0, head.cell)
    chosen = chosen_samples(data.heads, head.cell)
    held_out = np.zeros(1, np.int32)
    lesson = next_lesson(head.cell, chosen, held_out, 0, head.step, config.schedule)
    heads.train({0: lesson})
    again = heads.folded(0).numpy().astype(np.float64)
    off = np.abs(again - head.weight_DC).max() / max(np.abs(head.weight_DC).max(), 1e-30)
    if off > SAME:
        raise AnalysisError(
            f"alignment: training {head.variant} seed {head.cell.seed} once more gives another "
            f"head (off by {100 * off:.2g} %); are these the features that it was trained on?"
        )
    width = data.heads.train[head.cell.modalities[-1]].width
    own = heads.parts(0, head.cell).head[:width, : data.heads.classes]
    return own.numpy().astype(np.float64)


def open_shifted_features(places: Mapping[str, str]) -> dict[str, NamedFeatures]:
    """Features of shifted test sets by their names (python -m uml_fast.extract).

    Raises:
        DataError: a file that is missing, damaged or not one of features.
    """
    return {name: load_features(Path(place)) for name, place in places.items()}


def shifted_heads(
    found: Findings, t: Trained, sets: Mapping[str, NamedFeatures], names: Sequence[str],
    renames: Mapping[str, str],
) -> None:  # fmt: skip
    """Accuracy of one head on shifted sets."""
    assert t.head is not None
    for name, features in sets.items():
        with found.attempt(f"shift to {name}"):
            mapping = class_map([renames.get(n, n) for n in features.class_names], names)
            labelled = features.labels.numpy() >= 0
            rows = features.rows.numpy()[labelled]
            if rows.shape[1] != t.head.shape[1]:
                raise AnalysisError(
                    f"{name} has {rows.shape[1]} features, the head reads {t.head.shape[1]}; "
                    "extract both with one encoder"
                )
            got = shifted_accuracy(rows @ t.head.T, features.labels.numpy()[labelled], mapping)
            found.add("shift", got.accuracy, t.of, name)
            found.notes["shift", name, t.of.setting] = (
                f"{got.samples:,} samples, {got.classes} of the head's {len(t.head)} classes"
            )
            if got.classes < len(t.head):
                found.add("shift_all", got.accuracy_all, t.of, name)


def rate_findings(
    found: Findings, heads: Sequence[ChosenHead], data: GridData, words: float | None
) -> list[dict[str, Any]]:
    """The exchange rate of every variant with numbers of texts as rows of the table (4.4, E.4)."""
    rates: list[dict[str, Any]] = []
    for variant in sorted({h.variant for h in heads if h.mode == "uml"}):
        with found.attempt("exchange rate"):
            own = [h for h in heads if h.variant in (variant, UNIMODAL)]
            points = [p for h in own if (p := _point(h, data)) is not None]
            if len({p.text_shots for p in points if p.text_shots > 0}) < 2:
                raise AnalysisError(
                    "the run has one number of texts alone; train with --rows auxiliary_shots and "
                    "--search.auxiliary-shots 1 5 15"
                )
            rate = exchange_rate(points, words)
            rates.append({"variant": variant} | _as_json(rate))
            found.charts.append(_plane_chart(variant, points, rate))
    return rates


def _point(head: ChosenHead, data: GridData) -> Point | None:
    """A head as a point of the plane; None for one that saw the mean of the texts."""
    if head.is_averaged:
        return None
    texts = dict(head.row).get("auxiliary_shots", head.cell.auxiliary_shots)
    last = data.heads.train.get(head.cell.modalities[-1])
    target = data.heads.train[data.heads.target]
    if head.mode == UNIMODAL:
        texts = 0
    elif texts == 0 and last is not None:
        texts = len(last) / data.heads.classes
    return Point(
        seed=head.cell.seed, image_shots=head.cell.shots or len(target) / data.heads.classes,
        text_shots=float(texts), accuracy=head.test,
    )  # fmt: skip


def _as_json(rate: ExchangeRate) -> dict[str, Any]:
    def interval(x: Any) -> dict[str, Any]:
        return {"mean": x.mean, "ci95_low": x.ci95_low, "ci95_high": x.ci95_high}

    return {
        "per_image": interval(rate.per_image), "per_text": interval(rate.per_text),
        "texts_per_image": rate.texts_per_image, "ci95": rate.ci95, "bootstrap": rate.bootstrap,
        "words_per_image": rate.words_per_image, "words_ci95": rate.words_ci95,
        "r_squared": rate.r_squared, "residual": rate.residual, "seeds": rate.seeds,
        "warnings": list(rate.warnings), "sentence": rate.sentence(),
    }  # fmt: skip


def _plane_chart(variant: str, points: Sequence[Point], rate: ExchangeRate) -> dict[str, Any]:
    cells: dict[tuple[float, float], list[float]] = {}
    for p in points:
        cells.setdefault((p.image_shots, p.text_shots), []).append(p.accuracy)
    return {
        "kind": "plane", "title": f"exchange rate ({variant})",
        "image_shots": [i for i, _ in cells], "text_shots": [t for _, t in cells],
        "accuracy": [round(float(np.mean(v)), 5) for v in cells.values()],
        "plane": [rate.intercept, rate.per_image.mean, rate.per_text.mean],
        "note": " ".join([
            *(f"{s[0].upper()}{s[1:]}." for s in (rate.sentence(), *rate.warnings)),
            "Points: test accuracy in %; lines: equal accuracies of the plane.",
        ]),
    }  # fmt: skip


def mean_words(path: Path) -> float:
    """Mean words (parts between white space) of the texts of a table.

    Raises:
        DataError: it is no table of texts.
    """
    from uml_fast.data.prepare.tables import TextColumns
    from uml_fast.data.prepare.text import find_texts

    return float(np.mean([len(i.value.split()) for i in find_texts(path, TextColumns()).items]))
