"""Files of MultiBench's layout with something to learn in them: for tests, and to try the recipes.

A sample follows a few hidden factors that drift from row to row around a mean its class decides.
Every modality sees them through a projection of its own: text clearly, vision (MIMIC: the series
clearly, the static vector) through more noise. So a row tells something of the next one, and what
one modality shows plainly is there, hidden, in the other.

The quirks of the real files are there too: padding on the left (MUSTARD and UR-FUNNY: on the
right), samples without text, audio of minus infinity, frames without a face, a constant feature,
and in MIMIC values that are missing or infinite.

Legend: n samples, T rows of the longest sample, K factors, E features of a row.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from uml_fast.data.multibench_files import BENCHMARKS, ICD9_TASK, Dataset
from uml_fast.data.source import DataError
from uml_fast.runtime.files import replace_file

ROWS = 50
"""T of the benchmark's files."""
COUNTS: Mapping[Dataset, tuple[int, int, int]] = MappingProxyType(
    {
        "mosi": (1284, 229, 686), "mosei": (2000, 250, 500), "mustard": (414, 138, 138),
        "ur_funny": (2000, 250, 500), "mimic": (2400, 300, 300),
    }
)  # fmt: skip
"""Samples of train, valid and test; of MOSI and MUSTARD as many as in the real files."""

_FACTORS = 6
_DRIFT = 0.85
"""Part of a factor that stays from row to row."""
_NOISE = {"vision": 6.0, "audio": 4.0, "text": 1.0, "static": 1.5, "series": 1.0}
"""Deviation of the noise on each feature; that of the signal is about 1."""
_HOURS = 24
_TASKS = 20


def write_benchmark(
    path: Path, dataset: Dataset, counts: tuple[int, int, int] | None = None, seed: int = 0
) -> None:
    """Write a generated file of a data set, whole or not at all.

    Args:
        path: the file; its folder is made.
        dataset: whose keys, shapes, dtypes and quirks it has.
        counts: samples of train, valid and test (MIMIC: their sum); None: ``COUNTS``.
        seed: of everything random in it.

    Raises:
        DataError: the file cannot be written.
    """
    rng = np.random.default_rng([seed, list(BENCHMARKS).index(dataset)])
    counts = counts or COUNTS[dataset]
    made = _mimic(sum(counts), rng) if dataset == "mimic" else _affect(dataset, counts, rng)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, pickle.dumps(made, protocol=4))
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}; choose another folder") from e


def _projections(dataset: Dataset, rng: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = BENCHMARKS[dataset].sizes
    return {m: rng.standard_normal((_FACTORS, e)) / np.sqrt(_FACTORS) for m, e in sizes.items()}


def _factors(y: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """(n, rows, K) factors: the first two have a mean of the sign of ``y`` (n,)."""
    mean = np.zeros((len(y), _FACTORS))
    mean[:, :2] = np.sign(y)[:, None]
    h = np.empty((len(y), rows, _FACTORS))
    h[:, 0] = mean + rng.standard_normal(mean.shape)
    for t in range(1, rows):
        fresh = np.sqrt(1 - _DRIFT**2) * rng.standard_normal(mean.shape)
        h[:, t] = mean + _DRIFT * (h[:, t - 1] - mean) + fresh
    return h


def _observed(h: np.ndarray, name: str, projection: np.ndarray, rng: np.random.Generator) -> Any:
    noise = _NOISE[name] * rng.standard_normal((*h.shape[:2], projection.shape[1]))
    return (h @ projection + noise).astype(np.float32)


def _affect(
    dataset: Dataset, counts: tuple[int, int, int], rng: np.random.Generator
) -> dict[str, Any]:
    projections = _projections(dataset, rng)
    return {
        split: _affect_split(dataset, n, projections, rng)
        for split, n in zip(("train", "valid", "test"), counts, strict=True)
    }


def _affect_split(
    dataset: Dataset, n: int, projections: Mapping[str, np.ndarray], rng: np.random.Generator
) -> dict[str, Any]:
    is_binary = BENCHMARKS[dataset].labels == "minus_one"
    y = np.where(np.arange(n) % 2, 1.0, -1.0)[rng.permutation(n)]
    if not is_binary:
        y = np.clip(np.round(y * np.abs(rng.normal(1.2, 0.8, n)), 1), -3, 3)
    h = _factors(np.where(y >= 0, 1.0, -1.0), ROWS, rng)
    # skewed to the right and cut at T, as corpora are; a mean of 19 rows is that of bench/shapes
    lengths = np.minimum(3 + np.rint(rng.gamma(2.0, 8.0, n)), ROWS).astype(np.int64)
    is_row = np.arange(ROWS) < lengths[:, None]
    if not is_binary:
        is_row = is_row[:, ::-1]
    columns: dict[str, Any] = {
        name: _observed(h, name, projection, rng) for name, projection in projections.items()
    }
    columns["vision"][:, :, -1] = 1.0
    columns["vision"][rng.random((n, ROWS)) < 0.05] = 0.0
    # words that GloVe does not know, but never the first one, where a sample is cut
    is_first = is_row & ~np.pad(is_row, ((0, 0), (1, 0)))[:, :-1]
    columns["text"][(rng.random((n, ROWS)) < 0.05) & ~is_first] = 0.0
    columns["audio"][rng.random((n, ROWS)) < 0.05, 0] = -np.inf
    for name in projections:
        columns[name][~is_row] = 0.0
    columns["text"][rng.choice(n, max(1, n // 100), replace=False)] = 0.0
    labels = y.astype(np.int64).reshape(n, 1) if is_binary else y.reshape(n, 1, 1)
    ids = np.array([f"{dataset}{i:05d}" for i in range(n)])
    return columns | {"labels": labels, "id": ids}


def _mimic(n: int, rng: np.random.Generator) -> dict[str, Any]:
    y = np.where(np.arange(n) % 2, 1.0, -1.0)[rng.permutation(n)]
    projections = _projections("mimic", rng)
    h = _factors(y, _HOURS, rng)
    scale = np.array([1.0, 10.0, 100.0, 0.1, 1.0])
    static = _observed(h.mean(1, keepdims=True), "static", projections["static"], rng)[:, 0]
    series = _observed(h, "series", projections["series"], rng) * 20 + 80
    series[rng.random(series.shape) < 0.02] = np.nan
    series[rng.random(series.shape) < 0.001] = np.inf
    series[:, :, -1] = 1.0
    tasks = (rng.random((n, _TASKS)) < 0.3).astype(np.float64)
    tasks[:, ICD9_TASK] = y > 0
    return {
        "ep_tdata": series.astype(np.float64), "y_icd9": tasks,
        "adm_features_all": (static * scale).astype(np.float64),
        "adm_labels_all": (rng.random((n, 6)) < 0.2).astype(np.float64),
    }  # fmt: skip
