"""Grids of linear heads on frozen features, trained together (paper 1.4 and its table 5)."""

from uml_fast.grid.cells import Cell, HeadSchedule, product
from uml_fast.grid.features import Features, HeadData, few_shot
from uml_fast.grid.train import CellResult, train_grid

__all__ = [
    "Cell",
    "CellResult",
    "Features",
    "HeadData",
    "HeadSchedule",
    "few_shot",
    "product",
    "train_grid",
]
