"""Shards as the data of a run, one place for each modality; classes meet by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uml_fast.config import ConfigError, DataConfig, ModalityConfig, RunConfig, require
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.data_errors import DATA_ERRORS, DataErrors
from uml_fast.data.decoding.decode import Backend, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.held_out import hold_out
from uml_fast.data.in_memory import for_evaluation
from uml_fast.data.shards.direct import DirectImages
from uml_fast.data.shards.files import ShardSet, splits_of
from uml_fast.data.shards.kept import Room
from uml_fast.data.shards.lengths import npy_shape
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError, Source, Task, say_once
from uml_fast.modalities.image import ImageConfig

_FEW_TESTS = 20
"""Test samples below which the numbers are said to mean little."""
_UNKNOWN = -2
"""Label of a sample whose class has no name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldersConfig(DataConfig):
    """Shards for each modality of the run: folders that ``prepare`` wrote, or any WebDataset."""

    image: str | Path | None = None
    """Shards of the modality "image": a folder, files, a brace range, URLs or pipes."""
    audio: str | Path | None = None
    """Shards of the modality "audio": a folder, files, a brace range, URLs or pipes."""
    text: str | Path | None = None
    """Shards of the modality "text": a folder, files, a brace range, URLs or pipes."""
    features: str | Path | None = None
    """Shards of the modality "features": a folder, files, a brace range, URLs or pipes."""
    same: tuple[str, ...] = ()
    """Class names that mean the same, as auxiliary=target: dog_bark=dog."""
    shots: int = 0
    """Training samples of each class of the target, drawn with the seed; 0: all."""
    max_errors: int = 100
    """Samples that may be unreadable before the run stops, over all ranks and resumed parts."""
    cache: Path | None = None
    """Folder for copies of shards from URLs and pipes; None: $XDG_CACHE_HOME/uml_fast/remote."""
    backend: Backend = "webdataset"
    """What decodes: the library of each format, sample by sample; or NVIDIA DALI in batches (dali),
    JPEG images on the GPU (dali_gpu: pixels differ by some steps)."""
    keep_mib: int = 512
    """MiB of memory for decoded training samples, so that small data are decoded once and not each
    epoch; plain JPEG files, which decode faster than that helps, are not kept. 0: none."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training samples are changed, in another way each epoch."""

    def __post_init__(self) -> None:
        require(self.shots >= 0, f"data.shots is {self.shots}; it must be >= 0")
        require(self.max_errors >= 0, f"data.max_errors is {self.max_errors}; it must be >= 0")
        require(self.keep_mib >= 0, f"data.keep_mib is {self.keep_mib}; it must be >= 0")
        for pair in self.same:
            require(pair.count("=") == 1, f"data.same holds {pair!r}; write auxiliary=target names")

    def present(self, modalities: tuple[ModalityConfig, ...]) -> tuple[ModalityConfig, ...]:
        """Modalities with a folder; all where none has one, so that options can be listed."""
        found = tuple(m for m in modalities if getattr(self, m.name, None) is not None)
        return found or modalities

    def feature_size(self, name: str) -> int:
        """Features per row, as the first training sample has them.

        Raises:
            ConfigError: the shards hold something else than features.
        """
        shards = self._open(name, "train")
        require(
            shards.kind == "features",
            f"{name}: {self.place(name)} holds {shards.kind}; features are wanted (python -m "
            "uml_fast.prepare features)",
        )
        return npy_shape(shards.payload(0))[-1]

    def place(self, modality: str) -> str | Path:
        """Where the shards of a modality are.

        Raises:
            ConfigError: no place is given.
        """
        given: str | Path | None = getattr(self, modality, None)
        if given is None:
            raise ConfigError(
                f"{modality}: no folder; give --data.{modality} FOLDER (made by python -m "
                "uml_fast.prepare), or take the modality out of the run"
            )
        return given

    def _open(self, modality: str, split: str) -> ShardSet:
        """A split, or all samples of shards that are not split."""
        place, cache = self.place(modality), self._cache
        return ShardSet.open(place, split if splits_of(place, cache) else None, cache)

    def count(self, modality: str, *, is_target: bool) -> int:
        """Samples in the splits that a run reads: of the target all, else those for training."""
        there = splits_of(self.place(modality), self._cache) if is_target else ()
        total = 0
        for split in [s for s in ("train", "val", "test") if s in there] or ["train"]:
            with self._open(modality, split) as shards:
                total += len(shards)
        return total

    @property
    def _cache(self) -> Path | None:
        return None if self.cache is None else Path(self.cache)

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """Training splits as they lie in the shards, validation and test of the target in memory.

        Raises:
            ConfigError: a modality without a folder.
            DataError: a folder without the splits a run needs, or shards that cannot be used.
        """
        require(run is not None, "files are decoded for the modalities of a run; none is given")
        assert run is not None
        modalities, target = run.modalities, run.target
        named = run.folder / DATA_ERRORS
        if not (run.folder / "run.json").exists():
            _forget(named)
        errors = DataErrors(self.max_errors, named)
        train = {m.name: self._open(m.name, "train") for m in modalities}
        names = self._class_names(train, target, run.objective.init_head_from)
        numbers = {name: i for i, name in enumerate(names)}

        room = Room(self.keep_mib << 20)
        read_with = f"{self.backend} {named.absolute()}"

        def source(
            config: ModalityConfig, shards: ShardSet, chosen: np.ndarray | None = None,
            is_training: bool = False,
        ) -> ShardSource:  # fmt: skip
            labels = self._labels(shards, numbers)
            there = np.arange(len(shards)) if chosen is None else chosen
            unknown = labels[there] == _UNKNOWN
            for i in there[unknown]:
                what = f"label {shards.label[i]} is no class of the training samples"
                errors.add(config.name, shards.key(int(i)), what)
            decode, writer = (
                decode_of(config, self.backend),
                rows_of(config, self.augment, shards.kind),
            )
            direct = None
            if isinstance(config, ImageConfig) and self.backend == "webdataset":
                direct = DirectImages(config)
            return ShardSource(
                config.name, shards, decode, writer, errors, seed, labels, there[~unknown],
                direct, room if is_training else None, f"{config} {read_with}",
            )  # fmt: skip

        config = next(m for m in modalities if m.name == target)
        own, validation, test = self._held_out(train[target], target)
        if self.shots:
            own = _few(train[target], own, self.shots, seed)
        sources = tuple(
            source(m, train[m.name], own if m.name == target else None, True) for m in modalities
        )
        tested = for_evaluation(source(config, *test), "test")
        _check_classes(run, sources, tested, names)
        if len(tested) < _FEW_TESTS:
            say_once(
                f"{target}: {len(tested)} test samples; each is worth {100 / len(tested):.0f} "
                "points of accuracy, so that differences mean little"
            )
        if mode == "uml" and len(modalities) == 1 and "uml" in run.modes:
            say_once(
                f"only {target} is given, so that UML has nothing else to learn from; add another "
                "modality, such as --data.text"
            )
        return Task(
            sources, for_evaluation(source(config, *validation), "validation"), tested, names
        )

    def _held_out(
        self, train: ShardSet, target: str
    ) -> tuple[np.ndarray, tuple[ShardSet, np.ndarray | None], tuple[ShardSet, np.ndarray | None]]:
        """The target's training samples; its validation and its test samples.

        Without a split of that name, a tenth of the training samples, the same in every run.

        Raises:
            DataError: there are too few training samples to hold some out.
        """
        place = self.place(target)
        splits = splits_of(place, self._cache)
        absent = [name for name in ("val", "test") if name not in splits]
        own, *parts = hold_out(train.label, len(absent)) if absent else (np.arange(len(train)),)
        held = dict(zip(absent, parts, strict=True))
        for name, samples in held.items():
            if not len(samples):
                raise DataError(
                    f"{target}: {place} has no split {name!r}, and no class has samples to spare "
                    f"for one ({len(train)} in all); add samples"
                )
            say_once(
                f"{target}: {place} has no split {name!r}; {len(samples)} of its {len(train)} "
                "training samples take its place, the same in every run"
            )

        def samples_of(name: str) -> tuple[ShardSet, np.ndarray | None]:
            return (train, held[name]) if name in held else (self._open(target, name), None)

        return own, samples_of("val"), samples_of("test")

    def _renamed(self, name: str) -> str:
        same = dict(pair.split("=") for pair in self.same)
        return same.get(name, name)

    def _class_names(
        self, train: Mapping[str, ShardSet], target: str, start: str | None
    ) -> tuple[str, ...]:
        """The target's classes, then those that only other modalities have.

        Raises:
            DataError: a name of ``same`` that there is not, or no class of the modality ``start``,
                whose class means the head begins with, is one of the target's.
        """
        first = _names(train[target])
        known = {n for shards in train.values() for n in _names(shards)}
        for pair in self.same:
            name, meant = pair.split("=")
            if (len(train) > 1 and name not in known) or meant not in first:
                raise DataError(
                    f"data.same: {pair}: the left must be a class of some modality, the right one "
                    f"of {target}'s: {', '.join(first)}"
                )
        for modality, shards in train.items():
            if not shards.class_names and len(_names(shards)) and len(train) > 1:
                say_once(
                    f"{modality}: its shards number their classes without a manifest that names "
                    "them; they are called 0, 1, ...: data.same 0=NAME says which are the same"
                )
            own = {self._renamed(n) for n in _names(shards)}
            if own and first and not own & set(first):
                what = (
                    f"{modality}: none of its classes ({', '.join(sorted(own)[:3])}, ...) is one "
                    f"of {target}'s ({', '.join(first[:3])}, ...); --data.same says which meet"
                )
                if modality == start:
                    raise DataError(f"{what}. The head cannot start from its class means")
                say_once(what)
        others = [self._renamed(n) for s in train.values() for n in _names(s)]
        return tuple(dict.fromkeys([*first, *others]))

    def _labels(self, shards: ShardSet, numbers: Mapping[str, int]) -> np.ndarray:
        """int32 (n,) class of each sample among those of the run; -1: none, -2: unknown."""
        present, place = np.unique(shards.label, return_inverse=True)
        names = shards.class_names
        meant = []
        for c in present.tolist():
            if c < 0 or (names and c >= len(names)):
                meant.append(-1 if c == -1 else _UNKNOWN)
            else:
                meant.append(numbers.get(self._renamed(names[c] if names else str(c)), _UNKNOWN))
        return np.array(meant, np.int32)[place]


