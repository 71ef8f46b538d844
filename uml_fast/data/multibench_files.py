"""MultiBench's own pickles as ragged sources, read without running what is in them (paper 1.2).

Affect sets (MOSI, MOSEI, MUSTARD, UR-FUNNY): a dictionary of splits ``train``, ``valid``, ``test``,
each with ``vision``, ``audio``, ``text`` (n, T, E), aligned word by word and padded with zero rows
on the left or right to T, ``labels`` (n numbers in any shape) and ``id``. MIMIC: one dictionary
with ``adm_features_all`` (n, 5), ``ep_tdata`` (n, 24, 12) and ``y_icd9`` (n, tasks), not split.

Legend: n samples, T rows of the longest sample, E features of a row.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from uml_fast.data.prepare.restricted import load_arrays
from uml_fast.data.source import DataError, Source, say_once

Dataset = Literal["mosi", "mosei", "mustard", "ur_funny", "mimic"]
Split = Literal["train", "validation", "test"]
Contents = Mapping[Split, Mapping[str, Source]]
"""Split -> modality -> its samples; sample i of a split is the same in every modality."""

ICD9_TASK = 7
"""Column of ``y_icd9`` that the paper predicts."""
_SHUFFLE_SEED = 10
_SPLITS: Mapping[str, Split] = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What paper 1.2 says of one data set."""

    title: str
    """Name in the paper's tables."""
    files: tuple[str, ...]
    """Names its file has had, the usual one first."""
    sizes: Mapping[str, int]
    """Features of a row of each modality: X, Y, then what the paper leaves out."""
    batch: int
    """Samples of each modality in a step."""
    normalised: tuple[str, ...] = ()
    """Modalities whose features are standardised."""
    labels: Literal["sign", "minus_one"] = "minus_one"
    """sign: y >= 0 is class 1; minus_one: 1 is class 1, -1 or 0 is class 0."""
    classes: tuple[str, str]
    """Names of class 0 and 1."""


BENCHMARKS: Mapping[Dataset, Benchmark] = MappingProxyType(
    {
        "mosi": Benchmark(
            title="MOSI", files=("mosi_data.pkl", "mosi_raw.pkl", "mosi.pkl"), batch=32,
            sizes={"vision": 20, "text": 300, "audio": 5}, labels="sign",
            classes=("negative", "positive"),
        ),
        "mosei": Benchmark(
            title="MOSEI", files=("mosei_senti_data.pkl", "mosei_raw.pkl", "mosei.pkl"), batch=32,
            sizes={"vision": 35, "text": 300, "audio": 74}, labels="sign",
            classes=("negative", "positive"),
        ),
        "mustard": Benchmark(
            title="MUSTARD", files=("sarcasm.pkl", "mustard.pkl"), batch=128,
            sizes={"vision": 371, "text": 300, "audio": 81}, normalised=("vision",),
            classes=("sincere", "sarcastic"),
        ),
        "ur_funny": Benchmark(
            title="UR-FUNNY", files=("humor.pkl", "ur_funny.pkl"), batch=128,
            sizes={"vision": 371, "text": 300, "audio": 81}, normalised=("vision",),
            classes=("serious", "funny"),
        ),
        "mimic": Benchmark(
            title="MIMIC", files=("im.pk", "mimic.pkl"), batch=128,
            sizes={"static": 5, "series": 12}, normalised=("static", "series"),
            classes=("without", "with"),
        ),
    }
)  # fmt: skip


