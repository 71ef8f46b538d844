"""Probes of frozen embeddings: logistic regression (paper 1.2) and nearest neighbours.

Legend: N training and M test samples, D features of an embedding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

logger = logging.getLogger(__name__)


class ProbeError(ValueError):
    """Embeddings or labels that cannot be probed; the message names the set, row or class."""


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    preset: Literal["default", "mosi"] = "default",
    class_names: Sequence[str] = (),
) -> float:
    """Accuracy (fraction 0..1) of a logistic regression fitted on frozen embeddings.

    Args:
        train_x: (N, D) training embeddings.
        train_y: (N,) integer classes.
        test_x: (M, D) test embeddings.
        test_y: (M,) integer classes.
        preset: the paper's two settings. default: lbfgs, C = 1, at most 200 iterations, no scaling.
            mosi: standardised features, liblinear (it penalises the intercept too), at most 1000
            iterations, two classes.
        class_names: name of each class for error messages; empty: the number.

    Raises:
        ProbeError: shapes do not match, an embedding is not finite, all training samples are of one
            class, or a class of the test set has no training sample.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_x, train_y, test_x, test_y = _checked(train_x, train_y, test_x, test_y, class_names)
    if preset == "mosi":
        classes = len(np.unique(train_y))
        if classes != 2:
            raise ProbeError(
                f"probe preset mosi is for two classes, there are {classes}; use preset default"
            )
        model = make_pipeline(
            StandardScaler(), LogisticRegression(solver="liblinear", max_iter=1000, random_state=0)
        )
    else:
        model = LogisticRegression(C=1.0, max_iter=200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_x, train_y)
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            logger.info("linear probe: the iteration limit of the paper's setting was reached")
        else:
            warnings.warn(warning.message, warning.category, stacklevel=2)
    return float(model.score(test_x, test_y))


def knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    k: int = 1,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    class_names: Sequence[str] = (),
) -> float:
    """Accuracy (fraction 0..1) of the majority among the ``k`` nearest training embeddings.

    Shapes, ``class_names`` and errors as in ``linear_probe``, except that one class is allowed.

    Raises:
        ProbeError: also where ``k`` is not in 1..N.
    """
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y, test_x, test_y = _checked(
        train_x, train_y, test_x, test_y, class_names, min_classes=1
    )
    if not 1 <= k <= len(train_x):
        raise ProbeError(f"k is {k}; there are {len(train_x)} training samples to choose from")
    model = KNeighborsClassifier(k, metric=metric, algorithm="brute")
    model.fit(train_x, train_y)
    return float(model.score(test_x, test_y))


def _checked(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    class_names: Sequence[str],
    min_classes: int = 2,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    def name(label: int) -> str:
        return repr(class_names[label]) if 0 <= label < len(class_names) else str(label)

    def pair(where: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = np.asarray(x), np.asarray(y)
        if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0:
            raise ProbeError(
                f"{where}: embeddings {list(x.shape)} and labels {list(y.shape)}; needed are "
                "(samples, features) and (samples,) with at least one sample"
            )
        x = x.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        if len(bad):
            raise ProbeError(
                f"{where}: {len(bad)} of {len(x)} embeddings hold NaN or infinity, the first is "
                f"row {bad[0]}; training has diverged or the input is not finite"
            )
        return x, y

    train_x, train_y = pair("train", train_x, train_y)
    test_x, test_y = pair("test", test_x, test_y)
    if train_x.shape[1] != test_x.shape[1]:
        raise ProbeError(
            f"embeddings have {train_x.shape[1]} features in train and {test_x.shape[1]} in test"
        )
    known = np.unique(train_y)
    missing = [name(int(c)) for c in np.setdiff1d(test_y, known)]
    if missing:
        raise ProbeError(
            f"no training sample of class {', '.join(missing)}, which the test set has; "
            "give it training samples or take it out of the test set"
        )
    if len(known) < min_classes:
        only = name(int(known[0]))
        raise ProbeError(
            f"all {len(train_y)} training samples are of class {only}; two classes are needed"
        )
    return train_x, train_y, test_x, test_y
