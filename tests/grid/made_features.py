"""Files of features made up: classes are directions that images and texts see in their own way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from uml_fast.encoders.cache import save_features

NAMES = ("ant", "bee", "cat", "dog", "elk")


def write_features(
    folder: Path, modality: str, split: str, each: int, width: int = 12, noise: float = 0.6,
    names: tuple[str, ...] = NAMES, seed: int = 0,
) -> Path:  # fmt: skip
    """A file with ``each`` samples of every class; a class is the same in every split."""
    centres = {n: np.random.default_rng([sum(map(ord, n + modality)), width]).normal(size=width)
               for n in names}  # fmt: skip
    rng = np.random.default_rng([seed, len(modality), len(split), each])
    rows = np.concatenate([centres[n] + noise * rng.normal(size=(each, width)) for n in names])
    labels = torch.arange(len(names)).repeat_interleave(each)
    keys = [f"{n}/{split}{i}" for n in names for i in range(each)]
    path = folder / f"{modality}-{split}.safetensors"
    save_features(
        path, torch.from_numpy(rows).float(), labels, names, keys,
        {"encoder": {"name": f"made {modality}"}, "width": width},
    )  # fmt: skip
    return path


def write_all(folder: Path) -> Path:
    """Images in three splits and texts."""
    for split, each in (("train", 8), ("val", 4), ("test", 20)):
        write_features(folder, "image", split, each, noise=1.5)
    write_features(folder, "text", "train", 6, width=16, noise=0.3)
    return folder
