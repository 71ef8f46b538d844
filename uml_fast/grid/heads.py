"""Parameters of the cells in training, side by side in memory, and the steps that change them.

Legend: K cells at a time, k modalities of a cell, D features of a modality, E of the head's input,
C classes; sizes of features and classes in memory are multiples of 16, filled with zeros, so that
rows are whole vectors.

A cell's parameters are one row: k logit scales (padded to a multiple of 16), the head (E, C), then
the projection (D, E) of each modality that has one, in the cell's order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uml_fast.grid.cells import Cell, Precision
from uml_fast.grid.features import Features, HeadData, few_shot, stream
from uml_fast.kernels.native.library import library

ALIGN = 16
"""Floats that sizes in memory are multiples of."""


def padded(size: int) -> int:
    """The size in memory."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Features as the kernels read them."""

    rows: Tensor
    """float32 (n, padded width), zeros beyond the features."""
    labels: Tensor
    """int32 (n,)."""

    @staticmethod
    def of(features: Features, device: torch.device) -> Bank:
        """A copy of features."""
        rows = torch.zeros(len(features), padded(features.width), device=device)
        rows[:, : features.width] = features.rows
        return Bank(rows, features.labels.int().to(device))

    @property
    def width(self) -> int:
        """Padded features."""
        return self.rows.shape[1]

    def source(self) -> tuple[int, int, int]:
        """Addresses of rows and labels, and the width, as the kernels take them."""
        return self.rows.data_ptr(), self.labels.data_ptr(), self.width


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """The next steps of a cell."""

    cell: Cell
    begin: int
    """Steps that were done before."""
    rates: np.ndarray
    """float32 (steps,) learning rates."""
    orders: tuple[np.ndarray, ...]
    """int32 (steps, batch) training samples of each of the cell's modalities."""
    held_out: np.ndarray
    """int32 validation samples that are looked at after the steps."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Views of a cell's parameters, or of a moment of them; of several cells with a first axis."""

    scales: Tensor
    """(..., k) logit scales."""
    head: Tensor
    """(..., E, C)."""
    projections: tuple[Tensor | None, ...]
    """(..., D, E) of each of the k modalities; None: its features are the head's input."""

    def tensors(self) -> list[Tensor]:
        """Those that there are: scales, head, projections."""
        return [self.scales, self.head, *(p for p in self.projections if p is not None)]


