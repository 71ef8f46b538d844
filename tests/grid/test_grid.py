"""Grids of heads: each cell against PyTorch in float64, and alone against in company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from uml_fast.config import ConfigError
from uml_fast.data.source import DataError
from uml_fast.grid import (
    Cell,
    CellResult,
    Features,
    HeadData,
    HeadSchedule,
    few_shot,
    product,
    train_grid,
)
from uml_fast.grid.features import sample_order
from uml_fast.grid.heads import Heads, Lesson
from uml_fast.grid.reference import train_cell

SHORT = HeadSchedule(steps=120, eval_every=20, warmup_steps=10, patience=3)


def features(n: int, width: int, classes: int, seed: int) -> Features:
    """Clouds around class means that both modalities can tell apart."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(width).normal(size=(classes, width))
    labels = np.arange(n) % classes
    rows = means[labels] + rng.normal(size=(n, width)) * 2
    return Features(torch.from_numpy(rows).float(), torch.from_numpy(labels))


def made_data(image: int = 20, text: int = 37, classes: int = 7) -> HeadData:
    return HeadData(
        features(140, image, classes, 1), features(56, image, classes, 2),
        features(70, image, classes, 3), features(90, text, classes, 4), classes,
    )  # fmt: skip


def one_lesson(data: HeadData, cell: Cell, steps: int = 30) -> Lesson:
    everything = np.arange(len(data.text), dtype=np.int32)
    images = np.arange(len(data.train), dtype=np.int32)
    return Lesson(
        cell, 0, SHORT.rates(cell.lr, 0, steps),
        sample_order(images, cell.seed, 0, cell.batch, 0, steps),
        sample_order(everything, cell.seed, 1, cell.batch, 0, steps)
        if cell.mode == "uml" else None,
    )  # fmt: skip


CELLS = [
    Cell(batch=8, lr=1e-2, weight_decay=0.01),
    Cell(batch=5, lr=1e-2, alpha=0.3, learn_scale=False),
    Cell(batch=33, lr=3e-3, init="text", seed=3),
    Cell(mode="unimodal", batch=16, lr=1e-2),
    Cell(batch=1, lr=1e-3, alpha=0.0),
]


@pytest.mark.native
@pytest.mark.parametrize("sizes", [(20, 37, 7), (16, 16, 16), (1, 130, 2), (64, 3, 33)])
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.mode} {c.batch}")
def test_steps_are_those_of_adamw_in_float64(
    cell: Cell, sizes: tuple[int, int, int], instruction_set: str
) -> None:
    data = made_data(*sizes)
    heads, lesson = Heads(data, 3), one_lesson(data, cell)
    heads.start(1, cell)
    expected = in_float64(heads, lesson)
    plain = Heads(data, 3)
    plain.start(1, cell)
    train_cell(plain, 1, lesson)
    heads.train({1: lesson})
    for got, same, exact in zip(heads.parts(1, cell), plain.parts(1, cell), expected, strict=True):
        if got is not None and same is not None and exact is not None:
            allowed = 2 * (same - exact).abs().max() + 2e-6
            assert (got - exact).abs().max() <= allowed


def in_float64(heads: Heads, lesson: Lesson) -> list[torch.Tensor | None]:
    """Parameters after a lesson, by autograd and torch.optim in float64."""
    cell = lesson.cell
    parts = [None if p is None else p.double().requires_grad_() for p in heads.parts(1, cell)]
    scales, head, projection = parts
    assert scales is not None and head is not None
    trained = [p for p in (head, projection, scales if cell.learn_scale else None) if p is not None]
    optimizer = torch.optim.AdamW(trained, weight_decay=cell.weight_decay)
    for k, rate in enumerate(lesson.rates.tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        rows = heads.image.rows[torch.from_numpy(lesson.image_order[k])].double()
        labels = heads.image.labels[torch.from_numpy(lesson.image_order[k])].long()
        hidden = rows if projection is None else rows @ projection
        loss = F.cross_entropy((scales[0] * (hidden @ head))[:, : heads.classes], labels)
        if lesson.text_order is not None:
            rows = heads.text.rows[torch.from_numpy(lesson.text_order[k])].double()
            labels = heads.text.labels[torch.from_numpy(lesson.text_order[k])].long()
            logits = (scales[1] * (rows @ head))[:, : heads.classes]
            loss = loss + cell.alpha * F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
    return [None if p is None else p.detach() for p in parts]


def as_values(results: list[CellResult]) -> list[tuple[float, int, int, float]]:
    return [(r.validation, r.step, r.steps, r.test) for r in results]


@pytest.mark.native
def test_a_cell_is_the_same_alone_and_in_a_grid_of_more_cells_than_slots() -> None:
    data = made_data()
    cells = product(
        mode=("unimodal", "uml"), lr=(1e-2, 1e-3), batch=(3, 8), shots=(1, 2, 0), seed=(1, 2)
    )
    assert len(cells) == 48
    together = train_grid(data, cells, SHORT)
    assert [r.cell for r in together] == cells
    for k in (0, 7, 29, 47):
        (alone,) = train_grid(data, [cells[k]], SHORT)
        assert as_values([alone]) == as_values([together[k]])
        assert torch.equal(alone.weight, together[k].weight)
    assert len({r.steps for r in together}) > 1  # some stopped early


@pytest.mark.native
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    data, cells = made_data(), product(lr=(1e-2, 1e-3), seed=(1, 2, 3), batch=(4, 9))
    one = train_grid(data, cells, SHORT)
    torch.set_num_threads(3)
    try:
        three = train_grid(data, cells, SHORT)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one, three, strict=True))


