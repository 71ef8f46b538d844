"""A grid of heads (paper, table 5) against the same cells one after another in PyTorch.

    python -m pytest bench/grid.py      writes bench/results/grid_<machine>.json, about 4 minutes

2 learning rates x 3 decays x 2 batches x 5 alphas x 5 shots x 3 seeds = 900 cells of image and
text, 384 features each, 100 classes. Both sides train 400 steps a cell (of at most 12,800; early
stopping would end each at another step) with the looks at the validation samples every 100, and one
at the test samples. The grid is timed whole; the loop on every tenth cell, and its seconds are
times ten: what a cell costs depends on its batch alone, and half of them have either.

The loop is what a careful user writes: features as tensors, the batches between two looks gathered
at once, fused AdamW, no sync but at looks. It is tried eagerly and under torch.compile, with one
thread and with all, and the fastest of them is the baseline. On CUDA the same, one process and the
same device for both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench import harness
from uml_fast.grid import Cell, Features, HeadData, HeadSchedule, few_shot, product, train_grid
from uml_fast.grid.heads import Heads, Lesson
from uml_fast.grid.train import chosen_samples, next_lesson

WIDTH, CLASSES = 384, 100
SCHEDULE = HeadSchedule(steps=400, patience=1000)
EVERY = 10
"""One in so many cells is trained by the loop."""
ROUNDS = {"uml_fast": 3, "loop": 3}
CLOCK = harness.RecordedClock()
Loss = Callable[..., torch.Tensor]


def made_data() -> HeadData:
    """Random features of the sizes that the figure names; the time does not depend on them."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> Features:
        rows = torch.from_numpy(rng.normal(size=(n, WIDTH))).float()
        return Features(rows, torch.arange(n) % CLASSES)

    train = {"image": draw(1600), "text": draw(3000)}
    return HeadData(
        target="image", train=train, validation=draw(400), test=draw(1000), classes=CLASSES
    )


def cells_of_the_grid() -> list[Cell]:
    """The 900 cells, shuffled."""
    cells = product(
        lr=(1e-3, 1e-4), weight_decay=(0.0, 0.01, 0.001), batch=(8, 32),
        alpha=(0.2, 0.5, 0.7, 1.0, 1.5), shots=(1, 2, 4, 8, 16), seed=(1, 2, 3),
    )  # fmt: skip
    return [cells[i] for i in np.random.default_rng(0).permutation(len(cells))]


def whole_lesson(data: HeadData, cell: Cell) -> Lesson:
    """All steps of a cell."""
    held_out = few_shot(data.validation.labels, min(4, cell.shots), cell.seed, "validation")
    return next_lesson(cell, chosen_samples(data, cell), held_out, 0, SCHEDULE.steps, SCHEDULE)


