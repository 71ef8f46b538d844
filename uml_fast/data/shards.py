"""Shards, read: any sample by its number, from any thread.

    with ShardSet.open("shards/cifar10", "train") as shards:
        jpeg, label = shards.payload(0), shards.label[0]

docs/data-format.md says what is in the files.
"""

from __future__ import annotations

import glob
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.data.lengths import UNITS
from uml_fast.data.shard_index import ShardIndex, scan, scan_cached
from uml_fast.data.source import DataError
from uml_fast.files import sha256_of

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``prepare`` wrote about a folder of shards.

    Raises:
        DataError: there is none, or it is broken.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["kind"] not in UNITS or not isinstance(manifest["splits"], dict):
            raise ValueError("its kind or its splits are unknown")
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {MANIFEST}; make shards with python -m uml_fast.prepare"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} cannot be used: {e}; prepare the data again") from e
    return manifest


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The samples of one split. Files are opened at their first use, and stay open."""

    paths: tuple[Path, ...]
    """Tar file of each shard."""
    kind: str
    """images, audio, text or features."""
    index: ShardIndex
    """One row per sample."""
    class_names: tuple[str, ...] = ()
    """Name of each class; empty where they are not known."""
    sha256: tuple[str, ...] = ()
    """Checksum of each shard; empty where they are not known."""
    _files: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @staticmethod
    def open(where: str | Path, split: str | None = None) -> ShardSet:
        """Open prepared shards, or any WebDataset tar files.

        Args:
            where: folder that ``prepare`` wrote; or a folder of tar files, a tar file, a glob or a
                brace range of them (``data/train-{000000..000012}.tar``).
            split: split of the folder; None: its only one. Of a folder of tar files without a
                manifest: those whose name starts with it.

        Raises:
            DataError: nothing is there, the split does not exist, a shard is missing or not as
                long as it was, an index or a tar file is broken, or a key comes twice.
        """
        folder = Path(where)
        if (folder / MANIFEST).is_file():
            return _open_prepared(folder, split)
        if folder.is_dir():
            paths = sorted(folder.glob(f"{split or ''}*.tar"))
            found = f"no {split or ''}*.tar in {folder}"
        else:
            paths = [Path(p) for p in _expand(str(where))]
            found = f"{where} names no file"
        if not paths:
            raise DataError(f"{found}; make shards with python -m uml_fast.prepare")
        return _open_tars(paths)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def label(self) -> np.ndarray:
        """int32 (n,) class of each sample, -1 where there is none."""
        return self.index.label

    @property
    def length(self) -> np.ndarray:
        """int32 (n, L) height and width, or samples, rows or bytes of each sample."""
        return self.index.length

    def key(self, i: int) -> str:
        """Name of sample ``i``, unique."""
        return bytes(self.index.keys[i]).decode()

    def extension(self, i: int) -> str:
        """What the payload of sample ``i`` is: jpg, flac, ..."""
        return bytes(self.index.extensions[self.index.extension[i]]).decode()

    def payload(self, i: int) -> bytes:
        """The stored bytes of sample ``i``. Threads may call it at the same time.

        Raises:
            DataError: the shard is gone, cannot be read or is cut off; it names shard and key.
        """
        shard = int(self.index.shard[i])
        size, offset = int(self.index.size[i]), int(self.index.offset[i])
        try:
            content = os.pread(self._file(shard), size, offset)
        except OSError as e:
            raise DataError(
                f"{self.paths[shard]}, key {self.key(i)}: cannot be read: {e.strerror}"
            ) from e
        if len(content) != size:
            raise DataError(
                f"{self.paths[shard]}, key {self.key(i)}: the tar file ends after {len(content)} "
                f"of {size} bytes; it was truncated since the index was made"
            )
        return content

    def verify(self) -> Iterator[str]:
        """Compare every shard with its checksum and its index; yields each fault found."""
        for number, path in enumerate(self.paths):
            if self.sha256 and sha256_of(path) != self.sha256[number]:
                yield f"{path}: its content is not what it was when it was made (sha256)"
                continue
            try:
                seen, _ = scan(path)
            except DataError as e:
                yield str(e)
                continue
            rows = self.index.shard == number
            for name in ("keys", "offset", "size", "label", "length"):
                if not np.array_equal(getattr(seen, name), getattr(self.index, name)[rows]):
                    yield f"{path}: {name} in the index differ from those in the tar file"

    def close(self) -> None:
        """Close the files; a later ``payload`` opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # open files and locks stay in this process
        return ShardSet, (self.paths, self.kind, self.index, self.class_names, self.sha256)

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            return self._files[shard]


