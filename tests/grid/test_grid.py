"""Grids of heads: each cell against PyTorch in float64, and alone against in company."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.grid.made_heads import (
    CELLS,
    SHORT,
    THREE,
    UNIMODAL,
    in_float64,
    made_data,
    name,
    one_lesson,
)
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
from uml_fast.grid.cells import Precision
from uml_fast.grid.features import sample_order
from uml_fast.grid.heads import Heads
from uml_fast.grid.reference import look, train_cell
from uml_fast.grid.stacked import StackedHeads


@pytest.mark.native
@pytest.mark.parametrize("sizes", [(20, 37, 7), (16, 16, 16), (1, 130, 2), (64, 3, 33)])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_steps_are_those_of_adamw_in_float64(
    cell: Cell, sizes: tuple[int, int, int], instruction_set: str
) -> None:
    assert_steps_match(made_data(*sizes), cell)


@pytest.mark.native
@pytest.mark.parametrize("modalities", [UNIMODAL, ("image", "text"), THREE], ids=len)
def test_aligned_encoders_have_no_projection(
    modalities: tuple[str, ...], instruction_set: str
) -> None:
    data = made_data(24, 24, 7, 24)
    cell = Cell(
        modalities=modalities, project=False, scale=100, learn_scale=False, init="text", batch=8
    )
    assert_steps_match(data, cell)
    heads = Heads(data, [cell], 1)
    heads.start(0, cell)
    parts = heads.parts(0, cell)
    assert parts.projections == (None,) * len(modalities)
    means = torch.stack([data.train["text"].rows[data.train["text"].labels == c].mean(0)
                         for c in range(7)])  # fmt: skip
    torch.testing.assert_close(parts.head[:24, :7], F.normalize(means).T)
    heads.train({0: one_lesson(data, cell, 0)})
    torch.testing.assert_close(heads.folded(0), 100 * F.normalize(means).T)


def assert_steps_match(data: HeadData, cell: Cell) -> None:
    """Kernels are as close to float64 as PyTorch's own float32 steps, with a floor."""
    lesson = one_lesson(data, cell)
    heads, plain = Heads(data, [cell], 3), Heads(data, [cell], 3)
    heads.start(1, cell)
    expected = in_float64(data, heads, lesson)
    plain.start(1, cell)
    train_cell(plain, 1, lesson)
    right = heads.train({1: lesson})
    assert abs(right[1] - look(plain, 1, lesson)) <= 1
    torch.testing.assert_close(heads.folded(1), plain.folded(1), rtol=1e-4, atol=1e-4)
    results = heads.parts(1, cell).tensors(), plain.parts(1, cell).tensors()
    for got, same, exact in zip(*results, expected, strict=True):
        allowed = 2 * (same - exact).abs().max() + 2e-6
        assert (got - exact).abs().max() <= allowed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [{}, {"ratio": 2.0}, {"modalities": THREE}, {"project": False}])
def test_stacked_cells_take_the_steps_of_the_reference(shape: dict[str, Any], device: str) -> None:
    data = made_data(37, 37) if "project" in shape else made_data()
    cells = [
        Cell(lr=1e-2, batch=6, seed=1, **shape),
        Cell(lr=1e-3, batch=6, seed=2, alpha=0.3, weight_decay=0.1, learn_scale=False, **shape),
        Cell(lr=3e-3, batch=6, seed=3, scale=4.0, **shape),
        Cell(lr=3e-3, batch=4, seed=3, **shape),
    ]
    stack = StackedHeads(data, cells, torch.device(device))
    for begin in (0, 20):
        lessons = {}
        for slot, cell in enumerate(cells):
            stack.start(slot, cell) if begin == 0 else None
            lessons[slot] = one_lesson(data, cell, 20, begin)
        right = stack.train(lessons)
    for slot, cell in enumerate(cells):
        plain = Heads(data, [cell], 1)
        plain.start(0, cell)
        for begin in (0, 20):
            lesson = one_lesson(data, cell, 20, begin)
            train_cell(plain, 0, lesson)
        for got, same in zip(
            stack.parts(slot, cell).tensors(), plain.parts(0, cell).tensors(), strict=True
        ):
            torch.testing.assert_close(got.cpu(), same, rtol=0, atol=2e-5)
        assert abs(right[slot] - look(plain, 0, lesson)) <= 1
        torch.testing.assert_close(stack.folded(slot).cpu(), plain.folded(0), rtol=0, atol=1e-4)


