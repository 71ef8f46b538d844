"""Frozen features on disk: one safetensors file per modality and split.

Tensors: ``rows`` fp32 or bf16 (n, D), ``labels`` int64 (n,), -1 where a sample has no class, and
``keys``, where samples have names: uint8, in UTF-8, one a line. Metadata, as text: ``class_names``
(JSON list), and of files written here ``fingerprint`` (of what the features were made of),
``facts`` (the same, readable) and ``sha256`` of the tensors. ``rows``, ``labels`` and
``class_names`` are enough: any program may write such a file.

Legend: n samples, D features of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.source import DataError
from uml_fast.grid.features import Features
from uml_fast.runtime.files import advice, replace_file


@dataclass(frozen=True, slots=True, eq=False)
class NamedFeatures(Features):
    """Features with the names of their classes and samples."""

    class_names: tuple[str, ...] = ()
    """Name of each class; labels are places in it."""
    keys: tuple[str, ...] = ()
    """Name of each sample; empty where they have none."""
    fingerprint: str = ""
    """Of model, data and transform; empty where it is not known."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What it is the fingerprint of."""


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts, which are JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_features(
    path: Path,
    rows: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    keys: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write features, whole or not at all.

    Args:
        path: file, usually ``<modality>-<split>.safetensors``.
        rows: fp32 or bf16 (n, D).
        labels: int64 (n,) places in ``class_names``, or -1.
        class_names: name of each class.
        keys: name of each sample, or none.
        facts: what the features were made of, as JSON; their fingerprint is kept.

    Raises:
        DataError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {"rows": rows.contiguous(), "labels": labels.contiguous()}
    if keys:
        tensors["keys"] = torch.from_numpy(np.frombuffer("\n".join(keys).encode(), np.uint8).copy())
    metadata = {
        "format": "pt",
        "class_names": json.dumps(list(class_names)),
        "sha256": _digest(tensors),
    }
    if facts is not None:
        metadata |= {"facts": json.dumps(facts), "fingerprint": fingerprint_of(facts)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(tensors, metadata))
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}; {advice(e)}") from e


def load_features(path: Path) -> NamedFeatures:
    """Read features; rows become fp32.

    Raises:
        DataError: the file is missing, torn or damaged, or not one of features; the message says
            which.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; make it with python -m uml_fast.extract") from None
    except (OSError, SafetensorError) as e:
        raise DataError(f"{path} is torn or no safetensors file: {e}; extract it again") from e
    missing = {"rows", "labels"} - tensors.keys() | {"class_names"} - metadata.keys()
    if missing:
        raise DataError(f"{path} holds no features: {', '.join(sorted(missing))} is not there")
    if metadata.get("sha256", "") not in ("", _digest(tensors)):
        raise DataError(f"{path} is damaged: its content is not what was written; extract it again")
    names = _class_names(path, metadata["class_names"])
    labels, rows = tensors["labels"].long(), tensors["rows"].float()
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise DataError(
            f"{path} has labels {int(labels.min())}..{int(labels.max())} and {len(names)} class "
            "names"
        )
    keys = tensors.get("keys", torch.empty(0, dtype=torch.uint8)).numpy().tobytes().decode()
    try:
        return NamedFeatures(
            rows, labels, names, tuple(keys.split("\n")) if keys else (),
            metadata.get("fingerprint", ""), json.loads(metadata.get("facts", "{}")),
        )  # fmt: skip
    except DataError as e:
        raise DataError(f"{path}: {e}") from e


def _class_names(path: Path, text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list):
        raise DataError(f"{path}: class_names is {text[:60]!r}; it must be a JSON list of names")
    twice = sorted({str(n) for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"{path}: class_names has {', '.join(twice[:5])} more than once")
    return tuple(map(str, names))


def is_stored(path: Path, fingerprint: str) -> bool:
    """Whether the file is there, whole, and was made of just that.

    Raises:
        DataError: it is there and torn, damaged or no file of features.
    """
    return path.exists() and load_features(path).fingerprint == fingerprint


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Unfinished:
    """Rows of an extraction so far, in the order they were made, kept beside the file to come.

    A killed extraction goes on behind its last whole row.

    Args:
        path: the file to come.
        fingerprint: what the rows are made of; those of another one are thrown away.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._rows = path.with_name(path.name + ".rows")
        self._note = path.with_name(path.name + ".part")
        self._fingerprint, self._width, self.done = fingerprint, 0, 0
        try:
            note = json.loads(self._note.read_text())
            if note["fingerprint"] == fingerprint:
                self._width = int(note["width"])
                self.done = self._rows.stat().st_size // (4 * self._width)
                os.truncate(self._rows, self.done * 4 * self._width)
        except (OSError, ValueError, KeyError, ZeroDivisionError):
            self._width = self.done = 0
        if not self.done:
            self.remove()

    def add(self, rows: np.ndarray) -> None:
        """Append fp32 rows (b, D).

        Raises:
            DataError: the disk is full.
        """
        try:
            if not self._width:
                self._width = rows.shape[1]
                self._rows.parent.mkdir(parents=True, exist_ok=True)
                note = {"fingerprint": self._fingerprint, "width": self._width}
                self._note.write_text(json.dumps(note))
            with self._rows.open("ab") as file:
                file.write(rows.astype("<f4", copy=False).tobytes())
        except OSError as e:
            raise DataError(
                f"cannot write {self._rows}: {e.strerror or e}; {advice(e)}. The same command "
                "goes on"
            ) from e
        self.done += len(rows)

    def rows(self) -> np.ndarray:
        """fp32 (done, D)."""
        return np.fromfile(self._rows, "<f4").reshape(self.done, self._width)

    def remove(self) -> None:
        """Take the files away."""
        self._rows.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