def _open_prepared(folder: Path, split: str | None) -> ShardSet:
    manifest = read_manifest(folder)
    splits = manifest["splits"]
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise DataError(f"{folder} has the splits {', '.join(splits)}; {split!r} is none of them")
    try:
        shards = [(folder / s["file"], s["bytes"], s["sha256"]) for s in splits[split]["shards"]]
        names = tuple(manifest["class_names"])
    except (KeyError, TypeError) as e:
        raise DataError(f"{folder / MANIFEST} lacks {e}; prepare the data again") from e
    paths, sizes, digests = zip(*shards, strict=True)
    for path, size in zip(paths, sizes, strict=True):
        if not path.is_file():
            raise DataError(f"{path} is missing; copy it there or prepare the data again")
        if path.stat().st_size != size:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, it was made with {size}; copy it again"
            )
    index = ShardIndex.load(folder / f"{split}.index.npz")
    return _checked(ShardSet(paths, manifest["kind"], index, names, digests))


def _open_tars(paths: list[Path]) -> ShardSet:
    parts: list[ShardIndex] = []
    kinds: dict[str, Path] = {}
    for number, path in enumerate(paths):
        index, kind = scan_cached(path)
        kinds.setdefault(kind, path)
        parts.append(replace(index, shard=np.full(len(index), number, np.int32)))
    if len(kinds) > 1:
        raise DataError(f"shards are of several kinds: { ({k: str(p) for k, p in kinds.items()}) }")
    extensions = np.unique(np.concatenate([p.extensions for p in parts]))
    columns = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in ("shard", "offset", "size", "label", "length", "keys")
    }
    numbers = [np.searchsorted(extensions, p.extensions)[p.extension] for p in parts]
    index = ShardIndex(
        **columns, extension=np.concatenate(numbers).astype(np.uint8), extensions=extensions
    )
    return _checked(ShardSet(tuple(paths), next(iter(kinds)), index))


def _checked(shards: ShardSet) -> ShardSet:
    index = shards.index
    order = np.argsort(index.keys, kind="stable")
    twice = np.flatnonzero(index.keys[order][1:] == index.keys[order][:-1])
    if len(twice):
        a, b = order[twice[0]], order[twice[0] + 1]
        raise DataError(
            f"key {shards.key(a)!r} comes twice: in {shards.paths[index.shard[a]]} and in "
            f"{shards.paths[index.shard[b]]}"
        )
    sizes = np.array([p.stat().st_size for p in shards.paths], np.int64)
    if len(index) and (index.shard.min() < 0 or index.shard.max() >= len(sizes)):
        raise DataError(f"the index names shards beyond {shards.paths[-1]}; prepare the data again")
    beyond = np.flatnonzero(
        (index.offset < 0) | (index.size < 0) | (index.offset + index.size > sizes[index.shard])
    )
    if len(beyond):
        i = int(beyond[0])
        raise DataError(
            f"{shards.paths[index.shard[i]]}, key {shards.key(i)}: lies beyond the end of the tar "
            "file; the index belongs to another one"
        )
    return shards


def _expand(where: str) -> list[str]:
    if "{" not in where:
        # Path.glob takes no absolute pattern
        return sorted(glob.glob(where)) if glob.has_magic(where) else [where]  # noqa: PTH207
    from braceexpand import braceexpand

    return list(braceexpand(where))
