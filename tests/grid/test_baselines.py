"""Simple methods beside a grid, and controls that tell a network's gain from its auxiliaries'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.grid.made_features import write_all, write_features
from uml_fast.grid import Cell, Features, HeadData, HeadSchedule, few_shot, train_grid
from uml_fast.grid.baselines import PENALTIES, logistic_regression, nearest_mean, simple_methods
from uml_fast.grid.data import FeatureFiles
from uml_fast.recipes import load_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> HeadData:
    where = write_all(tmp_path_factory.mktemp("features"))
    return FeatureFiles(where=(str(where),)).load(("image", "text"), 0, 0).heads


def test_simple_methods_see_the_shots_of_the_heads(data: HeadData) -> None:
    for shots, seed in ((1, 3), (4, 5)):
        train, held = data.train["image"], data.validation
        some = torch.from_numpy(few_shot(train.labels, shots, seed, "image")).long()
        few = Features(train.rows[some], train.labels[some])
        some = torch.from_numpy(few_shot(held.labels, min(4, shots), seed, "validation")).long()
        held = Features(held.rows[some], held.labels[some])
        found = simple_methods(data, shots, seed)
        assert found == {
            "nearest class mean": nearest_mean(few, data.test, data.classes),
            "logistic regression": logistic_regression(few, held, data.test),
        }
    assert simple_methods(data, 1, 3) != simple_methods(data, 1, 4)


def test_the_nearest_mean_is_by_angle_and_never_a_class_without_samples() -> None:
    train = Features(torch.tensor([[5.0, 0.0], [0.0, 0.1]]), torch.tensor([0, 2]))
    test = Features(torch.tensor([[9.0, 1.0], [0.1, 0.2], [-1.0, -2.0]]), torch.tensor([0, 2, 0]))
    assert nearest_mean(train, test, 3) == 1.0


def test_logistic_regression_takes_the_penalty_that_validates_best(data: HeadData) -> None:
    train, test = data.train["image"], data.test
    norm = train.rows.norm(dim=1).mean()
    accuracies = {
        c: LogisticRegression(C=c, max_iter=1000)
        .fit((train.rows / norm).numpy(), train.labels.numpy())
        .score((test.rows / norm).numpy(), test.labels.numpy())
        for c in PENALTIES
    }
    assert len(set(accuracies.values())) > 1
    # validated on the test samples themselves, it must find their best
    assert logistic_regression(train, test, test) == max(accuracies.values())


def test_a_control_is_the_same_network_that_no_text_teaches(tmp_path: Path) -> None:
    where = write_all(tmp_path)
    config = load_recipe("vision_text_control")
    config = dataclasses.replace(
        config, data=FeatureFiles(where=(str(where),)), shots=(2,), seeds=1,
        search=dataclasses.replace(config.search, points=3),
    )  # fmt: skip
    cells = {c.variant: c.cell for c in config.cells()}
    assert list(cells) == ["unimodal", "uml", "uml_init", "network", "network_init"]
    assert len(list(config.cells())) == 5 * 3
    for control, variant in (("network", "uml"), ("network_init", "uml_init")):
        assert cells[control].modalities == cells[variant].modalities == ("image", "text")
        assert cells[control].init == cells[variant].init
        assert cells[control].alpha == 0 < cells[variant].alpha

    def accuracy(cell: Cell) -> torch.Tensor:
        heads = config.data.load(("image", "text"), 1, 2).heads
        schedule = HeadSchedule(steps=40, eval_every=20, warmup_steps=2)
        cell = dataclasses.replace(cell, lr=1e-2)
        weight = train_grid(heads, [cell], schedule, keep_weights=True)[0].weight
        assert weight is not None
        return weight

    before = {name: accuracy(cell) for name, cell in cells.items()}
    write_features(where, "text", "train", 6, width=16, noise=3.0, seed=9)
    after = {name: accuracy(cell) for name, cell in cells.items()}
    same = {name for name in cells if np.allclose(before[name], after[name], atol=1e-6)}
    assert same == {"unimodal", "network"}
