"""A grid of heads from first weights to test accuracy, some cells at a time.

A cell's result depends on that cell alone: its samples, their order and its first weights are drawn
from its own seed, and cells share nothing but the memory of the features. On a CPU a few cells are
in training at a time, each for ``eval_every`` steps in one native call, so that its weights stay
in the cache of a core; a cell that stops makes room for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from uml_fast.grid.cells import Cell, HeadSchedule
from uml_fast.grid.features import HeadData, few_shot, sample_order
from uml_fast.grid.heads import Heads, Lesson

_SLOTS = 32
"""Cells in training at a time: enough to keep the threads busy while single ones stop."""
_IMAGES, _TEXTS = 0, 1
"""Streams of sample orders."""


@dataclass(frozen=True, slots=True, eq=False)
class CellResult:
    """What became of a cell."""

    cell: Cell
    validation: float
    """Best accuracy on the validation samples, 0..1; the earliest step with it counts."""
    step: int
    """Step before which it was reached; 0: the first weights."""
    steps: int
    """Steps trained."""
    test: float
    """Accuracy on the test images with the weights of that step, 0..1."""
    weight: Tensor
    """float32 (classes, features): those weights as one matrix, projection and scale included."""


@dataclass(slots=True)
class _Progress:
    """A cell in training."""

    number: int
    cell: Cell
    chosen: np.ndarray
    held_out: Tensor
    done: int = 0
    best: float = -1.0
    best_step: int = 0
    failures: int = 0
    weight: Tensor = field(default_factory=lambda: torch.empty(0))


def train_grid(
    data: HeadData,
    cells: Sequence[Cell],
    schedule: HeadSchedule | None = None,
    *,
    report: Callable[[int, int], None] | None = None,
) -> list[CellResult]:
    """Train every cell of a grid; results in the order of ``cells``.

    Args:
        data: features of images and texts.
        cells: what is trained (``product`` makes them).
        schedule: length, learning rate and early stopping; None: the paper's.
        report: called with the number of cells that are done, and of all, when one ends.

    Raises:
        DataError: a cell asks for shots of a class that has no image.
    """
    schedule = schedule or HeadSchedule()
    waiting = list(enumerate(cells))[::-1]
    heads = Heads(data, min(_SLOTS, max(1, len(cells))))
    held: dict[int, _Progress] = {}
    free = list(range(min(_SLOTS, len(cells))))
    results: dict[int, CellResult] = {}
    while waiting or held:
        while waiting and free:
            slot = free.pop()
            number, cell = waiting.pop()
            heads.start(slot, cell)
            held[slot] = _begin(data, number, cell)
        for slot, progress in list(held.items()):
            if _look(data, heads, slot, progress, schedule):
                results[progress.number] = _result(data, progress)
                del held[slot]
                free.append(slot)
                if report is not None:
                    report(len(results), len(cells))
        _advance(data, heads, held, schedule)
    return [results[i] for i in range(len(cells))]


def _begin(data: HeadData, number: int, cell: Cell) -> _Progress:
    chosen = few_shot(data.train.labels, cell.shots, cell.seed, data.classes)
    of_validation = few_shot(data.validation.labels, min(4, cell.shots), cell.seed, data.classes)
    return _Progress(number, cell, chosen, torch.from_numpy(of_validation))


def _look(
    data: HeadData, heads: Heads, slot: int, progress: _Progress, schedule: HeadSchedule
) -> bool:
    """Compare with the validation samples; whether the cell ends here."""
    weight = heads.folded(slot, progress.cell)
    rows = data.validation.rows[progress.held_out]
    labels = data.validation.labels[progress.held_out]
    accuracy = float(((rows @ weight).argmax(1) == labels).float().mean())
    if accuracy > progress.best:
        progress.best, progress.best_step, progress.failures = accuracy, progress.done, 0
        progress.weight = weight
    else:
        progress.failures += 1
    return progress.done >= schedule.steps or progress.failures >= schedule.patience


def _result(data: HeadData, progress: _Progress) -> CellResult:
    right = (data.test.rows @ progress.weight).argmax(1) == data.test.labels
    return CellResult(
        progress.cell, progress.best, progress.best_step, progress.done,
        float(right.float().mean()), progress.weight.T.contiguous(),
    )  # fmt: skip


def next_lesson(
    data: HeadData, cell: Cell, begin: int, end: int, schedule: HeadSchedule,
    chosen: np.ndarray | None = None,
) -> Lesson:  # fmt: skip
    """Steps [begin, end) of a cell; ``chosen`` are its shots if they are drawn already."""
    if chosen is None:
        chosen = few_shot(data.train.labels, cell.shots, cell.seed, data.classes)
    text_order = None
    if cell.mode == "uml":
        everything = np.arange(len(data.text), dtype=np.int32)
        text_order = sample_order(everything, cell.seed, _TEXTS, cell.batch, begin, end)
    image_order = sample_order(chosen, cell.seed, _IMAGES, cell.batch, begin, end)
    return Lesson(cell, begin, schedule.rates(cell.lr, begin, end), image_order, text_order)


def _advance(
    data: HeadData, heads: Heads, held: dict[int, _Progress], schedule: HeadSchedule
) -> None:
    """The steps of every cell in training until its next look."""
    lessons = {}
    for slot, p in held.items():
        end = min(p.done + schedule.eval_every, schedule.steps)
        lessons[slot] = next_lesson(data, p.cell, p.done, end, schedule, p.chosen)
        p.done = end
    heads.train(lessons)
