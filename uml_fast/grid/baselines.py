"""Simple methods on the same frozen features and the same few shots as the heads of a grid.

They stand beside every table: a gain over the target's own head that these do not show is a gain
over a weak head.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch.nn import functional as F

from uml_fast.grid.cells import Cell
from uml_fast.grid.features import Features, HeadData
from uml_fast.grid.train import chosen_samples, validation_samples

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Values of C of the logistic regression that are tried; the validation samples choose."""
_MOST_PRODUCTS = 10**8
"""Samples x features x classes above which the logistic regression is left out (10 s a seed)."""


def simple_methods(data: HeadData, shots: int, seed: int) -> dict[str, float]:
    """Test accuracy (0..1) of each method on the target alone, where it takes seconds.

    Args:
        data: features; of the training samples, those that a cell with these shots and this seed
            sees.
        shots: training samples of each class; 0: all.
        seed: draws them.
    """
    cell = Cell(modalities=(data.target,), shots=shots, seed=seed)
    train = _some(data.train[data.target], chosen_samples(data, cell)[0])
    validation = _some(data.validation, validation_samples(data, cell))
    found = {"nearest class mean": nearest_mean(train, data.test, data.classes)}
    if train.rows.numel() * data.classes <= _MOST_PRODUCTS:
        found["logistic regression"] = logistic_regression(train, validation, data.test)
    return found


def nearest_mean(train: Features, test: Features, classes: int) -> float:
    """Accuracy of the class whose mean training sample is nearest by cosine."""
    sums = torch.zeros(classes, train.width)
    sums.index_add_(0, train.labels, F.normalize(train.rows))
    likeness = F.normalize(test.rows) @ F.normalize(sums).T
    likeness[:, torch.bincount(train.labels, minlength=classes) == 0] = -torch.inf
    return float((likeness.argmax(1) == test.labels).float().mean())


def logistic_regression(train: Features, validation: Features, test: Features) -> float:
    """Accuracy of scikit-learn's logistic regression with the C that validates best.

    Features are divided by the mean L2 norm of the training ones, so that C means the same for any
    encoder. Of equally good C the strongest penalty is taken.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    norm = train.rows.norm(dim=1).mean().clamp(min=1e-12)
    inputs = [(s.rows / norm).numpy() for s in (train, validation, test)]
    best, accuracy = -1.0, 0.0
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs[0], train.labels.numpy())
        validated = float(model.score(inputs[1], validation.labels.numpy()))
        if validated > best:
            best, accuracy = validated, float(model.score(inputs[2], test.labels.numpy()))
    return accuracy


def _some(features: Features, chosen: np.ndarray) -> Features:
    at = torch.from_numpy(chosen)
    return Features(features.rows[at], features.labels[at])
