"""manifest.json: what a folder of shards holds, and how it was made."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import uml_fast
from uml_fast.data.prepare.items import Moments, Problem
from uml_fast.data.prepare.writer import Shard
from uml_fast.data.shards.index import ShardIndex
from uml_fast.data.shards.lengths import UNITS

FORMAT = 1
"""Raised when what is written changes."""

_MAKERS = {
    "images": ("pillow",),
    "audio": ("soundfile", "scipy"),
    "text": (),
    "tokens": ("tokenizers",),
    "features": (),
}


def versions(kind: str) -> dict[str, str]:
    """Versions of what the bytes of shards depend on."""
    found = {
        "uml_fast": uml_fast.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for package in _MAKERS[kind]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def describe_split(
    index: ShardIndex, shards: Sequence[Shard], class_names: Sequence[str], kind: str
) -> dict[str, Any]:
    """One split: its samples, samples of each class, lengths and shards."""
    counts = np.bincount(index.label[index.label >= 0], minlength=len(class_names))
    lengths = {
        unit: {
            "min": int(index.length[:, i].min()),
            "mean": float(index.length[:, i].mean()),
            "max": int(index.length[:, i].max()),
        }
        for i, unit in enumerate(UNITS[kind])
    }
    return {
        "samples": len(index),
        "classes": dict(zip(class_names, counts.tolist(), strict=True)),
        "length": lengths,
        "shards": [
            {"file": s.file, "samples": len(s.rows), "bytes": s.bytes, "sha256": s.sha256}
            for s in shards
        ],
    }


def normalisation(kind: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """Statistics over the values of shards, the training ones; empty for text and tokens.

    Images: mean and std of red, green and blue in 0..1. Audio: peak and root mean square of samples
    in -1..1. Features: mean and std of each feature.
    """
    total: Moments | None = None
    for shard in shards:
        if shard.moments:
            total = total + shard.moments if total else shard.moments
    if total is None:
        return {}
    if kind == "audio":
        rms = float(np.sqrt(total.squares[0] / total.count + total.mean[0] ** 2))
        return {"peak": total.peak, "rms": rms}
    return {"mean": total.mean.tolist(), "std": total.std.tolist()}


def manifest(
    *,
    kind: str,
    class_names: Sequence[str],
    splits: Mapping[str, tuple[ShardIndex, Sequence[Shard]]],
    facts: Mapping[str, Any],
    options: Mapping[str, Any],
    fingerprint: str,
    problems: Sequence[Problem],
    notes: Counter[str],
) -> dict[str, Any]:
    """The whole manifest. ``facts``: what holds for every sample, such as the sample rate."""
    described = {
        name: describe_split(index, shards, class_names, kind)
        for name, (index, shards) in splits.items()
    }
    counts = [d["classes"] for d in described.values()]
    return {
        "format": FORMAT,
        "kind": kind,
        **facts,
        "class_names": list(class_names),
        "empty_classes": [c for c in class_names if not any(count[c] for count in counts)],
        "normalisation": normalisation(kind, next(iter(splits.values()))[1]),
        "splits": described,
        "problems": dict(sorted(Counter(p.problem for p in problems).items())),
        "notes": dict(sorted(notes.items())),
        "options": dict(options),
        "versions": versions(kind),
        "fingerprint": fingerprint,
    }
