"""Features of sounds in folds, beside unpaired images and texts of the same classes (paper 1.6).

A seed is a fold and a draw: with F folds, seeds 0 to F - 1 are the folds in their order, each with
its first clips by name, which is the paper's protocol (ESC-50: ``--seeds 5``); seeds F to 2 F - 1
are the folds again with clips drawn at random, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from uml_fast.config import require
from uml_fast.data.esc import folds_of, read_class_map, split_fold, usable_folds
from uml_fast.data.source import DataError, say_once
from uml_fast.encoders.cache import NamedFeatures
from uml_fast.grid.data import FeatureFiles, GridData

SOUNDS = "audio"
"""The modality whose names hold folds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundFolds(FeatureFiles):
    """Files that ``python -m uml_fast.extract`` wrote; names of sounds hold their folds."""

    varies: ClassVar[bool] = True

    same: tuple[str, ...] = ()
    """Class names that mean the same, as sound=image or sound=text: dog_bark=dog."""
    class_map: Path | None = None
    """JSON file of such pairs, {"dog_bark": "dog", ...}, as of ImageNet-ESC-19."""
    classes: Literal["target", "common", "all"] = "common"
    """common: classes that every modality has; target: all of the target's, those that others lack
    learn from the target alone; all: classes of any modality."""

    def load(self, modalities: tuple[str, ...], seed: int, shots: int) -> GridData:
        """One split: a fold of the sounds and a draw of its clips, as the seed says.

        Sounds as the target: k clips of each class of the fold to train on, k others to validate,
        the other folds to test; folds with too few clips are tested on only. Another target: its
        own splits, and the sounds of the fold.

        Raises:
            ConfigError: the number of shots is 0 while sounds are the target.
            DataError: features are missing, sounds have no folds, too few clips in every fold, or
                classes do not meet.
        """
        if SOUNDS not in modalities:
            raise DataError(f"folds are those of {SOUNDS}, which is not among {modalities}")
        meeting = [m for m in modalities if m != SOUNDS and m not in self.numbered]
        others = {m: self._split(m, "train").class_names for m in meeting}
        sounds = self._renamed_sounds({n for names in others.values() for n in names})
        labels, folds = sounds.labels.numpy(), folds_of(sounds.keys)
        names, is_target = sounds.class_names, modalities[0] == SOUNDS
        require(
            shots > 0 or not is_target,
            "shots is 0; sounds need a number to leave clips to validate",
        )
        wanted = names
        if self.classes == "common":
            shared = tuple(n for n in names if all(n in other for other in others.values()))
            wanted = shared or names  # none: said where classes meet
        among = np.array([wanted.index(n) if n in wanted else -1 for n in names])[labels]
        usable = sorted(set(folds.tolist()))
        if is_target:
            usable = usable_folds(folds, among, shots, len(wanted))
            few = sorted(set(folds.tolist()) - set(usable))
            if few and usable:
                say_once(
                    f"{shots} shots: folds {', '.join(map(str, few))} have fewer than {2 * shots} "
                    "clips of a class; they are tested on only"
                )
        fold = (usable or folds.tolist())[seed % max(1, len(usable))]
        here = np.flatnonzero(folds == fold)
        parts = {"train": here}
        if is_target:
            split = split_fold(folds, among, sounds.keys, fold, shots, seed // max(1, len(usable)),
                               wanted)  # fmt: skip
            parts = {"train": split.train, "val": split.validation, "test": split.test}
        one = _OneFold(
            where=self.where, classes=self.classes, numbered=self.numbered,
            sounds={name: _clips(sounds, places) for name, places in parts.items()},
        )  # fmt: skip
        return one.load(modalities, seed, shots)

    def _renamed_sounds(self, elsewhere: Set[str]) -> NamedFeatures:
        """All sounds, whatever their splits, called as classes ``elsewhere`` are."""
        found = [self._split(SOUNDS, s) for s in ("train", "val", "test") if self.find(SOUNDS, s)]
        if not found:
            found = [self._split(SOUNDS, "train")]  # which says what is missing
        if any(f.class_names != found[0].class_names for f in found):
            raise DataError(f"the splits of {SOUNDS} have different classes; extract them again")
        pairs = dict(pair.split("=") for pair in self.same)
        pairs |= read_class_map(Path(self.class_map)) if self.class_map is not None else {}
        own = found[0].class_names
        for name, meant in pairs.items():
            if name not in own or (elsewhere and meant not in elsewhere):
                raise DataError(
                    f"{name}={meant}: the left must be a class of the sounds ({', '.join(own)}), "
                    f"the right one of the others ({', '.join(sorted(elsewhere))})"
                )
        renamed = tuple(pairs.get(n, n) for n in own)
        if len(set(renamed)) < len(renamed):
            raise DataError(f"two classes of the sounds mean the same: {', '.join(renamed)}")
        return NamedFeatures(
            torch.cat([f.rows for f in found]), torch.cat([f.labels for f in found]), renamed,
            tuple(k for f in found for k in f.keys), facts=found[0].facts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _OneFold(FeatureFiles):
    """Files, with the sounds of one split in place of theirs."""

    sounds: Mapping[str, NamedFeatures] = field(default_factory=dict)

    def find(self, modality: str, split: str) -> Path | None:
        if modality == SOUNDS:
            return Path() if split in self.sounds else None
        return FeatureFiles.find(self, modality, split)

    def _split(self, modality: str, split: str) -> NamedFeatures:
        if modality == SOUNDS:
            return self.sounds[split]
        return FeatureFiles._split(self, modality, split)


def _clips(sounds: NamedFeatures, places: np.ndarray) -> NamedFeatures:
    at = torch.from_numpy(places)
    keys = tuple(sounds.keys[i] for i in places)
    return replace(sounds, rows=sounds.rows[at], labels=sounds.labels[at], keys=keys)