def test_the_reference_gives_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    data, cells = made_data(), product(lr=(1e-2,), seed=(1, 2), mode=("unimodal", "uml"))
    kernels = train_grid(data, cells, SHORT)
    monkeypatch.setattr("uml_fast.grid.heads.library", lambda: None)
    plain = train_grid(data, cells, SHORT)
    for a, b in zip(kernels, plain, strict=True):
        assert (a.step, a.steps) == (b.step, b.steps)
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-4)


def test_early_stopping_keeps_the_best_weights() -> None:
    data = made_data()
    (result,) = train_grid(data, [Cell(lr=1e-2, batch=8)], SHORT)
    right = (data.validation.rows @ result.weight.T).argmax(1) == data.validation.labels
    assert float(right.float().mean()) == pytest.approx(result.validation)
    assert result.steps == min(120, result.step + 20 * SHORT.patience)


def test_an_epoch_has_every_sample_once_whatever_the_batch() -> None:
    chosen = np.arange(10, 24, dtype=np.int32)
    for batch in (1, 3, 14, 40):
        whole = sample_order(chosen, 1, 0, batch, 0, 28).ravel()
        for e in range(len(whole) // 14):
            assert sorted(whole[14 * e : 14 * (e + 1)]) == list(range(10, 24))
        parts = [sample_order(chosen, 1, 0, batch, a, a + 7).ravel() for a in range(0, 28, 7)]
        assert np.array_equal(whole, np.concatenate(parts))


def test_shots_are_of_each_class_and_drawn_with_the_seed() -> None:
    labels = torch.arange(60) % 6
    chosen = few_shot(labels, 4, 1, 6)
    assert np.bincount(labels[chosen]).tolist() == [4] * 6
    assert np.array_equal(chosen, few_shot(labels, 4, 1, 6))
    assert not np.array_equal(chosen, few_shot(labels, 4, 2, 6))
    assert len(few_shot(labels, 0, 1, 6)) == 60


def test_rates_are_those_of_the_paper() -> None:
    rates = HeadSchedule().rates(1e-3, 0, 12_800)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[1:51] == pytest.approx(1e-3 * np.arange(1, 51) / 50)
    assert rates[51] == pytest.approx(1e-3, rel=1e-6)
    assert 0 < rates[-1] < 1e-7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch": 0}, "batch is 0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"mode": "unimodal", "init": "text"}, "init is text"),
    ],
)
def test_a_cell_refuses(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cell(**wrong)  # type: ignore[arg-type]


def test_data_refuses() -> None:
    rows, labels = torch.zeros(4, 3), torch.arange(4)
    with pytest.raises(DataError, match="sample 2 has a feature that is NaN"):
        Features(rows.index_fill(0, torch.tensor([2]), float("nan")), labels)
    with pytest.raises(DataError, match="one for each of the 4 samples"):
        Features(rows, labels[:3])
    good = Features(rows, labels)
    with pytest.raises(DataError, match=r"labels 0\.\.3; there are 3 classes"):
        HeadData(good, good, good, good, 3)
    with pytest.raises(DataError, match="class 4 has no sample"):
        few_shot(labels, 1, 1, 5)
