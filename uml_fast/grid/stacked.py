"""Cells of one shape stacked: batched products and one optimiser step for all of them, for GPUs.

Cells have one shape when their modalities, projections and batch sizes agree; everything else
(rate, decay, alpha, scale, seed, step) is a row of a table. A step is the gradient written out,
without autograd, on memory that stays where it is, so that on CUDA it is captured once as a graph
and replayed for every step until the next look; nothing waits for the device in between. Cells
that stop make room for waiting ones at each look; the last ones are trained in smaller stacks.

Products are in full fp32 unless torch is told otherwise. A cell's numbers agree with the reference
within rounding; libraries choose other kernels for other stack sizes, so they are not bit-equal.

Legend: K cells of a stack, k modalities, B a batch, D features, E of the head's input, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uml_fast.grid.cells import Cell
from uml_fast.grid.features import HeadData
from uml_fast.grid.heads import Heads, Lesson

_CPU_SLOTS = 64
_COPIES = 10
"""Rows of parameters that a cell needs at most: weights and moments twice (slots and stack),
gradient, temporaries of the optimiser."""
_MOST_LOGITS = 1 << 28
"""Floats of the logits that a look makes at a time."""

Shape = tuple[tuple[str, ...], bool, int, int, int]


def shape_of(lesson: Lesson) -> Shape:
    """What lessons of one stack have in common."""
    c = lesson.cell
    return c.modalities, c.project, c.batch, c.batch_of(c.modalities[-1]), len(lesson.rates)


class StackedHeads(Heads):
    """``Heads`` whose lessons are given to all cells of a shape at once.

    Args:
        data: features and sizes.
        cells: those that will be trained; they say how many slots fit the device.
        device: where everything lies.
    """

    def __init__(self, data: HeadData, cells: Sequence[Cell], device: torch.device) -> None:
        self.device = device
        super().__init__(data, cells, min(len(cells), _slots(data, cells, device)), device)
        self._stacks: dict[Shape, _Stack] = {}

    def train(self, lessons: Mapping[int, Lesson]) -> dict[int, int]:
        """The next steps of the cells in some slots; how many held-out samples each gets right."""
        groups: dict[Shape, list[int]] = {}
        for slot, lesson in lessons.items():
            groups.setdefault(shape_of(lesson), []).append(slot)
        for shape, slots in groups.items():
            if shape[-1] > 0:
                self._steps(shape, slots, [lessons[s] for s in slots])
        return self._look(lessons)

    def _steps(self, shape: Shape, slots: list[int], lessons: list[Lesson]) -> None:
        # Sizes are powers of two, so that few graphs are captured; the rest repeats the last cell.
        size = 1 << (len(slots) - 1).bit_length()
        filled = slots + slots[-1:] * (size - len(slots))
        stack = self._stacks.get(shape)
        if stack is None or stack.size != size:
            # A smaller stack replaces the larger one first, so that only one has memory.
            self._stacks.pop(shape, None)
            stack = self._stacks[shape] = _Stack(self, lessons[0], size)
        index = torch.tensor(filled, device=self.device)
        stack.load(lessons + lessons[-1:] * (size - len(slots)))
        stack.run(self._state[index, :, : stack.floats])
        self._state[index[: len(slots)], :, : stack.floats] = stack.state[: len(slots)]

    def _look(self, lessons: Mapping[int, Lesson]) -> dict[int, int]:
        layouts: dict[tuple[tuple[str, ...], bool], list[int]] = {}
        for slot, lesson in lessons.items():
            layouts.setdefault((lesson.cell.modalities, lesson.cell.project), []).append(slot)
        for some in layouts.values():
            parts = self.views(self._state[some, 0], lessons[some[0]].cell)
            projection = parts.projections[0]
            whole = parts.head if projection is None else torch.bmm(projection, parts.head)
            self._folded[some] = whole * parts.scales[:, :1].unsqueeze(2)
        counts = []
        slots = list(lessons)
        rows, labels = self.validation.rows, self.validation.labels
        few = max(1, _MOST_LOGITS // (len(rows) * self.classes))
        for begin in range(0, len(slots), few):
            some = slots[begin : begin + few]
            held_out = torch.zeros(len(some), len(rows), dtype=torch.bool)
            for i, slot in enumerate(some):
                held_out[i, torch.from_numpy(lessons[slot].held_out).long()] = True
            logits = torch.matmul(rows, self._folded[some][..., : self.classes])
            right = (logits.argmax(2) == labels) & held_out.to(self.device)
            counts.append(right.sum(1))
        return dict(zip(slots, torch.cat(counts).tolist(), strict=True))


def _slots(data: HeadData, cells: Sequence[Cell], device: torch.device) -> int:
    """Cells that are in training at a time."""
    if device.type != "cuda":
        return _CPU_SLOTS
    widths = {name: features.width + 16 for name, features in data.train.items()}
    floats = max(
        widths[c.modalities[-1]]
        * (data.classes + 16 + sum(widths[m] for m in c.modalities if c.is_projected(m)))
        for c in cells
    )
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, free // 2 // (4 * _COPIES * floats))


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """What a step reads of one modality."""

    rows: Tensor
    """float32 (n, D) of the bank."""
    labels: Tensor
    """int32 (n,)."""
    order: Tensor
    """int64 (steps, K, B)."""
    weight: Tensor
    """float32 (K, 1, 1) of its loss, over B."""


class _Stack:
    """K cells of a shape in training; tensors keep their memory for every step and lesson.

    Args:
        heads: banks and layout.
        lesson: one of the shape.
        size: K.
    """

    def __init__(self, heads: Heads, lesson: Lesson, size: int) -> None:
        cell, steps, device = lesson.cell, len(lesson.rates), heads.validation.rows.device
        self.size, self.steps, self.floats = size, steps, heads.floats(cell)
        self.classes = heads.classes
        self._ids_C = torch.arange(heads.classes, device=device)
        self.state = torch.zeros(size, 3, self.floats, device=device)
        self._gradient = torch.zeros(size, self.floats, device=device)
        self._weights = heads.views(self.state[:, 0], cell)
        self._gradients = heads.views(self._gradient, cell)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._learns_scale = torch.zeros(size, 1, dtype=torch.bool, device=device)
        # Of each step and cell: 1 - rate * decay, rate / (1 - beta1**t), 1 / sqrt(1 - beta2**t).
        self._constants = torch.zeros(steps, 3, size, 1, device=device)
        self._branches = [
            _Branch(
                heads.banks[m].rows, heads.banks[m].labels,
                torch.zeros(steps, size, cell.batch_of(m), dtype=torch.int64, device=device),
                torch.zeros(size, 1, 1, device=device),
            )
            for m in cell.modalities
        ]  # fmt: skip
        self._graph: torch.cuda.CUDAGraph | None = None

    def load(self, lessons: Sequence[Lesson]) -> None:
        """Take over the tables of K lessons."""
        cells = [x.cell for x in lessons]
        rates = np.stack([x.rates for x in lessons]).astype(np.float64)
        t = np.stack([np.arange(x.begin, x.begin + self.steps) for x in lessons]) + 1.0
        decay = 1 - rates * np.array([[c.weight_decay] for c in cells])
        constants = np.stack([decay, rates / (1 - 0.9**t), 1 / np.sqrt(1 - 0.999**t)])
        self._constants.copy_(torch.from_numpy(constants).permute(2, 0, 1).unsqueeze(-1))
        self._learns_scale.copy_(torch.tensor([[c.learn_scale] for c in cells]))
        for i, (branch, modality) in enumerate(
            zip(self._branches, cells[0].modalities, strict=True)
        ):
            orders = np.stack([x.orders[i] for x in lessons], axis=1)
            branch.order.copy_(torch.from_numpy(orders))
            weights = [c.weight_of(modality) / c.batch_of(modality) for c in cells]
            branch.weight.copy_(torch.tensor(weights).view(-1, 1, 1))

    def run(self, state: Tensor) -> None:
        """All steps of the lessons from weights and moments (K, 3, floats)."""
        if state.device.type == "cuda" and self._graph is None:
            self._capture(state)
        self.state.copy_(state)
        self._step.zero_()
        for _ in range(self.steps):
            if self._graph is None:
                self._one_step()
            else:
                self._graph.replay()

    def _capture(self, state: Tensor) -> None:
        self.state.copy_(state)
        side = torch.cuda.Stream(state.device)
        side.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(side):
            self._one_step()
        torch.cuda.current_stream(state.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        self._step.zero_()
        with torch.cuda.graph(self._graph):
            self._one_step()

    def _one_step(self) -> None:
        scales, head = self._weights.scales, self._weights.head[..., : self.classes]
        head_gradient = self._gradients.head[..., : self.classes]
        for i, branch in enumerate(self._branches):
            projection, gradient = self._weights.projections[i], self._gradients.projections[i]
            order_KB = branch.order.index_select(0, self._step)[0]
            rows_KBD, labels_KB = branch.rows[order_KB], branch.labels[order_KB]
            hidden_KBE = rows_KBD if projection is None else torch.bmm(rows_KBD, projection)
            logits_KBC = torch.bmm(hidden_KBE, head)
            scale = scales[:, i].view(-1, 1, 1)
            is_label_KBC = (labels_KB.unsqueeze(2) == self._ids_C).float()
            share_KBC = torch.softmax(scale * logits_KBC, 2) - is_label_KBC
            share_KBC = share_KBC * branch.weight
            self._gradients.scales[:, i] = (share_KBC * logits_KBC).sum((1, 2))
            grad_KBC = scale * share_KBC
            head_gradient.baddbmm_(hidden_KBE.mT, grad_KBC, beta=float(i > 0))
            if projection is not None and gradient is not None:
                gradient.baddbmm_(rows_KBD.mT, torch.bmm(grad_KBC, head.mT), beta=0)
        self._adamw()
        self._step += 1

    def _adamw(self) -> None:
        """torch.optim.AdamW with the constants of each cell's own step."""
        decay, rate, correction = self._constants.index_select(0, self._step)[0]
        weight, first, second = self.state.unbind(1)
        fixed = self._weights.scales.clone()
        first.lerp_(self._gradient, 0.1)
        second.mul_(0.999).addcmul_(self._gradient, self._gradient, value=0.001)
        move = first / second.sqrt().mul_(correction).add_(1e-8)
        weight.mul_(decay).sub_(move.mul_(rate))
        scales = self._weights.scales
        scales.copy_(torch.where(self._learns_scale, scales, fixed))
