"""The steps of a cell in plain PyTorch: the definition, and what runs without the extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from uml_fast.grid.heads import Bank, Heads, Lesson


def train_cell(heads: Heads, slot: int, lesson: Lesson) -> None:
    """loss = CE(s_image W P v) + alpha CE(s_text W t), one step of AdamW for each batch."""
    cell = lesson.cell
    scales, head, projection = (
        None if p is None else p.detach().requires_grad_() for p in heads.parts(slot, cell)
    )
    assert scales is not None and head is not None
    parameters = [p for p in (head, projection) if p is not None]
    parameters += [scales] if cell.learn_scale else []
    optimizer = torch.optim.AdamW(parameters, weight_decay=cell.weight_decay)
    places = dict(zip(map(id, (scales, head, projection)), range(3), strict=True))
    for p in parameters:
        first, second = (heads.parts(slot, cell, kind)[places[id(p)]] for kind in (1, 2))
        step = torch.tensor(float(lesson.begin))
        optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def loss_of(bank: Bank, order: Tensor, matrix: Tensor | None, scale: Tensor) -> Tensor:
        rows = bank.rows[order]
        hidden = rows if matrix is None else rows @ matrix
        logits = (hidden @ head)[:, : heads.classes]
        return F.cross_entropy(scale * logits, bank.labels[order].long())

    for k, rate in enumerate(lesson.rates.tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(heads.image, torch.from_numpy(lesson.image_order[k]), projection, scales[0])
        if lesson.text_order is not None:
            order = torch.from_numpy(lesson.text_order[k])
            loss = loss + cell.alpha * loss_of(heads.text, order, None, scales[1])
        loss.backward()
        optimizer.step()
