"""Shards, read: any sample by its number, from any thread.

    with ShardSet.open("shards/cifar10", "train") as shards:
        jpeg, label = shards.payload(0), shards.label[0]

docs/data-format.md says what is in the files.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.data.prepare.listing import SPLIT_NAMES
from uml_fast.data.shards import remote
from uml_fast.data.shards.index import ShardIndex, scan, scan_cached
from uml_fast.data.shards.lengths import UNITS
from uml_fast.data.shards.open_files import OpenFiles
from uml_fast.data.source import DataError
from uml_fast.runtime.files import sha256_of

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
    """The samples of one split. Files are opened at their first use."""

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
    _files: OpenFiles = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_files", OpenFiles(self.paths))

    @staticmethod
    def open(where: str | Path, split: str | None = None, cache: Path | None = None) -> ShardSet:
        """Open prepared shards, or any WebDataset tar files.

        Args:
            where: folder that ``prepare`` wrote, or its URL; or tar files: a folder of them, a
                file, a glob, a brace range (``data/train-{000000..000012}.tar``), URLs
                (``https://host/x-{000..012}.tar``, also ``gs://``, ``s3://``, ...) or commands
                that print them (``pipe:cat x-{000..012}.tar``); several with ``::`` between.
            split: split of the folder; None: its only one. Of a folder of tar files without a
                manifest: those whose name starts with it. It chooses nothing among tar files that
                are named.
            cache: folder for copies of what is not on this machine; None:
                ``cache_folder()/remote``.

        Raises:
            DataError: nothing is there, the split does not exist, a shard is missing or not as
                long as it was, cannot be fetched, an index or a tar file is broken, or a key comes
                twice.
        """
        if remote.is_remote(where) and remote.is_prepared_url(str(where)):
            return _open_prepared_url(str(where), split, cache)
        names = _expand(str(where))
        if len(names) == 1 and not remote.is_remote(names[0]):
            folder = Path(names[0])
            if (folder / MANIFEST).is_file():
                return _open_prepared(folder, split)
            if folder.is_dir():
                names = [str(p) for p in sorted(folder.glob(f"{split or ''}*.tar"))]
                if not names:
                    raise DataError(
                        f"no {split or ''}*.tar in {folder}; make shards with python -m "
                        "uml_fast.prepare"
                    )
        if not names:
            raise DataError(f"{where} names no file; make shards with python -m uml_fast.prepare")
        return _open_tars(_fetched(names, cache), names)

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
            content = self._files.read(shard, size, offset)
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

    def hold(self, samples: np.ndarray) -> tuple[list[object], np.ndarray]:
        """The int32 descriptors of the samples' shards, and what keeps them open while it lives.

        Raises:
            OSError: a shard cannot be opened.
        """
        return self._files.hold(self.index.shard[samples])

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
        self._files.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # open files stay in this process
        return ShardSet, (self.paths, self.kind, self.index, self.class_names, self.sha256)


def manifest_folder(where: str | Path, cache: Path | None = None) -> Path | None:
    """The folder that holds the manifest of prepared shards; None: tar files without one.

    Raises:
        DataError: it cannot be fetched.
    """
    if remote.is_remote(where):
        is_folder = remote.is_prepared_url(str(where))
        return remote.fetch_manifest(str(where), MANIFEST, cache) if is_folder else None
    folder = Path(re.sub(r"^file:(//)?", "", str(where)))
    return folder if not remote.is_list(str(where)) and (folder / MANIFEST).is_file() else None


def splits_of(where: str | Path, cache: Path | None = None) -> tuple[str, ...]:
    """Splits of prepared shards, or those that the names of a folder's tar files begin with.

    Empty for tar files that are not split.

    Raises:
        DataError: a manifest is broken or cannot be fetched.
    """
    prepared = manifest_folder(where, cache)
    if prepared is not None:
        return tuple(read_manifest(prepared)["splits"])
    names = [] if remote.is_remote(where) else _expand(str(where))
    is_folder = len(names) == 1 and Path(names[0]).is_dir()
    usual = dict.fromkeys(SPLIT_NAMES.values())
    return tuple(n for n in usual if is_folder and any(Path(names[0]).glob(f"{n}*.tar")))


def _split_in(folder: Path, split: str | None) -> tuple[dict[str, Any], str, list[Any]]:
    """Manifest of a prepared folder, the split meant, and (file, bytes, sha256) of its shards."""
    manifest = read_manifest(folder)
    splits = manifest["splits"]
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split is None or split not in splits:
        raise DataError(f"{folder} has the splits {', '.join(splits)}; {split!r} is none of them")
    try:
        shards = [(str(s["file"]), int(s["bytes"]), s["sha256"]) for s in splits[split]["shards"]]
        if not (shards and isinstance(manifest["class_names"], list)):
            raise TypeError("its shards or its classes")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise DataError(f"{folder / MANIFEST} lacks {e}; prepare the data again") from e
    return manifest, split, shards


def _open_prepared_url(url: str, split: str | None, cache: Path | None) -> ShardSet:
    folder = remote.fetch_manifest(url, MANIFEST, cache)
    try:
        _, split, shards = _split_in(folder, split)
    except DataError as e:
        raise DataError(f"{url}: {e}") from e
    remote.fetch_split(url, folder, _index_name(split), shards)
    return _open_prepared(folder, split)


def _index_name(split: str) -> str:
    return f"{split}.index.npz"


def _open_prepared(folder: Path, split: str | None) -> ShardSet:
    manifest, split, listed = _split_in(folder, split)
    shards = [(folder / file, size, sha256) for file, size, sha256 in listed]
    names = tuple(map(str, manifest["class_names"]))
    paths, sizes, digests = zip(*shards, strict=True)
    for path, size in zip(paths, sizes, strict=True):
        if not path.is_file():
            raise DataError(f"{path} is missing; copy it there or prepare the data again")
        if path.stat().st_size != size:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, it was made with {size}; copy it again"
            )
    index = ShardIndex.load(folder / _index_name(split))
    return _checked(ShardSet(paths, manifest["kind"], index, names, digests))


def _fetched(names: list[str], cache: Path | None) -> list[Path]:
    """Local tar files as they are, copies of the others."""
    urls = [n for n in names if remote.is_remote(n)]
    copies = iter(remote.fetch_shards(urls, cache))
    return [next(copies) if remote.is_remote(n) else Path(n) for n in names]


def _open_tars(paths: list[Path], names: list[str]) -> ShardSet:
    """Open tar files; ``names`` is what the user calls them."""
    parts: list[ShardIndex] = []
    kinds: dict[str, str] = {}
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        try:
            index, kind = scan_cached(path)
        except DataError as e:
            raise (e if name == str(path) else DataError(f"{name}: {e}")) from e
        kinds.setdefault(kind, name)
        parts.append(replace(index, shard=np.full(len(index), number, np.int32)))
    if len(kinds) > 1:
        raise DataError(f"shards are of several kinds: {kinds} (kind: its first shard)")
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
    if len(index) and index.extension.max() >= len(index.extensions):
        raise DataError(f"the index of {shards.paths[0]} is broken; prepare the data again")
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
    """Names that a string stands for: local ones with their globs resolved, URLs as they are."""
    names: list[str] = []
    for name in remote.expand(where) if remote.is_list(where) else [where]:
        if remote.is_remote(name):
            names.append(name)
            continue
        local = re.sub(r"^file:(//)?", "", name)
        is_pattern = glob.has_magic(local) and not Path(local).exists()
        # Path.glob takes no absolute pattern
        names += sorted(glob.glob(local)) if is_pattern else [local]  # noqa: PTH207
    return names