@functools.cache
def _forget(named: Path) -> None:
    """Take away what an attempt that never began has left, once in a process."""
    named.unlink(missing_ok=True)


def _names(shards: ShardSet) -> tuple[str, ...]:
    """Names of the classes; where the shards have none, the numbers that are there."""
    numbers = np.unique(shards.label[shards.label >= 0]).tolist()
    return shards.class_names or tuple(map(str, numbers))


def _check_classes(
    run: RunConfig, train: tuple[ShardSource, ...], test: Source, names: tuple[str, ...]
) -> None:
    """Stop before the first step at what would end the run behind the last one.

    Raises:
        DataError: the target has no labels or one class alone, or samples of a class to test that
            nothing can learn.
    """
    if run.objective.kind != "classification":
        return
    own = next(s for s in train if s.name == run.target)
    seen = np.unique(own.labels[own.labels >= 0])
    if not len(seen):
        raise DataError(
            f"{run.target}: no training sample has a class; prepare them from a folder for each "
            "class, or from a CSV with a column label"
        )
    if len(seen) == 1 and (run.eval.probe or len(names) == 1):
        raise DataError(
            f"{run.target}: every sample is of the class {names[seen[0]]!r}; to tell "
            "classes apart takes two or more: put the others into folders beside it"
        )
    others = [] if run.eval.probe else [s.labels for s in train]
    unseen = np.setdiff1d(test.labels[test.labels >= 0], np.concatenate([seen, *others]))
    if len(unseen):
        shown = ", ".join(names[c] for c in unseen[:5])
        more = ", or leave them out of the probe: --no-eval.probe" if run.eval.probe else ""
        raise DataError(
            f"{run.target}: {len(unseen)} of {len(names)} classes have test samples but no "
            f"training sample: {shown}; add some or take the test samples out{more}"
        )


def _few(shards: ShardSet, among: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """``shots`` samples of each class, drawn with the seed from ``among``.

    Raises:
        DataError: a class has fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    numbers = np.unique(shards.label[shards.label >= 0]).tolist()
    named = [*enumerate(shards.class_names)] or [(c, str(c)) for c in numbers]
    for c, name in named:
        of_class = among[shards.label[among] == c]
        if len(of_class) < shots:
            raise DataError(
                f"class {name} has {len(of_class)} training samples, data.shots is {shots}"
            )
        chosen.append(rng.permutation(of_class)[:shots])
    return np.sort(np.concatenate(chosen))