def test_a_stacked_grid_is_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uml_fast.grid.stacked._CPU_SLOTS", 5)  # cells have to wait for slots
    data = made_data()
    cells = product(modalities=(UNIMODAL, THREE), lr=(1e-2, 1e-3), batch=(4, 6), shots=(2, 0))
    plain = train_grid(data, cells, SHORT, keep_weights=True)
    stacked = train_grid(data, cells, SHORT, stacked=True, keep_weights=True)
    assert len({r.steps for r in stacked}) > 1
    for a, b in zip(plain, stacked, strict=True):
        assert (a.step, a.steps, a.validation) == (b.step, b.steps, b.validation)
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-3)


def test_cells_on_a_gpu_are_stacked() -> None:
    with pytest.raises(ConfigError, match=r"use --device cpu|are stacked"):
        train_grid(made_data(), [Cell()], SHORT, device="cuda", stacked=False)


def test_the_batch_of_an_auxiliary_follows_the_ratio() -> None:
    data, cell = made_data(), Cell(modalities=THREE, batch=6, ratio=0.25)
    assert [order.shape for order in one_lesson(data, cell).orders] == [(30, 6), (30, 2), (30, 2)]
    assert Cell(batch=1, ratio=0.1).batch_of("text") == 1


def test_modalities_share_the_targets_draws() -> None:
    data = made_data()
    lessons = [
        one_lesson(data, Cell(modalities=m, shots=2, auxiliary_shots=3))
        for m in (UNIMODAL, ("image", "text"), THREE)
    ]
    assert all(np.array_equal(x.orders[0], lessons[0].orders[0]) for x in lessons)
    assert np.array_equal(lessons[1].orders[1], lessons[2].orders[2])
    texts = data.train["text"].labels[np.unique(lessons[1].orders[1])]
    assert torch.bincount(texts).tolist() == [3] * 7
    assert not np.array_equal(lessons[2].orders[1], lessons[2].orders[2])


def as_values(results: list[CellResult]) -> list[tuple[float, int, int, float]]:
    return [(r.validation, r.step, r.steps, r.test) for r in results]


def same_weights(some: list[CellResult], others: list[CellResult]) -> bool:
    pairs = [(a.weight, b.weight) for a, b in zip(some, others, strict=True)]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.native
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_cell_is_the_same_alone_and_in_a_grid_of_more_cells_than_slots(
    precision: Precision,
) -> None:
    data, schedule = made_data(), dataclasses.replace(SHORT, precision=precision)
    cells = product(
        modalities=(UNIMODAL, THREE), lr=(1e-2, 1e-3), batch=(3, 8), shots=(1, 2, 0), seed=(1, 2)
    )
    assert len(cells) == 48
    together = train_grid(data, cells, schedule, keep_weights=True)
    assert [r.cell for r in together] == cells
    for k in (0, 7, 29, 47):
        (alone,) = train_grid(data, [cells[k]], schedule, keep_weights=True)
        assert as_values([alone]) == as_values([together[k]])
        assert same_weights([alone], [together[k]])
    assert len({r.steps for r in together}) > 1  # some stopped early


@pytest.mark.native
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    data, cells = made_data(), product(lr=(1e-2, 1e-3), seed=(1, 2, 3), batch=(4, 9))
    one = train_grid(data, cells, SHORT, keep_weights=True)
    torch.set_num_threads(3)
    try:
        three = train_grid(data, cells, SHORT, keep_weights=True)
    finally:
        torch.set_num_threads(1)
    assert same_weights(one, three)


def test_the_reference_gives_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    data, cells = (
        made_data(),
        product(lr=(1e-2,), seed=(1, 2), modalities=(UNIMODAL, ("image", "text"))),
    )
    kernels = train_grid(data, cells, SHORT, keep_weights=True)
    monkeypatch.setattr("uml_fast.grid.heads.library", lambda: None)
    plain = train_grid(data, cells, SHORT, keep_weights=True)
    for a, b in zip(kernels, plain, strict=True):
        assert (a.step, a.steps) == (b.step, b.steps)
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-4)


def test_results_are_told_as_cells_end_and_weights_only_when_asked_for() -> None:
    data, cells, told = made_data(), product(lr=(1e-2, 1e-3), seed=(1, 2)), {}
    results = train_grid(data, cells, SHORT, on_result=lambda i, r: told.update({i: r}))
    assert [told[i] for i in range(4)] == results
    assert all(r.weight is None for r in results)


