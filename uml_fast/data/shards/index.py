"""The index of shards: where each sample's payload lies, its label, length and key.

``<split>.index.npz`` beside the shards holds these arrays. Shards that came without one are scanned
once, and what was found is kept beside each tar file, or in ``cache_folder()/shards``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.data.shards.lengths import KINDS, UNITS, length_of
from uml_fast.data.shards.tar import Member, members, split_name
from uml_fast.data.source import DataError
from uml_fast.runtime.files import cache_folder, replace_file

_PRIORITY = {extension: rank for rank, extension in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """One row per sample, in the order of the shards. n samples, L numbers per length."""

    shard: np.ndarray
    """int32 (n,) which shard holds the sample."""
    offset: np.ndarray
    """int64 (n,) first byte of the payload in its tar file."""
    size: np.ndarray
    """int64 (n,) bytes of the payload."""
    label: np.ndarray
    """int32 (n,) class, -1 where there is none."""
    length: np.ndarray
    """int32 (n, L): height and width; or samples, rows or bytes. -1 where it cannot be read."""
    keys: np.ndarray
    """bytes (n,), UTF-8, unique."""
    extension: np.ndarray
    """uint8 (n,) index into ``extensions``."""
    extensions: np.ndarray
    """bytes (e,) extensions that payloads have, without the dot."""

    def __len__(self) -> int:
        return len(self.shard)

    @staticmethod
    def of(
        rows: list[tuple[int, int, int, int, tuple[int, ...], str, str]], kind: str
    ) -> ShardIndex:
        """The index of rows (shard, offset, size, label, length, key, extension)."""
        shard, offset, size, label, length, keys, ext = (
            zip(*rows, strict=True) if rows else [()] * 7
        )
        names = sorted(set(ext))
        width = len(UNITS[kind])
        return ShardIndex(
            shard=np.array(shard, np.int32),
            offset=np.array(offset, np.int64),
            size=np.array(size, np.int64),
            label=np.array(label, np.int32),
            length=np.array(length, np.int32).reshape(-1, width),
            keys=np.array([k.encode() for k in keys], "S" if keys else "S1"),
            extension=np.array([names.index(e) for e in ext], np.uint8),
            extensions=np.array([e.encode() for e in names], "S" if names else "S1"),
        )

    def save(self, path: Path, **more: np.ndarray) -> None:
        """Write the arrays, whole or not at all, the same bytes for the same arrays."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)} | more
        np.savez_compressed(file, **arrays)
        replace_file(path, file.getvalue())

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """Read an index.

        Raises:
            DataError: it is missing, broken, or not an index.
        """
        return ShardIndex(*_load(path, tuple(f.name for f in fields(ShardIndex))))


def _load(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    try:
        # np.load leaves a broken file open; and of one array it makes no context
        with path.open("rb") as file, np.load(file, allow_pickle=False) as columns:
            arrays = [columns[name] for name in names]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; copy it there or prepare the data again") from None
    except Exception as e:  # a broken file raises whatever zip, zlib or numpy stumbles on
        raise DataError(f"{path} is not a whole index of shards: {e}") from e
    if len({len(a) for a, n in zip(arrays, names, strict=True) if n in _PER_SAMPLE}) > 1:
        raise DataError(f"{path} is not an index of shards: its columns differ in length")
    return arrays


_PER_SAMPLE = {f.name for f in fields(ShardIndex)} - {"extensions"}


def scan(path: Path) -> tuple[ShardIndex, str]:
    """The index of one tar file without one, and its kind; reads every sample's head.

    Raises:
        DataError: the tar file is missing or broken, a key comes twice, a label is not a number, a
            sample has nothing that can be trained on, or samples are of several kinds; the message
            names tar file and key.
    """
    groups: dict[str, dict[str, Member]] = {}
    last = None
    for member in members(path):
        key, extension = split_name(member.name)
        if not key or key.endswith("/"):
            continue
        group = groups.setdefault(key, {})
        if extension in group or (group and key != last):
            raise DataError(f"{path}: key {key!r} comes twice; keys of samples must be unique")
        group[extension] = member
        last = key
    rows = []
    kinds: dict[str, str] = {}
    with path.open("rb") as file:
        for key, group in groups.items():
            known = sorted(
                (e for e in group if e.lower() in KINDS), key=lambda e: _PRIORITY[e.lower()]
            )
            if not known:
                raise DataError(
                    f"{path}: sample {key!r} has only {', '.join(sorted(group))}; a payload is one "
                    f"of {', '.join(KINDS)}"
                )
            member, extension = group[known[0]], known[0].lower()
            kinds.setdefault(KINDS[extension], key)
            label = -1 if "cls" not in group else _label(path, key, _read(file, group["cls"]))
            try:
                length = length_of(extension, _read(file, member))
            except DataError:
                length = (-1,) * len(UNITS[KINDS[extension]])
            rows.append((0, member.offset, member.size, label, length, key, extension))
    if len(kinds) > 1:
        raise DataError(f"{path} mixes kinds of data: {kinds} (kind: its first key)")
    if not rows:
        raise DataError(f"{path} holds no sample; leave it out")
    kind = next(iter(kinds))
    return ShardIndex.of(rows, kind), kind


def scan_cached(path: Path) -> tuple[ShardIndex, str]:
    """``scan``, kept until the tar file's size or time of change is another.

    Raises:
        DataError: as ``scan``.
    """
    try:
        stat = path.stat()
    except OSError as e:
        raise DataError(
            f"{path} cannot be read: {e.strerror}; copy it there or leave it out"
        ) from e
    mark = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    places = (path.with_suffix(".index.npz"), cache_folder() / "shards" / f"{name}.npz")
    for place in places:
        with contextlib.suppress(DataError, OSError):
            if place.exists() and np.array_equal(_load(place, ("tar",))[0], mark):
                index = ShardIndex.load(place)
                return index, KINDS[index.extensions[0].decode()]
    index, kind = scan(path)
    for place in places:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            index.save(place, tar=mark)
            break
    return index, kind


def _read(file: io.BufferedReader, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _label(path: Path, key: str, content: bytes) -> int:
    try:
        value = int(content)
        if not 0 <= value < 2**31:
            raise ValueError
    except ValueError:
        raise DataError(
            f"{path}: sample {key!r} has the label {content[:20]!r}; a .cls member is one number"
        ) from None
    return value
