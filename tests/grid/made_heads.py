"""Small features, cells and lessons, and the steps of a cell in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from uml_fast.grid import Cell, Features, HeadData, HeadSchedule
from uml_fast.grid.heads import Heads, Lesson
from uml_fast.grid.train import chosen_samples, next_lesson

SHORT = HeadSchedule(steps=120, eval_every=20, warmup_steps=10, patience=3)


def features(n: int, width: int, classes: int, seed: int) -> Features:
    """Clouds around class means that both modalities can tell apart."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(width).normal(size=(classes, width))
    labels = np.arange(n) % classes
    rows = means[labels] + rng.normal(size=(n, width)) * 2
    return Features(torch.from_numpy(rows).float(), torch.from_numpy(labels))


def made_data(
    image: int = 20,
    text: int = 37,
    classes: int = 7,
    audio: int = 9,
    missing: Literal["error", "keep"] = "error",
) -> HeadData:
    train = {
        "image": features(140, image, classes, 1),
        "text": features(90, text, classes, 4),
        "audio": features(60, audio, classes, 5),
    }
    return HeadData(
        target="image", train=train, validation=features(56, image, classes, 2),
        test=features(70, image, classes, 3), classes=classes, missing_classes=missing,
    )  # fmt: skip


UNIMODAL = ("image",)
THREE = ("image", "audio", "text")


def one_lesson(data: HeadData, cell: Cell, steps: int = 30, begin: int = 0) -> Lesson:
    held_out = np.arange(len(data.validation), dtype=np.int32)
    chosen = chosen_samples(data, cell)
    return next_lesson(cell, chosen, held_out, begin, begin + steps, SHORT)


CELLS = [
    Cell(batch=8, lr=1e-2, weight_decay=0.01),
    Cell(batch=5, lr=1e-2, alpha=0.3, learn_scale=False),
    Cell(batch=33, lr=3e-3, init="text", seed=3),
    Cell(modalities=UNIMODAL, batch=16, lr=1e-2),
    Cell(batch=1, lr=1e-3, alpha=0.0),
    Cell(batch=8, lr=1e-2, ratio=0.25),
    Cell(batch=6, lr=1e-2, ratio=4, scale=3.0),
    Cell(modalities=THREE, batch=7, lr=1e-2, alpha=0.5, ratio=2),
]


def name(cell: Cell) -> str:
    return f"{'+'.join(cell.modalities)} {cell.batch} {cell.ratio}"


def in_float64(data: HeadData, heads: Heads, lesson: Lesson) -> list[torch.Tensor]:
    """Parameters after a lesson, written anew: by autograd and torch.optim in float64."""
    cell = lesson.cell
    parameters = [p.double().requires_grad_() for p in heads.parts(1, cell).tensors()]
    scales, head, *projections = parameters
    trained = parameters if cell.learn_scale else parameters[1:]
    optimizer = torch.optim.AdamW(trained, weight_decay=cell.weight_decay)
    for k, rate in enumerate(lesson.rates.tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        losses = []
        for i, modality in enumerate(cell.modalities):
            order = torch.from_numpy(lesson.orders[i][k])
            samples = data.train[modality]
            rows = samples.rows[order].double()
            if cell.project and i + 1 < len(cell.modalities):
                rows = rows @ projections[i][: samples.width]
            rows = F.pad(rows, (0, len(head) - rows.shape[1]))
            logits = scales[i] * (rows @ head)[:, : data.classes]
            losses.append(F.cross_entropy(logits, samples.labels[order]))
        sum([losses[0], *(cell.alpha * loss for loss in losses[1:])]).backward()
        optimizer.step()
    return [p.detach() for p in parameters]