def test_early_stopping_keeps_the_best_weights() -> None:
    data = made_data()
    (result,) = train_grid(data, [Cell(lr=1e-2, batch=8)], SHORT, keep_weights=True)
    assert result.weight is not None
    right = (data.validation.rows @ result.weight).argmax(1) == data.validation.labels
    assert float(right.float().mean()) == pytest.approx(result.validation)
    assert result.steps == min(120, result.step + 20 * SHORT.patience)


def test_an_epoch_has_every_sample_once_whatever_the_batch() -> None:
    chosen = np.arange(10, 24, dtype=np.int32)
    for batch in (1, 3, 14, 40):
        whole = sample_order(chosen, 1, "image", batch, 0, 28).ravel()
        for e in range(len(whole) // 14):
            assert sorted(whole[14 * e : 14 * (e + 1)]) == list(range(10, 24))
        parts = [sample_order(chosen, 1, "image", batch, a, a + 7).ravel() for a in range(0, 28, 7)]
        assert np.array_equal(whole, np.concatenate(parts))


def test_shots_are_of_each_class_nested_and_drawn_with_the_seed() -> None:
    labels = torch.arange(60) % 6
    chosen = few_shot(labels, 4, 1, "image")
    assert np.bincount(labels[chosen]).tolist() == [4] * 6
    assert np.array_equal(chosen, few_shot(labels, 4, 1, "image"))
    assert not np.array_equal(chosen, few_shot(labels, 4, 2, "image"))
    assert not np.array_equal(chosen, few_shot(labels, 4, 1, "text"))
    assert set(few_shot(labels, 2, 1, "image")) < set(chosen)
    assert len(few_shot(labels, 0, 1, "image")) == 60
    assert len(few_shot(labels, 50, 1, "image")) == 60


def test_a_class_without_samples_is_an_error_or_kept() -> None:
    data = made_data()
    few = data.train["text"].labels != 2
    texts = Features(data.train["text"].rows[few], data.train["text"].labels[few])
    train = {**data.train, "text": texts}
    with pytest.raises(DataError, match=r"train of text has no sample of 1 of 7 classes \(2\)"):
        dataclasses.replace(data, train=train)
    kept = dataclasses.replace(data, train=train, missing_classes="keep")
    (result,) = train_grid(kept, [Cell(lr=1e-2, init="text", shots=2, auxiliary_shots=2)], SHORT)
    assert result.validation > 1 / 7


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
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"auxiliary_shots": -1}, "auxiliary_shots is -1"),
        ({"modalities": ("image", "image")}, "must be 1 to 16 different names"),
        ({"modalities": ()}, "must be 1 to 16 different names"),
        ({"modalities": ("image",), "init": "text"}, "init is text"),
    ],
)
def test_a_cell_refuses(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cell(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Cell(modalities=("text",)), "a cell has the target text"),
        (Cell(modalities=("image", "video")), "names the modality video"),
        (Cell(modalities=("image",), init="video", project=False), "names the modality video"),
        (Cell(project=False), "differ: image 20, text 37"),
        (Cell(modalities=("image",), project=False, init="text"), "differ: image 20, text 37"),
    ],
)
def test_a_grid_refuses_cells_that_do_not_fit_the_data(wrong: Cell, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_grid(made_data(), [Cell(), wrong], SHORT)


def test_data_refuses() -> None:
    rows, labels = torch.zeros(4, 3), torch.arange(4)
    with pytest.raises(DataError, match="sample 2 has a feature that is NaN"):
        Features(rows.index_fill(0, torch.tensor([2]), float("nan")), labels)
    with pytest.raises(DataError, match="one for each of the 4 samples"):
        Features(rows, labels[:3])
    good = Features(rows, labels)
    rest = {"target": "image", "train": {"image": good}, "validation": good, "test": good}
    with pytest.raises(DataError, match=r"labels 0\.\.3; there are 3 classes"):
        HeadData(**rest, classes=3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no training samples of the target audio"):
        HeadData(**{**rest, "target": "audio"}, classes=4)  # type: ignore[arg-type]
    wide = Features(torch.zeros(4, 5), labels)
    with pytest.raises(DataError, match="test has 5 features, train 3"):
        HeadData(**{**rest, "test": wide}, classes=4)  # type: ignore[arg-type]
