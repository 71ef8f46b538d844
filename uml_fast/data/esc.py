"""Folds of sounds, as ESC-50 has them, and class names that mean the same in two modalities.

A clip is called ``FOLD-RECORDING-TAKE...``: 1-100032-A is take A of recording 100032, in fold 1
(Piczak, "ESC: Dataset for environmental sound classification", 2015). Clips cut from one recording
are in one fold, so a head that is tested on other folds never heard their recordings.

A split (paper 1.6): k clips of each class of one fold to train on, the k behind them to validate,
all clips of the other folds to test; a table averages over the folds.

Legend: n clips.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uml_fast.data.source import DataError

_NAME = re.compile(r"(\d+)-([^-]+)(?:-.*)?")


@dataclass(frozen=True, slots=True, eq=False)
class FoldSplit:
    """Clips of one split, as sorted int64 places among all."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def folds_of(keys: Sequence[str]) -> np.ndarray:
    """int64 (n,) fold of each clip.

    Args:
        keys: names of the clips; folders before them and endings behind them do not matter.

    Raises:
        DataError: no names, a name without fold and recording, one fold alone, or a recording whose
            clips lie in two folds: what it was trained on would be tested.
    """
    if not keys:
        raise DataError("the sounds have no names, so that nothing says their folds")
    folds: list[int] = []
    first: dict[str, tuple[int, str]] = {}
    for key in keys:
        stem = key.rsplit("/", 1)[-1].partition(".")[0]
        found = _NAME.fullmatch(stem)
        if found is None:
            raise DataError(
                f"sound {key}: its name does not begin with FOLD-RECORDING, as 1-100032-A does"
            )
        fold, recording = int(found[1]), found[2]
        before = first.setdefault(recording, (fold, key))
        if before[0] != fold:
            raise DataError(
                f"recording {recording} is in fold {before[0]} ({before[1]}) and in fold {fold} "
                f"({key}); clips of one recording must share a fold, or a test would hear what was "
                "trained on"
            )
        folds.append(fold)
    if len(set(folds)) < 2:
        raise DataError(f"all sounds are in fold {folds[0]}; a test needs another fold")
    return np.array(folds)


def split_fold(
    folds: np.ndarray,
    labels: np.ndarray,
    keys: Sequence[str],
    fold: int,
    shots: int,
    seed: int,
    class_names: Sequence[str],
) -> FoldSplit:
    """The split that trains on ``shots`` clips of each class of a fold.

    Args:
        folds: (n,) fold of each clip.
        labels: (n,) places in ``class_names``; -1: a clip that is not used.
        keys: names; their order is the order of the clips.
        fold: the fold to train and validate on.
        shots: k, at least 1.
        seed: 0 takes the first clips by name, as the paper's protocol does; any other draws them.
        class_names: name of each class; every one must have 2 k clips in the fold.

    Raises:
        DataError: a class has fewer.
    """
    by_name = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    train, validation = [], []
    for c, name in enumerate(class_names):
        clips = by_name[(folds[by_name] == fold) & (labels[by_name] == c)]
        if len(clips) < 2 * shots:
            raise DataError(
                f"fold {fold} has {len(clips)} clips of {name}; {shots} shots take {2 * shots}: "
                f"{shots} to train on and {shots} to validate"
            )
        if seed:
            clips = np.random.default_rng([seed, fold, c]).permutation(clips)
        train.append(clips[:shots])
        validation.append(clips[shots : 2 * shots])
    test = np.flatnonzero((folds != fold) & (labels >= 0))
    return FoldSplit(np.sort(np.concatenate(train)), np.sort(np.concatenate(validation)), test)


def usable_folds(folds: np.ndarray, labels: np.ndarray, shots: int, classes: int) -> list[int]:
    """Folds that have 2 ``shots`` clips of every class."""
    fewest = {
        int(f): int(np.bincount(labels[(folds == f) & (labels >= 0)], minlength=classes).min())
        for f in np.unique(folds)
    }
    return [f for f, count in fewest.items() if count >= 2 * shots]


def read_class_map(path: Path) -> dict[str, str]:
    """The pairs of a JSON file ``{"dog_bark": "dog", ...}``: auxiliary name -> target name.

    Raises:
        DataError: the file is missing or holds no such pairs.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(pairs, dict) or not all(isinstance(v, str) for v in pairs.values()):
        raise DataError(f'{path} must hold names that mean the same: {{"dog_bark": "dog", ...}}')
    return pairs


def shared_classes(
    names: Mapping[str, Sequence[str]], same: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Classes that every modality has, and where each modality's classes went.

    Args:
        names: modality -> its class names, the first modality's words are the ones that remain.
        same: name -> name that it means, as read_class_map gives them.

    Returns:
        The shared names in the order of the first modality, and modality -> int64 (its classes,)
        places in them, -1 where the class is not shared.

    Raises:
        DataError: fewer than two classes are shared; or a name of ``same`` is no class of any.
    """
    known = {name for own in names.values() for name in own}
    for pair in same.items():
        for name in pair:
            if name not in known:
                raise DataError(
                    f"{pair[0]}={pair[1]}: no modality has a class {name!r}; there are "
                    f"{', '.join(sorted(known))}"
                )
    meant = {m: [same.get(name, name) for name in own] for m, own in names.items()}
    first, *others = meant.values()
    common = tuple(dict.fromkeys(n for n in first if all(n in other for other in others)))
    if len(common) < 2:
        raise DataError(
            f"{len(common)} classes are in all of {', '.join(names)}; two are needed. Say which "
            "names mean the same, as dog_bark=dog: "
            + "; ".join(f"{m} has {', '.join(own[:5])}" for m, own in names.items())
        )
    places = {name: i for i, name in enumerate(common)}
    return common, {m: np.array([places.get(n, -1) for n in own]) for m, own in meant.items()}
