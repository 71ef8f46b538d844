"""A grid of heads (paper, table 5) against the same cells one after another in PyTorch.

    python -m pytest bench/grid.py      writes bench/results/grid_<machine>.json

384 features, 100 classes; the cells are those of the grid that differ in cost: batch 8 and 32,
mode unimodal and uml. Every provider trains the same cells for the same steps, looks at the
validation samples included; what a step costs does not depend on the other axes.
"""

from __future__ import annotations

import functools
import os
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
SCHEDULE = HeadSchedule(steps=300, patience=1000)
CLOCK = harness.RecordedClock()


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


def cells_of(mode: str, batch: int) -> list[Cell]:
    """Eight cells of one cost."""
    modalities = ("image", "text") if mode == "uml" else ("image",)
    return product(
        modalities=(modalities,),
        batch=(batch,),
        lr=(1e-3, 1e-4),
        alpha=(0.5, 1.5),
        shots=(4, 16),
        seed=(1,),
    )


def whole_lesson(data: HeadData, cell: Cell) -> Lesson:
    """All steps of a cell."""
    held_out = few_shot(data.validation.labels, 4, cell.seed, "validation")
    return next_lesson(cell, chosen_samples(data, cell), held_out, 0, SCHEDULE.steps, SCHEDULE)


def loss_of(
    head: torch.Tensor, projection: torch.Tensor | None, scales: torch.Tensor,
    images: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor | None,
    text_labels: torch.Tensor | None, alpha: float,
) -> torch.Tensor:  # fmt: skip
    """The loss of a step on gathered rows."""
    hidden = images if projection is None else images @ projection
    loss = F.cross_entropy(scales[0] * (hidden @ head), labels)
    if texts is not None and text_labels is not None:
        loss = loss + alpha * F.cross_entropy(scales[1] * (texts @ head), text_labels)
    return loss


def one_after_another(
    data: HeadData, cells: list[Cell], loss: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Features in memory, orders drawn before, fused AdamW, no host sync but the loop itself."""
    heads, out = Heads(data, cells, 1), []
    for cell in cells:
        heads.start(0, cell)
        parts = heads.parts(0, cell)
        head = parts.head[:, :CLASSES].clone().requires_grad_()
        scales = parts.scales.clone().requires_grad_()
        projection = parts.projections[0]
        projection = projection if projection is None else projection.clone().requires_grad_()
        trained = [p for p in (head, projection, scales) if p is not None]
        rates = SCHEDULE.rates(cell.lr, 0, SCHEDULE.steps)
        optimizer = torch.optim.AdamW(trained, weight_decay=cell.weight_decay, fused=True)
        held = torch.from_numpy(few_shot(data.validation.labels, 4, cell.seed, "validation"))
        orders = whole_lesson(data, cell).orders
        images, *texts = (torch.from_numpy(order) for order in orders)
        for k in range(SCHEDULE.steps):
            if k % SCHEDULE.eval_every == 0:
                with torch.no_grad():
                    rows = data.validation.rows[held]
                    rows = rows if projection is None else rows @ projection
                    float(((rows @ head).argmax(1) == data.validation.labels[held]).float().mean())
            for group in optimizer.param_groups:
                group["lr"] = float(rates[k])
            optimizer.zero_grad()
            text = (None, None)
            if texts:
                bank = data.train["text"]
                text = (bank.rows[texts[0][k]], bank.labels[texts[0][k]])
            bank = data.train["image"]
            loss(
                head, projection, scales, bank.rows[images[k]], bank.labels[images[k]],
                *text, cell.alpha,
            ).backward()  # fmt: skip
            optimizer.step()
        whole = head if projection is None else projection @ head
        out.append((whole * scales[0]).detach())
    return out


@functools.cache
def measured(mode: str, batch: int) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Rounds and row of each provider for cells of one cost."""
    data, cells = made_data(), cells_of(mode, batch)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "uml_fast": lambda: train_grid(data, cells, SCHEDULE),
        "eager": lambda: one_after_another(data, cells[:2], loss_of),
        "compile": lambda: one_after_another(data, cells[:2], compiled),
    }
    load_before = round(os.getloadavg()[0], 2)
    seconds = harness.measure(calls, rounds={"uml_fast": 8, "eager": 6, "compile": 6})
    steps = {name: SCHEDULE.steps * (len(cells) if name == "uml_fast" else 2) for name in calls}
    per_step = {n: [s / steps[n] for s in values] for n, values in seconds.items()}
    ours = harness.quantiles(per_step["uml_fast"])["p50_ms"]
    out = {}
    for name, values in per_step.items():
        spread = {k: round(v, 4) for k, v in harness.quantiles(values).items()}
        row = {
            "mode": mode, "batch": batch, "provider": name, "features": WIDTH, "classes": CLASSES,
            **spread, "times_ours": round(spread["p50_ms"] / ours, 2), "rounds": len(values),
            "threads": torch.get_num_threads(), "load_before": load_before,
        }  # fmt: skip
        out[name] = (values, row)
    return out


ROWS: list[dict[str, Any]] = []


@pytest.mark.benchmark(group="grid", timer=CLOCK)
@pytest.mark.parametrize("provider", ["uml_fast", "eager", "compile"])
@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("mode", ["unimodal", "uml"])
def test_grid(benchmark: Any, mode: str, batch: int, provider: str) -> None:
    values, row = measured(mode, batch)[provider]
    CLOCK.load(values)
    benchmark.group = f"a step of a cell, {mode}, batch {batch}"
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=len(values))
    ROWS.append(row)
    keys = ("mode", "batch", "provider")
    harness.merge_rows(harness.RESULTS / f"grid_{harness.machine_name()}.json", ROWS, keys)


def test_both_train_the_same_heads() -> None:
    data = made_data()
    for cell in (cells_of("uml", 8)[0], cells_of("unimodal", 32)[0]):
        (theirs,) = one_after_another(data, [cell], loss_of)
        heads = Heads(data, [cell], 1)
        heads.start(0, cell)
        heads.train({0: whole_lesson(data, cell)})
        torch.testing.assert_close(heads.folded(0), theirs, rtol=0, atol=1e-4)
