"""Where a grid of heads gets its features, and how the classes of several modalities meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from uml_fast.config import require
from uml_fast.data.held_out import hold_out
from uml_fast.data.source import DataError, say_once
from uml_fast.encoders.cache import NamedFeatures, load_features
from uml_fast.grid.features import Features, HeadData


@dataclass(frozen=True, slots=True, eq=False)
class GridData:
    """Features of one experiment."""

    heads: HeadData
    """Samples of all modalities."""
    class_names: tuple[str, ...]
    """Name of each class; the target's come first."""
    encoder: Mapping[str, Any] = field(default_factory=dict)
    """What made the target's features: name, hash of its weights, transform; empty: not known."""

    def averaged(self) -> GridData:
        """The same with one sample of each class of every auxiliary: the mean of its features."""
        heads = self.heads
        train = {
            name: split if name == heads.target else _class_means(split)
            for name, split in heads.train.items()
        }
        return replace(self, heads=replace(heads, train=train))


@dataclass(frozen=True, kw_only=True, slots=True)
class GridDataConfig:
    """Where features come from; subclasses implement ``load``."""

    varies: ClassVar[bool] = False
    """Whether each seed and number of shots has samples of its own (folds), or the cells draw their
    shots from the same ones."""

    def load(self, modalities: tuple[str, ...], seed: int, shots: int) -> GridData:
        """The features of some modalities, the target first.

        Raises:
            DataError: they are missing or cannot be used.
        """
        raise NotImplementedError


