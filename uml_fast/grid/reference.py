"""The steps of a cell in plain PyTorch: the definition, and what runs without the extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from uml_fast.grid.heads import Heads, Lesson


def train_cell(heads: Heads, slot: int, lesson: Lesson) -> None:
    """loss = sum over modalities m of w_m CE(s_m W P_m x_m), one AdamW step for each batch."""
    cell = lesson.cell
    parts = heads.parts(slot, cell)
    parameters = [p.detach().requires_grad_() for p in parts.tensors()]
    moments = [heads.parts(slot, cell, kind).tensors() for kind in (1, 2)]
    if not cell.learn_scale:
        parameters[0].requires_grad_(False)
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=cell.weight_decay)
    for p, first, second in zip(parameters, *moments, strict=True):
        if p.requires_grad:
            step = torch.tensor(float(lesson.begin))
            optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    orders = [torch.from_numpy(order) for order in lesson.orders]
    scales, head, *rest = parameters
    projections = iter(rest)
    matrices = [None if p is None else next(projections) for p in parts.projections]
    for k, rate in enumerate(lesson.rates.tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=head.dtype)
        for i, modality in enumerate(cell.modalities):
            bank = heads.banks[modality]
            rows, labels = bank.rows[orders[i][k]], bank.labels[orders[i][k]].long()
            projection = matrices[i]
            hidden = rows if projection is None else rows @ projection
            logits = scales[i] * (hidden @ head)[:, : heads.classes]
            loss = loss + cell.weight_of(modality) * F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()


def look(heads: Heads, slot: int, lesson: Lesson) -> int:
    """Fold the target's path into one matrix; how many held-out samples it gets right."""
    parts = heads.parts(slot, lesson.cell)
    projection = parts.projections[0]
    whole = parts.head if projection is None else projection @ parts.head
    folded = heads.folded(slot)
    folded.copy_((whole * parts.scales[0])[: folded.shape[0], : folded.shape[1]])
    held_out = torch.from_numpy(lesson.held_out)
    validation = heads.data.validation
    guesses = (validation.rows[held_out] @ folded).argmax(1)
    return int((guesses == validation.labels[held_out]).sum())
