"""Sources of feature arrays: .npy, .npz, extracted features, MultiBench pickles; as columns."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.data.prepare.items import Item, Problem
from uml_fast.data.prepare.listing import SPLIT_NAMES, Found
from uml_fast.data.prepare.restricted import load_arrays
from uml_fast.data.shards.lengths import npy_header
from uml_fast.data.source import DataError

PICKLES = (".pkl", ".pickle", ".p")
EXTRACTED = ".safetensors"
FILES = (".npy", ".npz", EXTRACTED, *PICKLES)
"""Files that hold the arrays of many samples."""

_FEATURES = ("features", "x", "X", "data", "rows", "embeddings")
_LABELS = ("labels", "label", "y", "targets")
_SPLITS = ("split", "splits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What the columns of an array file are called; empty: the usual names."""

    features: str = ""
    """Array of features, such as vision in a MultiBench pickle."""
    labels: str = ""
    """Array of labels; "none": take no labels."""
    threshold: float | None = None
    """Labels that are measurements become two classes: above this, and not above."""


def find_arrays(source: Path, names: Names) -> Found:
    """Every sample of array files: a file, or a folder with a file for each split.

    A file holds (n, features), (n, rows, features), a list of (rows, features), or ``rows`` and
    ``offsets`` (n + 1) of ragged samples; with them ``labels`` (n) and ``split`` (n). A pickle or a
    folder has these for each of train, valid and test.

    Raises:
        DataError: the source is not there or cannot be read, lacks an array, or counts differ.
    """
    paths = [source]
    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in FILES)
    elif not source.exists():
        raise DataError(f"{source} does not exist; give a {', '.join(FILES)} file or a folder")
    found = Found()
    for path in paths:
        columns = _load(path)
        is_split = {str(k).lower() for k in columns} <= SPLIT_NAMES.keys() and columns
        parts = columns if is_split else {"": columns}
        for name, part in parts.items():
            where = f"{path.stem}/{name}" if name else path.stem
            if not isinstance(part, Mapping):
                part = {"features": part}
            split = name or (path.stem if len(paths) > 1 else None)
            _add(found, path, where, split, part, names)
    return found


def _load(path: Path) -> Mapping[str, Any]:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        value = load_arrays(path)
        return value if isinstance(value, Mapping) else {"features": value}
    if suffix not in FILES:
        raise DataError(f"{path} is none of {', '.join(FILES)}")
    if suffix == EXTRACTED:
        return _extracted(path)
    try:
        if suffix == ".npy":
            return {"features": _mapped(path)}
        # np.load leaves a broken file open; and of one array it makes no context
        with path.open("rb") as file, np.load(file, allow_pickle=False) as columns:
            return {name: columns[name] for name in columns.files}
    except (ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        hint = "; store plain numbers, or a pickle" if "allow_pickle" in str(e) else ""
        raise DataError(f"{path} cannot be read as arrays: {e}{hint}") from e


def _extracted(path: Path) -> Mapping[str, Any]:
    """What ``uml_fast.extract`` wrote: the features of each sample and the name of its class."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            rows, labels = (file.get_tensor(name) for name in ("rows", "labels"))
            names = [*json.loads((file.metadata() or {})["class_names"]), ""]
        classes = [str(names[i]) for i in labels.tolist()]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError) as e:
        raise DataError(f"{path} holds no features that uml_fast.extract wrote: {e}") from e
    return {"features": rows.float().numpy(), "labels": classes}


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, left on disk (np.load would leave a broken file open)."""
    with path.open("rb") as file:
        try:
            shape, is_fortran, dtype = npy_header(file)
        except DataError as e:
            raise DataError(f"{path}: {e}") from e
        if dtype.hasobject:
            raise DataError(f"{path} holds Python objects; store plain numbers")
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _pick(
    columns: Mapping[str, Any], where: str, meaning: str, given: str, usual: Sequence[str]
) -> Any:
    """The column given, else the first usual one; None where there is none."""
    if given:
        if given not in columns:
            there = ", ".join(map(str, columns))
            raise DataError(f"{where} has no {given!r}; it has {there}. See --names.{meaning}")
        return columns[given]
    return next((columns[name] for name in usual if name in columns), None)


def _add(
    found: Found,
    path: Path,
    where: str,
    split: str | None,
    columns: Mapping[str, Any],
    names: Names,
) -> None:
    features = _pick(columns, where, "features", names.features, _FEATURES)
    others = {*_LABELS, *_SPLITS, "offsets", "id", "ids"}
    if features is None:
        candidates = [k for k in columns if k not in others]
        if len(candidates) != 1:
            there = ", ".join(map(str, columns)) or "nothing"
            raise DataError(f"{where} has {there}; name the features with --names.features")
        features = columns[candidates[0]]
    if "offsets" in columns:
        features = _ragged(features, np.asarray(columns["offsets"]), where)
    samples: Sequence[Any] = features
    if not isinstance(samples, (list, tuple)) and np.ndim(samples) < 2:
        raise DataError(f"{where}: features have shape {np.shape(samples)}; give (n, features)")
    n = len(samples)
    raw_labels = None
    if names.labels != "none":
        raw_labels = _pick(columns, where, "labels", names.labels, _LABELS)
    labels = _label_names(raw_labels, n, where, names.threshold)
    splits = columns.get("split", columns.get("splits"))
    if splits is not None and len(splits) != n:
        raise DataError(f"{where}: {len(splits)} splits for {n} samples")
    changed = path.stat().st_mtime_ns
    size = path.stat().st_size
    for i in range(n):
        name = f"{where}/{i:08d}"
        if labels[i] == "":
            found.problems.append(Problem(name, "missing label", "its label is NaN"))
            continue
        its_split = split if splits is None else _plain(splits[i])
        found.items.append(
            Item(
                name, labels[i], its_split, size=size // max(n, 1), changed_ns=changed,
                value=samples[i],
            )
        )  # fmt: skip


def _ragged(rows: Any, offsets: np.ndarray, where: str) -> list[Any]:
    is_whole = offsets.ndim == 1 and len(offsets) >= 1 and offsets.dtype.kind in "iu"
    if not is_whole or offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"{where}: offsets must be integers that rise from 0 to the {len(rows)} rows"
        )
    return [rows[a:b] for a, b in itertools.pairwise(offsets)]


def _plain(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _label_names(
    labels: Any, n: int, where: str, threshold: float | None
) -> list[str] | list[None]:
    """Class name of each sample, "" where it is missing; None where nothing has a class."""
    if labels is None:
        return [None] * n
    values = np.asarray(labels)
    if len(values) != n or values.size != n:
        raise DataError(f"{where}: labels have shape {values.shape} for {n} samples")
    values = values.reshape(n)
    if values.dtype.kind not in "biuf":
        return [_plain(v) for v in values.tolist()]
    is_missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(n, bool)
    known = values[~is_missing]
    if threshold is not None:
        text = [
            f"above {threshold:g}" if v > threshold else f"not above {threshold:g}" for v in values
        ]
    elif (known == np.floor(known)).all():
        text = [str(int(v)) if not m else "" for v, m in zip(values, is_missing, strict=True)]
    else:
        raise DataError(
            f"{where}: labels such as {known[known != np.floor(known)][0]:g} are measurements, not "
            "classes; --names.threshold 0 makes two classes of them, --names.labels none drops them"
        )
    return ["" if m else t for t, m in zip(text, is_missing, strict=True)]