class Heads:
    """Weights and moments of K cells.

    Args:
        data: features and sizes.
        cells: those that slots must have room for.
        slots: K.
        device: where they lie.
        precision: of the products in a step (``HeadSchedule.precision``).
    """

    def __init__(
        self,
        data: HeadData,
        cells: Iterable[Cell],
        slots: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        precision: Precision = "highest",
    ) -> None:
        self.data = data
        self._precision = precision
        self.classes = data.classes
        self.slots = slots
        cells = list(cells)
        self.banks = {
            name: Bank.of(data.train[name], device)
            for name in {m: None for c in cells for m in c.modalities}
        }
        self.validation = Bank.of(data.validation, device)
        self._test = Bank.of(data.test, device)
        size = max(self.floats(c) for c in cells)
        self._state = torch.zeros(slots, 3, size, device=device)
        shape = slots, self.validation.width, padded(self.classes)
        self._folded = torch.zeros(shape, device=device)
        self._kept = torch.zeros(shape, device=device)

    def floats(self, cell: Cell) -> int:
        """Length of a cell's row of parameters."""
        width = self.banks[cell.modalities[-1]].width
        inputs = sum(self.banks[m].width for m in cell.modalities if cell.is_projected(m))
        return padded(len(cell.modalities)) + width * (padded(self.classes) + inputs)

    def parts(self, slot: int, cell: Cell, kind: int = 0) -> Parts:
        """Views of a slot as a cell uses it.

        ``kind`` 0: weights; 1, 2: first and second moments of AdamW.
        """
        return self.views(self._state[slot, kind], cell)

    def views(self, row: Tensor, cell: Cell) -> Parts:
        """Views of a cell's row of parameters, or (..., floats) of several like it."""
        rows, cols = self.banks[cell.modalities[-1]].width, padded(self.classes)
        at = padded(len(cell.modalities))
        head = row[..., at : at + rows * cols].unflatten(-1, (rows, cols))
        at += rows * cols
        projections: list[Tensor | None] = []
        for modality in cell.modalities:
            if not cell.is_projected(modality):
                projections.append(None)
                continue
            width = self.banks[modality].width
            projections.append(row[..., at : at + width * rows].unflatten(-1, (width, rows)))
            at += width * rows
        return Parts(row[..., : len(cell.modalities)], head, tuple(projections))

    def start(self, slot: int, cell: Cell) -> None:
        """Put a cell with its first weights into a slot (torch.nn.Linear's distribution)."""
        self._state[slot].zero_()
        parts, train = self.parts(slot, cell), self.data.train
        parts.scales.fill_(cell.scale)
        width = train[cell.modalities[-1]].width

        for modality, projection in zip(cell.modalities, parts.projections, strict=True):
            if projection is not None:
                rows = train[modality].width
                projection[:rows, :width] = _first_weights(cell.seed, modality, rows, width)
        if cell.init == "random":
            first = _first_weights(cell.seed, "head", width, self.classes)
        else:
            first = class_directions(self.data, cell).T
        parts.head[:width, : self.classes] = first

    def folded(self, slot: int) -> Tensor:
        """View of (D, C) the one matrix that a cell is for a sample of the target, as it was after
        its last lesson."""
        return self._folded[slot, : self.data.train[self.data.target].width, : self.classes]

    def keep(self, slot: int) -> None:
        """Keep the folded matrix of a slot as it is now."""
        self._kept[slot] = self._folded[slot]

    def kept(self, slot: int) -> Tensor:
        """View of (D, C) the folded matrix that was kept of a slot."""
        return self._kept[slot, : self.data.train[self.data.target].width, : self.classes]

    def test_accuracies(self, slots: Sequence[int]) -> list[float]:
        """Accuracy of what was kept of some slots on the test samples, 0..1."""
        native = library()
        rows, labels = self._test.rows, self._test.labels
        if native is not None and rows.device.type == "cpu":
            right = native.test_heads(
                torch.get_num_threads(), self._test.source(), len(rows), self.classes,
                [self._kept[slot].data_ptr() for slot in slots],
            )  # fmt: skip
        else:
            guesses = [(rows[:, : len(w)] @ w).argmax(1) for w in map(self.kept, slots)]
            right = [int((guess == labels).sum()) for guess in guesses]
        return [r / len(rows) for r in right]

    def train(self, lessons: Mapping[int, Lesson]) -> dict[int, int]:
        """The next steps of the cells in some slots; how many held-out samples each gets right."""
        native = library()
        if native is None:
            from uml_fast.grid.reference import look, train_cell

            for slot, lesson in lessons.items():
                train_cell(self, slot, lesson)
            return {slot: look(self, slot, lesson) for slot, lesson in lessons.items()}
        sources = {name: bank.source() for name, bank in self.banks.items()}
        right = native.train_heads(
            torch.get_num_threads(), self.validation.source(), self.classes,
            self._precision == "high",
            [
                (
                    (
                        *(self._state[slot, kind].data_ptr() for kind in range(3)),
                        x.rates.ctypes.data, x.begin, len(x.rates), x.cell.weight_decay,
                        x.cell.learn_scale, self._folded[slot].data_ptr(),
                        x.held_out.ctypes.data, len(x.held_out),
                    ),
                    [
                        (
                            sources[m], order.ctypes.data, x.cell.batch_of(m),
                            x.cell.weight_of(m), x.cell.is_projected(m),
                        )
                        for m, order in zip(x.cell.modalities, x.orders, strict=True)
                    ],
                )
                for slot, x in lessons.items()
            ],
        )  # fmt: skip
        return dict(zip(lessons, right, strict=True))


@functools.lru_cache(maxsize=16)
def _first_weights(seed: int, name: str, rows: int, cols: int) -> Tensor:
    values = stream(seed, "weights", name).random((rows, cols), dtype=np.float32)
    return torch.from_numpy((values * 2 - 1) / np.float32(rows**0.5))


def class_directions(data: HeadData, cell: Cell) -> Tensor:
    """(C, E) L2-normalised means of the samples that a cell sees of its ``init`` modality.

    Zeros for a class without samples.
    """
    samples = data.train[cell.init]
    chosen = torch.from_numpy(
        few_shot(samples.labels, cell.shots_of(cell.init), cell.seed, cell.init)
    )
    rows, labels = samples.rows[chosen], samples.labels[chosen]
    return F.normalize(torch.zeros(data.classes, samples.width).index_add_(0, labels, rows))
