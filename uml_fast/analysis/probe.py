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

Preset = Literal["default", "mosi"]


class ProbeError(ValueError):
    """Embeddings or labels that cannot be probed; the message names the set, row or class."""


class LinearProbe:
    """Logistic regression fitted on frozen embeddings, scored on any number of held-out sets.

    Args:
        train_x: (N, D) training embeddings.
        train_y: (N,) integer classes.
        preset: the paper's two settings. default: lbfgs, C = 1, at most 200 iterations, no scaling.
            mosi: standardised features, liblinear (it penalises the intercept too), at most 1000
            iterations, two classes.
        class_names: name of each class for error messages; empty: the number.

    Raises:
        ProbeError: shapes do not match, an embedding is not finite, or all training samples are of
            one class.
    """

    def __init__(
        self,
        train_x: np.ndarray,
        train_y: np.ndarray,
        *,
        preset: Preset = "default",
        class_names: Sequence[str] = (),
    ) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._train = _Checked("train", train_x, train_y, class_names)
        classes = self._train.check_classes(2)
        if preset == "mosi":
            if classes != 2:
                raise ProbeError(
                    f"probe preset mosi is for two classes, there are {classes}; use preset default"
                )
            self._model = make_pipeline(
                StandardScaler(),
                LogisticRegression(solver="liblinear", max_iter=1000, random_state=0),
            )
        else:
            self._model = LogisticRegression(C=1.0, max_iter=200)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            self._model.fit(self._train.x, self._train.y)
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                logger.info("linear probe: the iteration limit of the paper's setting was reached")
            else:
                warnings.warn(warning.message, warning.category, stacklevel=2)

    def accuracy(self, test_x: np.ndarray, test_y: np.ndarray) -> float:
        """Accuracy (fraction 0..1) on embeddings (M, D) with classes (M,).

        Raises:
            ProbeError: as for the training embeddings, another D, or a class of the test set has
                no training sample.
        """
        test = self._train.matching("test", test_x, test_y)
        return float(self._model.score(test.x, test.y))


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    preset: Preset = "default",
    class_names: Sequence[str] = (),
) -> float:
    """Accuracy (fraction 0..1) on one test set of a ``LinearProbe``; its arguments and errors."""
    probe = LinearProbe(train_x, train_y, preset=preset, class_names=class_names)
    return probe.accuracy(test_x, test_y)


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

    train = _Checked("train", train_x, train_y, class_names)
    train.check_classes(1)
    test = train.matching("test", test_x, test_y)
    if not 1 <= k <= len(train.x):
        raise ProbeError(f"k is {k}; there are {len(train.x)} training samples to choose from")
    model = KNeighborsClassifier(k, metric=metric, algorithm="brute")
    model.fit(train.x, train.y)
    return float(model.score(test.x, test.y))


class _Checked:
    """Embeddings ``x`` (n, D) float64 and classes ``y`` (n,) that can be probed."""

    def __init__(
        self, where: str, x: np.ndarray, y: np.ndarray, class_names: Sequence[str]
    ) -> None:
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
        self.x, self.y, self._class_names = x, y, class_names

    def _name(self, label: int) -> str:
        names = self._class_names
        return repr(names[label]) if 0 <= label < len(names) else str(label)

    def check_classes(self, least: int) -> int:
        """Number of classes; an error below ``least``."""
        known = np.unique(self.y)
        if len(known) < least:
            raise ProbeError(
                f"all {len(self.y)} training samples are of class {self._name(int(known[0]))}; "
                "two classes are needed"
            )
        return len(known)

    def matching(self, where: str, x: np.ndarray, y: np.ndarray) -> _Checked:
        """A held-out set that has this one's width, and no class that it has not."""
        other = _Checked(where, x, y, self._class_names)
        if self.x.shape[1] != other.x.shape[1]:
            raise ProbeError(
                f"embeddings have {self.x.shape[1]} features in train and {other.x.shape[1]} in "
                f"{where}"
            )
        missing = [self._name(int(c)) for c in np.setdiff1d(other.y, self.y)]
        if missing:
            raise ProbeError(
                f"no training sample of class {', '.join(missing)}, which the {where} set has; "
                f"give it training samples or take it out of the {where} set"
            )
        return other
