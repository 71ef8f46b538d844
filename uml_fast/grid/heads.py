"""Parameters of the cells in training, side by side in memory, and the steps that change them.

Legend: K cells at a time, D features of an image, E of the head's input, C classes; sizes of
features and classes in memory are multiples of 16, filled with zeros, so that rows are whole
vectors.

A cell's parameters are one row: two logit scales (padded to 16), the head (E, C), the projection
(D, E). mode unimodal: no projection, E = D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uml_fast.grid.cells import Cell
from uml_fast.grid.features import Features, HeadData
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
    def of(features: Features) -> Bank:
        """A copy of features."""
        n, width = features.rows.shape
        rows = torch.zeros(n, padded(width))
        rows[:, :width] = features.rows
        return Bank(rows, features.labels.int())


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """The next steps of a cell."""

    cell: Cell
    begin: int
    """Steps that were done before."""
    rates: np.ndarray
    """float32 (steps,) learning rates."""
    image_order: np.ndarray
    """int32 (steps, batch) training images."""
    text_order: np.ndarray | None
    """int32 (steps, batch) texts; None: images alone."""


class Heads:
    """Weights and moments of K cells.

    Args:
        data: features and sizes.
        slots: K.
    """

    def __init__(self, data: HeadData, slots: int) -> None:
        self.image, self.text = Bank.of(data.train), Bank.of(data.text)
        self._image_dim, self._text_dim = data.train.rows.shape[1], data.text.rows.shape[1]
        self.classes = data.classes
        self._text_means = _class_means(data.text, data.classes)
        size = ALIGN + self._head_rows("uml") * padded(self.classes)
        size += self.image.rows.shape[1] * self.text.rows.shape[1]
        unimodal = ALIGN + self._head_rows("unimodal") * padded(self.classes)
        self._state = torch.zeros(slots, 3, max(size, unimodal))

    def _head_rows(self, mode: str) -> int:
        return (self.text if mode == "uml" else self.image).rows.shape[1]

    def parts(self, slot: int, cell: Cell, kind: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of a slot: scales (2,), head (E, C) and projection (D, E), as a cell uses it.

        ``kind`` 0: weights; 1, 2: first and second moments of AdamW.
        """
        row, rows, cols = self._state[slot, kind], self._head_rows(cell.mode), padded(self.classes)
        at = ALIGN + rows * cols
        head = row[ALIGN:at].view(rows, cols)
        if cell.mode == "unimodal":
            return row[:2], head, None
        images = self.image.rows.shape[1]
        return row[:2], head, row[at : at + images * rows].view(images, rows)

    def start(self, slot: int, cell: Cell) -> None:
        """Put a cell with freshly drawn weights into a slot (torch.nn.Linear's distribution)."""
        self._state[slot].zero_()
        scales, head, projection = self.parts(slot, cell)
        scales.fill_(1)
        generator = torch.Generator().manual_seed(cell.seed)

        def draw(out_features: int, in_features: int) -> Tensor:
            values = torch.rand(out_features, in_features, generator=generator)
            return (values * 2 - 1) / in_features**0.5

        if projection is None:
            head[: self._image_dim, : self.classes] = draw(self.classes, self._image_dim).T
            return
        projection[: self._image_dim, : self._text_dim] = draw(self._text_dim, self._image_dim).T
        drawn = draw(self.classes, self._text_dim)
        first = F.normalize(self._text_means) if cell.init == "text" else drawn
        head[: self._text_dim, : self.classes] = first.T

    def folded(self, slot: int, cell: Cell) -> Tensor:
        """(D, C) the one matrix that a cell is for an image."""
        scales, head, projection = self.parts(slot, cell)
        whole = head if projection is None else projection @ head
        return whole[: self._image_dim, : self.classes] * scales[0]

    def train(self, lessons: Mapping[int, Lesson]) -> None:
        """The next steps of the cells in some slots."""
        native = library()
        if native is None:
            from uml_fast.grid.reference import train_cell

            for slot, lesson in lessons.items():
                train_cell(self, slot, lesson)
            return
        native.train_heads(
            torch.get_num_threads(),
            self.image.rows.data_ptr(), self.image.labels.data_ptr(), self.image.rows.shape[1],
            self.text.rows.data_ptr(), self.text.labels.data_ptr(), self.text.rows.shape[1],
            self.classes,
            [
                (
                    *(self._state[slot, kind].data_ptr() for kind in range(3)),
                    x.image_order.ctypes.data,
                    0 if x.text_order is None else x.text_order.ctypes.data,
                    x.rates.ctypes.data, x.begin, len(x.rates), x.cell.batch, x.cell.alpha,
                    x.cell.weight_decay, x.cell.mode == "uml", x.cell.learn_scale,
                )
                for slot, x in lessons.items()
            ],
        )  # fmt: skip


def _class_means(text: Features, classes: int) -> Tensor:
    """(C, E) mean of each class, zeros where it has no text."""
    sums = torch.zeros(classes, text.rows.shape[1]).index_add_(0, text.labels, text.rows)
    counts = torch.bincount(text.labels, minlength=classes).clamp(min=1)
    return sums / counts.unsqueeze(1)