class LoadedData:
    """Features of a run by seed and shots; those asked for last stay in memory.

    Args:
        config: where they come from.
        modalities: the target first.
    """

    def __init__(self, config: GridDataConfig, modalities: tuple[str, ...]) -> None:
        self._config, self._modalities = config, modalities
        self._last: tuple[tuple[int, int], GridData] | None = None

    def key(self, seed: int, shots: int) -> tuple[int, int]:
        """Equal for cells that have the same features."""
        return (seed, shots) if self._config.varies else (0, 0)

    def of(self, seed: int, shots: int) -> GridData:
        """The features of a cell.

        Raises:
            DataError: they are missing or cannot be used.
        """
        key = self.key(seed, shots)
        if self._last is None or self._last[0] != key:
            self._last = None  # two data sets need not fit into memory
            self._last = key, self._config.load(self._modalities, seed, shots)
        return self._last[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFiles(GridDataConfig):
    """Files that ``python -m uml_fast.extract`` wrote: <modality>-<split>.safetensors."""

    where: tuple[str, ...] = ()
    """Folders; of each modality the first one that has it is taken."""
    same: tuple[str, ...] = ()
    """Class names that mean the same, as auxiliary=target: dog_bark=dog."""
    classes: Literal["target", "common", "all"] = "target"
    """target: its classes, and what others have beyond them is left out; common: those that every
    modality has; all: classes of any modality get rows of the head."""
    numbered: tuple[str, ...] = ()
    """Auxiliaries whose class i stands for the target's class i, whatever its name: unrelated text
    as a control (paper E.9)."""

    def __post_init__(self) -> None:
        for pair in self.same:
            require(pair.count("=") == 1, f"data.same holds {pair!r}; write auxiliary=target names")

    def find(self, modality: str, split: str) -> Path | None:
        """The file of a modality's split, if there is one beside its training features."""
        for folder in self.where:
            if (Path(folder) / f"{modality}-train.safetensors").exists():
                path = Path(folder) / f"{modality}-{split}.safetensors"
                return path if path.exists() else None
        return None

    def load(self, modalities: tuple[str, ...], seed: int, shots: int) -> GridData:
        """See ``GridDataConfig``; without val or test a tenth of the target's training samples."""
        target, *others = modalities
        train = {m: self._split(m, "train") for m in modalities}
        names = self._class_names(train, target)
        own = train[target]
        absent = [s for s in ("val", "test") if self.find(target, s) is None]
        parts = hold_out(own.labels.numpy(), len(absent)) if absent else (np.arange(len(own)),)
        held = {s: _some(own, p) for s, p in zip(absent, parts[1:], strict=True)}
        for split, some in held.items():
            say_once(
                f"{target}: no split {split!r}; {len(some)} of its {len(own)} training samples "
                "take its place, the same in every run"
            )
        tested = {
            s: _meeting(held[s] if s in held else self._split(target, s), names, {}, target)
            for s in ("val", "test")
        }
        heads = HeadData(
            target=target,
            train={
                target: _meeting(_some(own, parts[0]), names, {}, target),
                **{m: self._auxiliary(m, train[m], names, own.class_names) for m in others},
            },
            validation=tested["val"],
            test=tested["test"],
            classes=len(names),
            missing_classes="keep",
        )
        return GridData(heads, names, own.facts.get("encoder", {}))

    def _split(self, modality: str, split: str) -> NamedFeatures:
        require(
            bool(self.where),
            "data.where names no folder; make features: python -m uml_fast.extract",
        )
        path = self.find(modality, split)
        if path is None:
            raise DataError(
                f"{modality}: no {modality}-{split}.safetensors in {', '.join(self.where)}; make "
                "it with python -m uml_fast.extract, or take the modality out of the run"
            )
        found = load_features(path)
        without = int((found.labels < 0).sum())
        if without:
            say_once(f"{path}: {without} of {len(found)} samples have no class and are left out")
            found = _some(found, np.flatnonzero(found.labels.numpy() >= 0))
        return found

    @property
    def _renamed(self) -> dict[str, str]:
        return dict(pair.split("=") for pair in self.same)

    def _class_names(self, train: Mapping[str, NamedFeatures], target: str) -> tuple[str, ...]:
        """The classes of the head, as ``classes`` says; names who has one that others lack."""
        own = train[target].class_names
        seen = {
            m: {self._renamed.get(n, n) for n in f.class_names}
            for m, f in train.items() if m != target and m not in self.numbered
        }  # fmt: skip
        for pair in self.same:
            name, meant = pair.split("=")
            if meant not in own or not any(name in f.class_names for f in train.values()):
                raise DataError(
                    f"data.same: {pair}: the left must be a class of some modality, the right one "
                    f"of {target}'s: {_shown(own)}"
                )
        for modality, names in seen.items():
            beyond, lacking = sorted(names - {*own}), [n for n in own if n not in names]
            if len(lacking) == len(own):
                raise DataError(
                    f"{modality}: none of its classes ({_shown(sorted(names))}) is one of "
                    f"{target}'s ({_shown(own)}); data.same says which meet, and data.numbered "
                    f"{modality} that they meet by number"
                )
            if beyond:
                fate = "get rows of the head" if self.classes == "all" else "are left out"
                say_once(
                    f"{modality}: classes that {target} does not have {fate}: {_shown(beyond)}"
                )
            if lacking:
                fate = "are left out" if self.classes == "common" else f"learn from {target} alone"
                say_once(f"{modality}: classes that only {target} has {fate}: {_shown(lacking)}")
        if self.classes == "common":
            return tuple(n for n in own if all(n in names for names in seen.values()))
        more = sorted(set().union(*seen.values()) - {*own}) if self.classes == "all" else []
        return (*own, *more)

    def _auxiliary(
        self, modality: str, found: NamedFeatures, names: tuple[str, ...], own: tuple[str, ...]
    ) -> Features:
        if modality in self.numbered:
            say_once(
                f"{modality}: its class i ({_shown(found.class_names)}) stands for class i "
                f"({_shown(own)})"
            )
            taken = min(len(own), len(found.class_names))
            some = _some(found, np.flatnonzero(found.labels.numpy() < taken))
            found = replace(some, class_names=own)
        return _meeting(found, names, self._renamed, modality)


def _shown(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _some(found: NamedFeatures, places: np.ndarray) -> NamedFeatures:
    chosen = torch.from_numpy(places)
    keys = tuple(found.keys[i] for i in places) if found.keys else ()
    return replace(found, rows=found.rows[chosen], labels=found.labels[chosen], keys=keys)


def _meeting(
    found: NamedFeatures, names: tuple[str, ...], renamed: Mapping[str, str], what: str
) -> Features:
    """The samples whose class is among ``names``, numbered by their place there."""
    place = {name: i for i, name in enumerate(names)}
    meant = [place.get(renamed.get(n, n), -1) for n in found.class_names]
    labels = torch.tensor(meant, dtype=torch.int64)[found.labels]
    there = labels >= 0
    if not there.any():
        raise DataError(f"{what}: no sample is of one of the classes {_shown(names)}")
    return Features(found.rows[there], labels[there])


def _class_means(split: Features) -> Features:
    classes, place = split.labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), split.width).index_add_(0, place, split.rows)
    return Features(sums / torch.bincount(place)[:, None], classes)
