"""Prepared shards as the data of a run, a folder for each modality; classes meet by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uml_fast.config import ConfigError, DataConfig, ModalityConfig, RunConfig, require
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decode import Backend, decode_of
from uml_fast.data.rows import rows_of
from uml_fast.data.shard_source import ShardSource
from uml_fast.data.shards import ShardSet, read_manifest
from uml_fast.data.source import DataError, Task, in_memory

_IN_MEMORY = 20_000
"""Samples of a validation or test split that are evaluated; evenly spread ones of a larger one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldersConfig(DataConfig):
    """Folders that ``python -m uml_fast.prepare`` wrote, one for each modality of the run."""

    image: Path | None = None
    """Folder of the modality "image"."""
    audio: Path | None = None
    """Folder of the modality "audio"."""
    text: Path | None = None
    """Folder of the modality "text"."""
    features: Path | None = None
    """Folder of the modality "features"."""
    same: tuple[str, ...] = ()
    """Class names that mean the same, as auxiliary=target: dog_bark=dog."""
    shots: int = 0
    """Training samples of each class of the target, drawn with the seed; 0: all."""
    max_errors: int = 100
    """Samples that may be unreadable before the run stops."""
    backend: Backend = "webdataset"
    """What decodes: the library of each format, sample by sample; or NVIDIA DALI in batches."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training samples are changed, in another way each epoch."""

    def __post_init__(self) -> None:
        require(self.shots >= 0, f"data.shots is {self.shots}; it must be >= 0")
        require(self.max_errors >= 0, f"data.max_errors is {self.max_errors}; it must be >= 0")
        for pair in self.same:
            require(pair.count("=") == 1, f"data.same holds {pair!r}; write auxiliary=target names")

    def present(self, modalities: tuple[ModalityConfig, ...]) -> tuple[ModalityConfig, ...]:
        """Modalities with a folder; all where none has one, so that options can be listed."""
        found = tuple(m for m in modalities if getattr(self, m.name, None) is not None)
        return found or modalities

    def folder(self, modality: str) -> Path:
        """The folder of a modality.

        Raises:
            ConfigError: none is given.
        """
        given = getattr(self, modality, None)
        if given is None:
            raise ConfigError(
                f"{modality}: no folder; give --data.{modality} FOLDER (made by python -m "
                "uml_fast.prepare), or take the modality out of the run"
            )
        return Path(given)

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """Training splits as they lie in the shards, validation and test of the target in memory.

        Raises:
            ConfigError: a modality without a folder.
            DataError: a folder without the splits a run needs, or shards that cannot be used.
        """
        require(run is not None, "files are decoded for the modalities of a run; none is given")
        assert run is not None
        modalities, target = run.modalities, run.target
        errors = DataErrors(self.max_errors, run.folder / "data_errors.jsonl")
        train = {m.name: ShardSet.open(self.folder(m.name), "train") for m in modalities}
        names = self._class_names(train, target)
        numbers = {name: i for i, name in enumerate(names)}

        def source(
            config: ModalityConfig, shards: ShardSet, chosen: np.ndarray | None = None
        ) -> ShardSource:
            labels = self._labels(shards, numbers)
            decode, writer = decode_of(config, self.backend), rows_of(config, self.augment)
            return ShardSource(config.name, shards, decode, writer, errors, seed, labels, chosen)

        config = next(m for m in modalities if m.name == target)
        own, validation = self._held_out(train[target], target)
        test = ShardSet.open(self.folder(target), "test")
        if self.shots:
            own = _few(train[target], own, self.shots, seed)
        sources = tuple(
            source(m, train[m.name], own if m.name == target else None) for m in modalities
        )
        return Task(
            sources, in_memory(source(config, *validation), _IN_MEMORY),
            in_memory(source(config, test), _IN_MEMORY), names,
        )  # fmt: skip

    def _held_out(
        self, train: ShardSet, target: str
    ) -> tuple[np.ndarray, tuple[ShardSet, np.ndarray | None]]:
        """The target's training samples, and its validation samples.

        Without a split of that name, a tenth of the training samples, the same in every run.
        """
        everything = np.arange(len(train))
        if "val" in read_manifest(self.folder(target))["splits"]:
            return everything, (ShardSet.open(self.folder(target), "val"), None)
        held = np.random.default_rng(0).permutation(len(train))[: -(-len(train) // 10)]
        return np.setdiff1d(everything, held), (train, np.sort(held))

    def _renamed(self, name: str) -> str:
        same = dict(pair.split("=") for pair in self.same)
        return same.get(name, name)

    def _class_names(self, train: Mapping[str, ShardSet], target: str) -> tuple[str, ...]:
        """The target's classes, then those that only other modalities have."""
        first = train[target].class_names
        known = {n for shards in train.values() for n in shards.class_names}
        for pair in self.same:
            name, meant = pair.split("=")
            if (len(train) > 1 and name not in known) or meant not in first:
                raise DataError(
                    f"data.same: {pair}: the left must be a class of some modality, the right one "
                    f"of {target}'s: {', '.join(first)}"
                )
        others = [self._renamed(n) for s in train.values() for n in s.class_names]
        return tuple(dict.fromkeys([*first, *others]))

    def _labels(self, shards: ShardSet, numbers: Mapping[str, int]) -> np.ndarray:
        """int32 (n,) class of each sample among those of the run."""
        renumbered = [numbers[self._renamed(name)] for name in shards.class_names]
        table = np.array([*renumbered, -1], np.int32)
        return table[shards.label] if shards.class_names else shards.label


def _few(shards: ShardSet, among: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """``shots`` samples of each class, drawn with the seed from ``among``.

    Raises:
        DataError: a class has fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for c, name in enumerate(shards.class_names):
        of_class = among[shards.label[among] == c]
        if len(of_class) < shots:
            raise DataError(
                f"class {name} has {len(of_class)} training samples, data.shots is {shots}"
            )
        chosen.append(rng.permutation(of_class)[:shots])
    return np.sort(np.concatenate(chosen))
