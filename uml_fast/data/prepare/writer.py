"""Writes the shards of a folder, one after the other, so that a killed run can go on.

A shard grows in ``.prepare/``, is moved to its place when it is whole, and then gets a record in
``.prepare/``: its checksum, its samples and how many inputs are done. What has a record is never
made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from uml_fast.data.prepare.items import Moments, Problem, Sample
from uml_fast.data.shards.files import MANIFEST
from uml_fast.data.shards.index import ShardIndex
from uml_fast.data.shards.tar import BLOCK, END, Member, dali_index, header, padded
from uml_fast.data.source import DataError
from uml_fast.runtime.files import replace_file, sha256_of

WORK = ".prepare"
_OURS = re.compile(r"(\w+-\d{6}\.(tar|idx)|\w+\.index\.npz|manifest\.json|problems\.jsonl)(\.tmp)?")


@dataclass(slots=True)
class Shard:
    """A shard and what it took to make it."""

    file: str
    bytes: int = 0
    sha256: str = ""
    done: int = 0
    """Inputs of the split that are done when this shard is."""
    rows: list[tuple[int, int, int, tuple[int, ...], str, str]] = field(default_factory=list)
    """Per sample: offset, size, label, length, key, extension."""
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    moments: Moments | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        moments = self.moments.to_json() if self.moments else None
        return {
            "file": self.file, "bytes": self.bytes, "sha256": self.sha256, "done": self.done,
            "rows": self.rows, "problems": self.problems, "notes": self.notes, "moments": moments,
        }  # fmt: skip

    @staticmethod
    def from_json(value: dict[str, Any]) -> Shard:
        """Inverse of ``to_json``."""
        moments = Moments.from_json(value["moments"]) if value["moments"] else None
        rows = [(*row[:3], tuple(row[3]), *row[4:]) for row in value["rows"]]
        problems = [Problem(*p) for p in value["problems"]]
        rest = {k: value[k] for k in ("file", "bytes", "sha256", "done")}
        return Shard(
            **rest, rows=rows, problems=problems, notes=Counter(value["notes"]), moments=moments
        )

    def members(self) -> Iterator[tuple[Member, ...]]:
        """The tar members of each sample: payload, and class where it has one."""
        for offset, size, label, _, key, extension in self.rows:
            payload = Member(f"{key}.{extension}", offset, size)
            if label < 0:
                yield (payload,)
            else:
                behind = offset + size + -size % BLOCK
                yield payload, Member(f"{key}.cls", behind + BLOCK, len(str(label)))


class SplitWriter:
    """Writes the shards of one split, going on after those that are there.

    Args:
        folder: where shards go.
        split: name of the split.
        limit_bytes: a shard that holds a sample is closed before it grows beyond this.

    Raises:
        OSError: here and in all methods, when a file cannot be written (a full disk).
    """

    def __init__(self, folder: Path, split: str, limit_bytes: int) -> None:
        self.folder = folder
        self.split = split
        self.limit_bytes = limit_bytes
        self.shards = list(self._finished())
        for path in folder.glob(f"{split}-*.tar"):
            if path.name not in {s.file for s in self.shards}:
                path.unlink()
        self._open: tuple[Shard, BinaryIO, Any] | None = None
        self.problems: list[Problem] = []
        self.notes: Counter[str] = Counter()

    @property
    def done(self) -> int:
        """Inputs that need not be looked at again."""
        return self.shards[-1].done if self.shards else 0

    def add(self, position: int, key: str, label: int, sample: Sample) -> None:
        """Write a sample, made of the split's input number ``position``."""
        payload = padded(sample.payload)
        named = b"" if label < 0 else str(label).encode()
        size = BLOCK + len(payload) + (2 * BLOCK if named else 0)
        if self._open and self._open[0].bytes + size + len(END) > self.limit_bytes:
            self._close(position)
        if self._open is None:
            shard = Shard(f"{self.split}-{len(self.shards):06d}.tar")
            self._open = shard, (self.folder / WORK / shard.file).open("wb"), hashlib.sha256()
        shard = self._open[0]
        offset = shard.bytes + BLOCK
        self._write(header(f"{key}.{sample.extension}", len(sample.payload)) + payload)
        if named:
            self._write(header(f"{key}.cls", len(named)) + padded(named))
        row = (offset, len(sample.payload), label, sample.length, key, sample.extension)
        shard.rows.append(row)
        self.notes.update(sample.notes)
        if sample.moments:
            shard.moments = shard.moments + sample.moments if shard.moments else sample.moments

    def finish(self, done: int) -> None:
        """Close the last shard; all ``done`` inputs of the split are done."""
        if self._open:
            self._close(done)

    def write_index(self, kind: str) -> ShardIndex:
        """Write ``<shard>.idx`` for DALI and ``<split>.index.npz``; returns the latter."""
        for shard in self.shards:
            path = (self.folder / shard.file).with_suffix(".idx")
            replace_file(path, dali_index(shard.members()))
        rows = [(number, *row) for number, shard in enumerate(self.shards) for row in shard.rows]
        index = ShardIndex.of(rows, kind)
        index.save(self.folder / f"{self.split}.index.npz")
        return index

    def abandon(self) -> None:
        """Close the open file without a shard."""
        if self._open:
            with contextlib.suppress(OSError):
                self._open[1].close()
            self._open = None

    def all_problems(self) -> list[Problem]:
        """Those of all shards and of the inputs behind them."""
        return [p for s in self.shards for p in s.problems] + self.problems

    def all_notes(self) -> Counter[str]:
        """Counted over all shards."""
        return sum((s.notes for s in self.shards), Counter()) + self.notes

    def _write(self, content: bytes) -> None:
        assert self._open is not None
        shard, file, digest = self._open
        file.write(content)
        digest.update(content)
        shard.bytes += len(content)

    def _close(self, done: int) -> None:
        assert self._open is not None
        self._write(END)
        shard, file, digest = self._open
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._open = None
        shard.sha256, shard.done = digest.hexdigest(), done
        shard.problems, self.problems = self.problems, []
        shard.notes, self.notes = self.notes, Counter()
        (self.folder / WORK / shard.file).replace(self.folder / shard.file)
        replace_file(self.folder / WORK / f"{shard.file}.json", json.dumps(shard.to_json()))
        self.shards.append(shard)

    def _finished(self) -> Iterator[Shard]:
        """Shards with a record, up to the first that is not what its record says."""
        for number in range(10**6):
            file = f"{self.split}-{number:06d}.tar"
            try:
                record = (self.folder / WORK / f"{file}.json").read_text(encoding="utf-8")
                shard = Shard.from_json(json.loads(record))
                digest = sha256_of(self.folder / file)
            except (OSError, ValueError, KeyError, TypeError):
                return
            if digest != shard.sha256:
                return
            yield shard


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from preparing into it.

    Raises:
        DataError: another one does, or the folder holds files that are not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strange = [p.name for p in folder.iterdir() if p.name != WORK and not _OURS.fullmatch(p.name)]
    if strange:
        raise DataError(f"{folder} is not empty (it holds {strange[0]}); name another folder")
    if not (folder / WORK).exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise DataError(f"{folder} holds shards of another maker; name another folder")
    (folder / WORK).mkdir(exist_ok=True)
    with (folder / WORK / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process prepares into {folder}; wait for it") from None
        yield


def clear(folder: Path) -> None:
    """Remove everything that was prepared in the folder."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()
    for path in (folder / WORK).iterdir():
        if path.name != "lock":
            path.unlink()


def remove_work(folder: Path) -> None:
    """Remove the records of a finished preparation."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
