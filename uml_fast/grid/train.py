"""A grid of heads from first weights to test accuracy, some cells at a time.

A cell's result depends on that cell alone: its samples, their order and its first weights are drawn
from its own seed, and cells share nothing but the memory of the features. On a CPU a few cells are
in training at a time, each for ``eval_every`` steps in one native call, so that its weights stay
in the cache of a core; a cell that stops makes room for the next. There are two crews of such
cells: while one is in the native call, results of the other are read and its next steps drawn.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from uml_fast.config import require
from uml_fast.grid.cells import Cell, HeadSchedule
from uml_fast.grid.features import HeadData, few_shot, sample_order
from uml_fast.grid.heads import Heads, Lesson
from uml_fast.grid.stacked import StackedHeads
from uml_fast.runtime.device import resolve_device

_CREW = 32
"""Cells of a crew: enough to keep the threads busy while single ones stop."""
_MOST_SHOTS = 4
"""Validation samples of each class that a cell with shots sees, if it has as many shots."""


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
    """Accuracy on the test samples with the weights of that step, 0..1."""
    weight: Tensor | None
    """float32 (D, C): those weights as one matrix, projection and scale of the target included, so
    that logits are ``rows @ weight``; None unless asked for."""


@dataclass(slots=True)
class _Progress:
    """A cell in training."""

    number: int
    cell: Cell
    chosen: tuple[np.ndarray, ...]
    held_out: np.ndarray
    looks: int = 0
    done: int = 0
    best: float = -1.0
    best_step: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Crew:
    """Slots whose cells are trained in one call."""

    free: list[int]
    held: dict[int, _Progress] = field(default_factory=dict)


def train_grid(
    data: HeadData,
    cells: Sequence[Cell],
    schedule: HeadSchedule | None = None,
    *,
    device: str = "cpu",
    stacked: bool | None = None,
    keep_weights: bool = False,
    on_result: Callable[[int, CellResult], None] | None = None,
) -> list[CellResult]:
    """Train every cell of a grid; results in the order of ``cells``.

    Args:
        data: features of every modality.
        cells: what is trained (``product`` makes them).
        schedule: length, learning rate and early stopping; None: the paper's.
        device: "cpu", "cuda", "cuda:N" or "auto".
        stacked: train cells of one shape in batched products (``uml_fast.grid.stacked``), many at
            a time, rather than one on each core; None: where the device is a GPU.
        keep_weights: also give the matrix of each cell (D * C floats each).
        on_result: called with the place in ``cells`` and the result of a cell when it ends.

    Raises:
        DataError: a cell that these samples cannot train (``HeadData.check``).
        ConfigError: a device that is not there, or cells that are not stacked on a GPU.
    """
    place = resolve_device(device)
    stacked = place.type == "cuda" if stacked is None else stacked
    require(stacked or place.type == "cpu", f"cells on {place} are stacked; set stacked=None")
    schedule = schedule or HeadSchedule()
    for cell in cells:
        data.check(cell)
    if not cells:
        return []
    waiting = list(enumerate(cells))[::-1]
    if stacked:
        heads: Heads = StackedHeads(data, cells, place)
        crews = [_Crew(list(range(heads.slots)))]
    else:
        heads = Heads(data, cells, min(2 * _CREW, len(cells)), precision=schedule.precision)
        crews = [_Crew(list(range(first, heads.slots, 2))) for first in range(2)]
    results: dict[int, CellResult] = {}
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="uml-grid") as thread:

        def train(crew: _Crew) -> Callable[[], dict[int, int]]:
            """The next steps of a crew; they begin now, or when what is returned is called."""
            lessons = _next_lessons(heads, crew, waiting, schedule)
            if stacked or not lessons:
                return functools.partial(heads.train, lessons)
            return thread.submit(heads.train, lessons).result

        under_way = deque((crew, train(crew)) for crew in crews)
        while under_way:
            crew, rights = under_way.popleft()
            for number, result in _results(heads, crew, rights(), schedule, keep_weights):
                results[number] = result
                if on_result is not None:
                    on_result(number, result)
            if crew.held or waiting:
                under_way.append((crew, train(crew)))
    return [results[i] for i in range(len(cells))]


def _next_lessons(
    heads: Heads, crew: _Crew, waiting: list[tuple[int, Cell]], schedule: HeadSchedule
) -> dict[int, Lesson]:
    """Fill the free slots of a crew; the next steps of each, the longest first."""
    while waiting and crew.free:
        slot = crew.free.pop()
        number, cell = waiting.pop()
        heads.start(slot, cell)
        crew.held[slot] = _begin(heads.data, number, cell)
    by_length = sorted(crew.held.items(), key=lambda item: -item[1].cell.batch)
    return {slot: _lesson(progress, schedule) for slot, progress in by_length}


def _results(
    heads: Heads, crew: _Crew, rights: dict[int, int], schedule: HeadSchedule, keep_weights: bool
) -> Iterable[tuple[int, CellResult]]:
    """Places and results of a crew's cells that have ended; their slots are free."""
    ended = [s for s, right in rights.items() if _ends(heads, s, crew.held[s], right, schedule)]
    for slot, test in zip(ended, heads.test_accuracies(ended), strict=True):
        progress = crew.held.pop(slot)
        crew.free.append(slot)
        yield progress.number, CellResult(
            progress.cell, progress.best, progress.best_step, progress.done, test,
            heads.kept(slot).cpu().clone() if keep_weights else None,
        )  # fmt: skip


def _begin(data: HeadData, number: int, cell: Cell) -> _Progress:
    return _Progress(number, cell, chosen_samples(data, cell), validation_samples(data, cell))


def _lesson(progress: _Progress, schedule: HeadSchedule) -> Lesson:
    """The steps until the next look; none before the first one."""
    steps = schedule.eval_every if progress.looks else 0
    end = min(progress.done + steps, schedule.steps)
    lesson = next_lesson(
        progress.cell, progress.chosen, progress.held_out, progress.done, end, schedule
    )
    progress.done = end
    return lesson


def _ends(heads: Heads, slot: int, progress: _Progress, right: int, schedule: HeadSchedule) -> bool:
    """Compare a look with the best one; whether the cell ends here."""
    progress.looks += 1
    accuracy = right / len(progress.held_out)
    if accuracy > progress.best:
        progress.best, progress.best_step, progress.failures = accuracy, progress.done, 0
        heads.keep(slot)
    else:
        progress.failures += 1
    return progress.done >= schedule.steps or progress.failures >= schedule.patience


def chosen_samples(data: HeadData, cell: Cell) -> tuple[np.ndarray, ...]:
    """int32 training samples that a cell sees of each of its modalities."""
    return tuple(
        few_shot(data.train[m].labels, cell.shots_of(m), cell.seed, m) for m in cell.modalities
    )


def validation_samples(data: HeadData, cell: Cell) -> np.ndarray:
    """int32 validation samples that a cell is compared with: as many shots, at most 4 a class."""
    shots = min(_MOST_SHOTS, cell.shots)
    return few_shot(data.validation.labels, shots, cell.seed, "validation")


def next_lesson(
    cell: Cell, chosen: tuple[np.ndarray, ...], held_out: np.ndarray, begin: int, end: int,
    schedule: HeadSchedule,
) -> Lesson:  # fmt: skip
    """Steps [begin, end) of a cell on the samples ``chosen`` of each modality."""
    orders = tuple(
        sample_order(some, cell.seed, modality, cell.batch_of(modality), begin, end)
        for modality, some in zip(cell.modalities, chosen, strict=True)
    )
    return Lesson(cell, begin, schedule.rates(cell.lr, begin, end), orders, held_out)