def read_benchmark(path: Path, dataset: Dataset) -> Contents:
    """The splits of a file; read once while it does not change.

    Raises:
        DataError: the file cannot be read or would run code, lacks a key, holds arrays that do not
            belong together, a label that is no class, or features that are not finite.
    """
    try:
        stat = path.stat()
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    return _read(path, dataset, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _read(path: Path, dataset: Dataset, changed_ns: int, size: int) -> Contents:
    stored = load_arrays(path)
    if not isinstance(stored, Mapping):
        raise DataError(f"{path} holds a {type(stored).__name__}, not a dictionary")
    made = _mimic(path, stored) if dataset == "mimic" else _affect(path, stored, dataset)
    for sources in made.values():
        for source in sources.values():
            source.rows.flags.writeable = False  # trials share them
    return made


def _affect(path: Path, stored: Mapping[str, Any], dataset: Dataset) -> Contents:
    return {
        split: _affect_split(f"{path}, split {key}", _get(str(path), stored, key), dataset)
        for key, split in _SPLITS.items()
    }


def _affect_split(where: str, stored: Any, dataset: Dataset) -> Mapping[str, Source]:
    """Samples without text are dropped, the others cut to the rows between their padding.

    A sample begins at its first row with text, as in the paper, and ends at its last row that is
    not zero in all modalities, so that a zero frame inside it (no face found) stays.
    """
    if not isinstance(stored, Mapping):
        raise DataError(f"{where}: a {type(stored).__name__}, not a dictionary of arrays")
    names = tuple(BENCHMARKS[dataset].sizes)
    arrays = {name: _array(where, stored, name, 3) for name in names}
    shapes = {name: x.shape[:2] for name, x in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise DataError(
            f"{where}: samples and rows differ, {shapes}; the modalities must be aligned word by "
            "word (MultiBench's aligned files)"
        )
    arrays["audio"] = np.where(np.isneginf(arrays["audio"]), np.float32(0), arrays["audio"])
    n = len(arrays["text"])
    labels = _classes(where, _get(where, stored, "labels"), n, BENCHMARKS[dataset].labels)
    keys = _keys(stored.get("id"), n)
    kept = np.flatnonzero(arrays["text"].sum((1, 2)) != 0)
    if len(kept) < n:
        say_once(f"{where}: {n - len(kept):,} of {n:,} samples have no text and are left out")
    if not len(kept):
        raise DataError(f"{where}: no sample has text")
    has_text = arrays["text"].any(2)
    is_there = np.logical_or.reduce([x.any(2) for x in arrays.values()])
    first = has_text.argmax(1)
    end = is_there.shape[1] - is_there[:, ::-1].argmax(1)
    return {
        name: Source.from_samples(
            name, [x[i, first[i] : end[i]] for i in kept], labels[kept].tolist(),
            [keys[i] for i in kept],
        )
        for name, x in arrays.items()
    }  # fmt: skip


def _mimic(path: Path, stored: Mapping[str, Any]) -> Contents:
    """Ten parts in the release's order: validation the first, test the second, train the rest."""
    where = str(path)
    static, series = (
        _array(where, stored, "adm_features_all", 2),
        _array(where, stored, "ep_tdata", 3),
    )
    tasks = _array(where, stored, "y_icd9", 2)
    n = len(static)
    if not n == len(series) == len(tasks):
        raise DataError(
            f"{where}: {n} rows of adm_features_all, {len(series)} of ep_tdata, {len(tasks)} of "
            "y_icd9; they must be as many"
        )
    if tasks.shape[1] <= ICD9_TASK:
        raise DataError(f"{where}: y_icd9 has {tasks.shape[1]} tasks; task {ICD9_TASK} is needed")
    if n < 10:
        raise DataError(f"{where}: {n} patients; ten or more are needed for three splits")
    labels = _classes(where, tasks[:, ICD9_TASK], n, "minus_one")
    order = list(range(n))
    random.Random(_SHUFFLE_SEED).shuffle(order)
    parts: dict[Split, list[int]] = {
        "validation": order[: n // 10], "test": order[n // 10 : n // 5], "train": order[n // 5 :]
    }  # fmt: skip
    filled = {
        "static": np.where(np.isfinite(static), static, np.float32(0))[:, None],
        "series": np.where(np.isfinite(series), series, np.float32(0)),
    }
    return {
        split: {
            name: Source.from_samples(
                name, [x[i] for i in chosen], labels[chosen].tolist(), [str(i) for i in chosen]
            )
            for name, x in filled.items()
        }
        for split, chosen in parts.items()
    }


def _get(where: str, stored: Mapping[str, Any], key: str) -> Any:
    if key not in stored:
        there = ", ".join(map(str, stored)) or "nothing"
        raise DataError(f"{where} has no {key!r}; it has {there}")
    return stored[key]


def _array(where: str, stored: Mapping[str, Any], key: str, dims: int) -> np.ndarray:
    """float32 array with ``dims`` dimensions; the file's own memory where it has that type."""
    value = _get(where, stored, key)
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, np.float32)
    except (TypeError, ValueError) as e:
        raise DataError(f"{where}: {key!r} is no array of numbers: {e}") from e
    if array.ndim != dims or 0 in array.shape:
        wanted = {2: "(samples, features)", 3: "(samples, rows, features)"}[dims]
        raise DataError(f"{where}: {key!r} has shape {array.shape}; needed is {wanted}")
    return array


def _classes(where: str, given: Any, n: int, rule: str) -> np.ndarray:
    """int32 (n,) classes 0 and 1 of n labels in any shape."""
    try:
        values = np.asarray(given, np.float64)
    except (TypeError, ValueError) as e:
        raise DataError(f"{where}: the labels are no numbers: {e}") from e
    if values.size != n:
        raise DataError(
            f"{where}: labels have shape {values.shape} for {n} samples; one each is needed"
        )
    values = values.reshape(n)
    accepted = np.isfinite(values) if rule == "sign" else np.isin(values, (-1, 0, 1))
    if not accepted.all():
        i = int(accepted.argmin())
        what = "it must be a number" if rule == "sign" else "-1, 0 and 1 are classes"
        raise DataError(f"{where}: sample {i} has label {values[i]:g}; {what}")
    return (values >= 0 if rule == "sign" else values == 1).astype(np.int32)


def _keys(ids: Any, n: int) -> list[str]:
    """Name of each sample: its id, or the parts of it, else its number."""
    rows = list(ids) if isinstance(ids, (list, tuple, np.ndarray)) and len(ids) == n else range(n)
    return [
        "/".join(_text(part) for part in np.atleast_1d(np.asarray(row)).ravel()) for row in rows
    ]


def _text(part: Any) -> str:
    return part.decode("latin1") if isinstance(part, bytes) else str(part)
