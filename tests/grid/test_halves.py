"""Steps whose products are made of bf16 halves (AMX) against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from tests.grid.made_heads import CELLS, THREE, in_float64, made_data, name, one_lesson
from uml_fast.grid import Cell
from uml_fast.grid.heads import Heads
from uml_fast.grid.reference import train_cell

MORE_CELLS = [
    Cell(batch=3, lr=1e-2, ratio=0.3),
    Cell(batch=17, lr=1e-2, project=False),
    Cell(modalities=THREE, batch=40, lr=1e-2, ratio=2),
    Cell(batch=70, lr=1e-2, alpha=2.0),
]
"""Of more samples than a group of matrix tiles takes, and of parts of one."""


@pytest.mark.native
@pytest.mark.parametrize("sizes", [(37, 37, 10), (112, 112, 101), (16, 16, 3)])
@pytest.mark.parametrize("cell", [*CELLS, *MORE_CELLS], ids=name)
def test_steps_in_halves_are_near_those_in_float64(
    cell: Cell, sizes: tuple[int, int, int], instruction_set: str
) -> None:
    """Where the processor has AMX; elsewhere they are those in fp32, bit by bit."""
    data = made_data(*sizes, missing="keep")
    lesson = one_lesson(data, cell)
    heads, single = (Heads(data, [cell], 2, precision=p) for p in ("high", "highest"))
    for each in (heads, single):
        each.start(1, cell)
    expected = in_float64(data, heads, lesson)
    right, right_single = heads.train({1: lesson}), single.train({1: lesson})
    results = heads.parts(1, cell).tensors(), single.parts(1, cell).tensors()
    if instruction_set != "amx_bf16":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        return
    assert abs(right[1] - right_single[1]) <= 1
    assert not torch.equal(results[0][1], results[1][1])
    single.start(1, cell)
    train_cell(single, 1, lesson)
    for got, same, exact in zip(*results, expected, strict=True):
        # Terms of a scale's gradient may cancel, in PyTorch's own fp32 too.
        assert (got - exact).abs().max() <= 1e-5 + 2 * (same - exact).abs().max()