def loss_of(
    head: torch.Tensor, projection: torch.Tensor, scales: torch.Tensor,
    images: torch.Tensor, image_labels: torch.Tensor,
    texts: torch.Tensor, text_labels: torch.Tensor, alpha: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The loss of a step on gathered rows."""
    of_image = F.cross_entropy(scales[0] * (images @ projection @ head), image_labels)
    return of_image + alpha * F.cross_entropy(scales[1] * (texts @ head), text_labels)


def one_after_another(
    data: HeadData, near: HeadData, cells: list[Cell], loss: Loss
) -> list[torch.Tensor]:
    """The folded matrix of each cell; ``near`` are the samples on the device that trains."""
    heads, out = Heads(data, cells[:1], 1), []
    device = near.validation.rows.device
    for cell in cells:
        heads.start(0, cell)
        parts = heads.parts(0, cell)
        assert parts.projections[0] is not None
        head = parts.head[:, :CLASSES].to(device, copy=True).contiguous().requires_grad_()
        projection = parts.projections[0].to(device, copy=True).requires_grad_()
        scales = parts.scales.to(device, copy=True).requires_grad_()
        optimizer = torch.optim.AdamW(
            [head, projection, scales], weight_decay=cell.weight_decay, fused=True
        )
        lesson = whole_lesson(data, cell)
        alpha = torch.tensor(cell.alpha, device=device)  # a float would be compiled for each value
        orders = [torch.from_numpy(order).long().to(device) for order in lesson.orders]
        held_out = torch.from_numpy(lesson.held_out).long().to(device)
        held_rows, held_labels = near.validation.rows[held_out], near.validation.labels[held_out]
        best = -1.0
        for begin in range(0, SCHEDULE.steps + 1, SCHEDULE.eval_every):
            with torch.no_grad():
                right = (held_rows @ projection @ head).argmax(1) == held_labels
                best = max(best, float(right.float().mean()))
            steps = slice(begin, begin + SCHEDULE.eval_every)
            batches = [
                part.unbind()
                for name, order in zip(cell.modalities, orders, strict=True)
                for part in (near.train[name].rows[order[steps]],
                             near.train[name].labels[order[steps]])
            ]  # fmt: skip
            for k, batch in enumerate(zip(*batches, strict=True)):
                optimizer.param_groups[0]["lr"] = float(lesson.rates[begin + k])
                optimizer.zero_grad()
                loss(head, projection, scales, *batch, alpha).backward()
                optimizer.step()
        with torch.no_grad():
            out.append(projection @ head * scales[0])
            float(((near.test.rows @ out[-1]).argmax(1) == near.test.labels).float().mean())
    return out


def fastest_loop(data: HeadData, near: HeadData, cells: list[Cell]) -> tuple[str, Loss, int]:
    """Name, loss and threads of the way that trains two cells in the least time."""
    compiled = torch.compile(loss_of, dynamic=False)
    several = torch.get_num_threads()
    found: list[tuple[float, str, Loss, int]] = []
    for threads in sorted({1, several}):
        torch.set_num_threads(threads)
        for name, loss in (("eager", loss_of), ("compile", compiled)):
            one_after_another(data, near, cells, loss)
            begun = time.perf_counter()
            one_after_another(data, near, cells, loss)
            found.append((time.perf_counter() - begun, name, loss, threads))
    torch.set_num_threads(several)
    _, name, loss, threads = min(found, key=lambda f: f[0])
    return name, loss, threads


def on(device: str, data: HeadData) -> HeadData:
    """The samples in the memory of a device."""

    def moved(f: Features) -> Features:
        return Features(f.rows.to(device), f.labels.to(device))

    train = {name: moved(f) for name, f in data.train.items()}
    return HeadData(
        target="image", train=train, validation=moved(data.validation), test=moved(data.test),
        classes=CLASSES,
    )  # fmt: skip


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


@pytest.mark.benchmark(group="grid", timer=CLOCK)
@pytest.mark.parametrize("device", DEVICES)
def test_grid(benchmark: Any, device: str) -> None:
    data, cells = made_data(), cells_of_the_grid()
    some = [c for batch in (8, 32) for c in [c for c in cells if c.batch == batch][::EVERY]]
    near = on(device, data)
    pair = [next(c for c in some if c.batch == batch) for batch in (8, 32)]
    name, loss, threads = fastest_loop(data, near, pair)
    several = torch.get_num_threads()

    def loop() -> None:
        torch.set_num_threads(threads)
        one_after_another(data, near, some, loss)
        torch.set_num_threads(several)

    load_before = round(os.getloadavg()[0], 2)
    seconds = harness.measure(
        {"uml_fast": lambda: train_grid(data, cells, SCHEDULE, device=device), "loop": loop},
        rounds=ROUNDS, warmup_rounds=0, budget_s=200,
    )  # fmt: skip
    seconds["loop"] = [EVERY * s for s in seconds["loop"]]
    ours, theirs = (float(np.median(seconds[side])) for side in ("uml_fast", "loop"))
    steps = SCHEDULE.steps * len(cells)
    row = {
        "device": device, "cells": len(cells), "steps": SCHEDULE.steps, "features": WIDTH,
        "classes": CLASSES, "grid_s": round(ours, 2), "loop_s": round(theirs, 1),
        "loop_cells": len(some), "loop": name, "loop_threads": threads, "threads": several,
        "times": round(theirs / ours, 2), "grid_us_a_step": round(1e6 * ours / steps, 1),
        "loop_us_a_step": round(1e6 * theirs / steps, 1), "rounds": len(seconds["uml_fast"]),
        "load_before": load_before,
    }  # fmt: skip
    CLOCK.load(seconds["uml_fast"])
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=len(seconds["uml_fast"]))
    harness.merge_rows(harness.RESULTS / f"grid_{harness.machine_name()}.json", [row], ("device",))


@pytest.mark.parametrize("device", DEVICES)
def test_both_train_the_same_heads(device: str) -> None:
    data, cells = made_data(), cells_of_the_grid()[:4]
    theirs = one_after_another(data, on(device, data), cells, loss_of)
    schedule = HeadSchedule(steps=SCHEDULE.steps, eval_every=SCHEDULE.steps, patience=1000)
    heads = Heads(data, cells, 1, precision=SCHEDULE.precision)
    for cell, expected in zip(cells, theirs, strict=True):
        heads.start(0, cell)
        heads.train({0: whole_lesson(data, cell)})
        torch.testing.assert_close(heads.folded(0), expected.cpu(), rtol=0, atol=1e-4)
    if device == "cuda":
        stacked = train_grid(data, cells, schedule, device=device)
        alone = train_grid(data, cells, schedule)
        for a, b in zip(stacked, alone, strict=True):
            assert abs(a.test - b.test) < 0.01
