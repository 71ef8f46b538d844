"""Checkpoints: checksummed safetensors files, written atomically, whole or a part for each rank.

A file is ``step-<step>.safetensors`` and any safetensors reader opens it. Its header's
``__metadata__`` holds ``sha256`` (first, so at a fixed place), ``step`` and ``meta`` (JSON). The
digest is that of the whole file with its own 64 characters as zeros, so one flipped, missing or
extra byte anywhere is found. Nothing is ever unpickled.

A write goes to ``step-<step>.safetensors.tmp``, is flushed to the disk and then renamed: a kill at
any moment leaves the old checkpoints and at most one temporary file, which the next save removes.

Ranks that share a model (FSDP) write a folder ``step-<step>``: each a file
``part-<rank>-of-<ranks>.safetensors`` of the same kind with its rows of each tensor. Where they
begin is in ``DCP_SHARDING_INFO``, as torch.distributed.checkpoint writes it for safetensors, so its
``HuggingFaceStorageReader`` loads the folder too. (Its own writer has no checksum and no atomic
rename, and plans each save over all ranks; its default format is a pickle.) The folder is
``step-<step>.tmp`` until all parts are in it. Any number of ranks reads either kind: ``load``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uml_fast.runtime.files import advice

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
OFFSETS = "DCP_SHARDING_INFO"
"""Metadata of a part: JSON of name -> {"saved_offsets": first element of each dimension}."""
HEADER_START = b'{"__metadata__":{"sha256":"'
DIGEST_AT = 8 + len(HEADER_START)
NO_DIGEST = b"0" * 64
CHUNK_BYTES = 1 << 20

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
    "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32,
    "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16, "U16": torch.uint16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors name of each dtype."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved: tensors are on the CPU."""

    step: int
    """Optimiser steps done when it was written."""
    tensors: dict[str, Tensor]
    """Tensors by name, with the dtypes and shapes they were saved with."""
    meta: Any
    """The JSON value that was saved (tuples come back as lists, integer keys as strings)."""


Part = Callable[[str], tuple[int, int] | None]
"""Name of a tensor -> first row and number of rows of it that are wanted; None: all."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Any, keep: int) -> Path:
    """Write a checkpoint so that it is either whole or absent, then drop old ones.

    The ``keep`` newest stay, the one just written always among them. Files of a later step belong
    to a history that this run left (it resumed from an older one, or started anew): they go too.

    Args:
        folder: directory of one trial's checkpoints, made if absent.
        step: optimiser steps done.
        tensors: any device, layout of memory and dtype of ``DTYPES``; written as contiguous copies.
        meta: JSON value; floats and integers come back exactly.
        keep: checkpoints left in the folder, >= 1.

    Raises:
        CheckpointError: the folder cannot be written or is full, or a tensor's dtype has no
            safetensors name. The checkpoints already there are untouched.
        TypeError: ``meta`` holds something that JSON does not.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step} and keep is {keep}; they must be >= 0 and >= 1")
    path = folder / f"step-{step:09d}{SUFFIX}"
    header, ordered = _header(step, tensors, {"meta": json.dumps(meta)})
    with _saving(path, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"step-*{SUFFIX}.tmp"):
            stale.unlink(missing_ok=True)
        _write(path, header, ordered)
    _prune(folder, step, keep)
    return path


def save_part(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    offsets: Mapping[str, int],
    meta: Any,
    rank: int,
    ranks: int,
) -> Path:
    """Write what ``rank`` of ``ranks`` that share a model holds; ``commit`` makes it count.

    Args:
        folder: directory of one trial's checkpoints; every rank sees it.
        step: optimiser steps done.
        tensors: this rank's rows of each tensor; those without any are left out.
        offsets: first row of those that the ranks share; others are whole, on one rank alone.
        meta: JSON value; that of rank 0 is the checkpoint's.

    Raises:
        CheckpointError: as ``save``.
    """
    at = folder / f"step-{step:09d}.tmp"
    path = at / f"part-{rank:05d}-of-{ranks:05d}{SUFFIX}"
    kept = {name: t for name, t in tensors.items() if t.numel() or name not in offsets}
    places = {
        name: {"saved_offsets": [offsets.get(name, 0)] * (t.ndim > 0) + [0] * (t.ndim - 1)}
        for name, t in kept.items()
    }
    header, ordered = _header(step, kept, {"meta": json.dumps(meta), OFFSETS: json.dumps(places)})
    with _saving(path, folder):
        at.mkdir(parents=True, exist_ok=True)
        _write(path, header, ordered)
    return path


def commit(folder: Path, step: int, ranks: int, keep: int) -> Path:
    """Make the parts of all ranks a checkpoint, then drop old ones as ``save`` does.

    Raises:
        CheckpointError: parts are missing, or the folder cannot be renamed.
    """
    path, temporary = folder / f"step-{step:09d}", folder / f"step-{step:09d}.tmp"
    with _saving(path, folder):
        parts = list(temporary.glob(f"part-*-of-{ranks:05d}{SUFFIX}"))
        if len(parts) != ranks:
            raise CheckpointError(f"{temporary} has {len(parts)} of {ranks} parts")
        for left in {*temporary.iterdir()} - {*parts}:  # of a run that was killed
            left.unlink()
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        _sync_folder(folder)
    _prune(folder, step, keep)
    return path


def _prune(folder: Path, step: int, keep: int) -> None:
    """Drop what is older than the ``keep`` newest, and what a history that was left wrote later."""
    files = newest_first(folder)
    abandoned = [p for p in files if _step_of(p) > step]
    # those of a later step: other ranks may be writing their parts of it already
    parts = [p for p in folder.glob("step-*.tmp") if p.is_dir()]
    stale = [p for p in parts if _step_of(p.with_suffix("")) <= step]
    for old in abandoned + files[len(abandoned) + keep :] + stale:
        with contextlib.suppress(OSError):
            shutil.rmtree(old) if old.is_dir() else old.unlink()


@contextlib.contextmanager
def _saving(path: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        why = f"cannot write {path}: {e.strerror or e}; {advice(e)}"
        raise CheckpointError(f"{why}. Earlier checkpoints in {folder} are intact") from e


def load(path: Path, part: Part = lambda name: None) -> Checkpoint:
    """Read one checkpoint, a file or a folder of parts, and verify its checksums.

    Raises:
        CheckpointError: it is missing, torn or changed since it was written.
    """
    try:
        if path.is_dir():
            return _load_parts(path, part)
        with path.open("rb") as file:
            _verify(file, path)
            return _read(file, part)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole; None where there is none at all.

    Broken newer files are named in one warning.

    Raises:
        CheckpointError: there are checkpoints and every one is broken.
    """

    def read(path: Path) -> tuple[Checkpoint | None, str]:
        try:
            return load(path), ""
        except CheckpointError as e:
            return None, str(e)

    return first_whole(folder, newest_first(folder), read)


def first_whole(
    folder: Path, paths: Sequence[Path], read: Callable[[Path], tuple[Checkpoint | None, str]]
) -> Checkpoint | None:
    """What ``read`` gives of the first path that is whole; where it gives None, it says why."""
    broken: list[str] = []
    for path in paths:
        checkpoint, reason = read(path)
        if checkpoint is None:
            broken.append(reason)
            continue
        if broken:
            logger.warning("%s; continuing from %s", "; ".join(broken), path)
        return checkpoint
    if broken:
        raise CheckpointError(
            f"no usable checkpoint in {folder}: {'; '.join(broken)}. "
            "Delete the folder to start from step 0"
        )
    return None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not."""
    files = [p for p in folder.glob("step-*") if _step_of(p) >= 0]
    return sorted(files, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-").removesuffix(SUFFIX)
    return int(digits) if digits.isdecimal() else -1


def _header(
    step: int, tensors: Mapping[str, Tensor], more: Mapping[str, str]
) -> tuple[bytes, list[Tensor]]:
    """The file's first bytes, the digest still zeros, and the tensors in the order they follow.

    The widest dtypes come first, so that each tensor is aligned in the file.
    """
    metadata = {"sha256": NO_DIGEST.decode(), "step": str(step), **more}
    entries: dict[str, Any] = {"__metadata__": metadata}
    ordered, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in NAMES or name == "__metadata__":
            raise CheckpointError(
                f"tensor {name!r} of dtype {tensor.dtype} cannot be saved; rename or convert it"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
        ordered.append(tensor)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, header: bytes, tensors: list[Tensor]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256(header)
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for tensor in tensors:
                data = _bytes_of(tensor)
                digest.update(data)
                file.write(data)
            file.seek(DIGEST_AT)
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk; network file systems that refuse this order it alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _verify(file: BufferedReader, path: Path) -> None:
    """Raise CheckpointError unless the file hashes to the digest it holds; then rewind it."""
    start = file.read(DIGEST_AT + len(NO_DIGEST))
    if len(start) < DIGEST_AT + len(NO_DIGEST) or start[8:DIGEST_AT] != HEADER_START:
        raise CheckpointError(f"{path} is torn or not a checkpoint (its header is incomplete)")
    digest = hashlib.sha256(start[:DIGEST_AT] + NO_DIGEST)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    if digest.hexdigest().encode() != start[DIGEST_AT:]:
        raise CheckpointError(f"{path} is torn or damaged (its SHA-256 does not match its content)")
    file.seek(0)


def _read(file: BufferedReader, part: Part) -> Checkpoint:
    """The content of a verified file."""
    header, start = _entries(file)
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        tensors[name] = _rows(file, start, entry, part(name))
    return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["meta"]))


def _entries(file: BufferedReader) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    size = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(size))
    return header, 8 + size


def _rows(
    file: BufferedReader, start: int, entry: Mapping[str, Any], rows: tuple[int, int] | None
) -> Tensor:
    """A tensor of a file, or ``rows`` (first, number) of it."""
    begin, end = entry["data_offsets"]
    shape = list(entry["shape"])
    if rows is not None and shape:
        stride = (end - begin) // max(1, shape[0])
        shape[0] = rows[1]
        begin, end = begin + rows[0] * stride, begin + (rows[0] + rows[1]) * stride
    data = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(start + begin)
    file.readinto(data.numpy().data)
    return data.view(DTYPES[entry["dtype"]]).reshape(shape)


def _load_parts(path: Path, part: Part) -> Checkpoint:
    """A checkpoint of several files; the first and those with wanted rows are verified and read."""
    files = sorted(path.glob(f"part-*{SUFFIX}"))
    if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
        raise CheckpointError(f"{path} lacks parts, it has {len(files)}")
    meta: Any = None
    pieces: dict[str, list[Tensor]] = {}
    for i, name in enumerate(files):
        with name.open("rb") as file:
            try:
                header, start = _entries(file)
                metadata = header.pop("__metadata__")
                places = json.loads(metadata[OFFSETS])
                meta = json.loads(metadata["meta"]) if i == 0 else meta
                wanted = {
                    key: _overlap(
                        (places[key]["saved_offsets"] or [0])[0], entry["shape"], part(key)
                    )
                    for key, entry in header.items()
                }
            except (ValueError, KeyError, OverflowError, MemoryError):
                raise CheckpointError(f"{name} is torn or not a part of a checkpoint") from None
            if i == 0 or any(rows[1] for rows in wanted.values()):
                file.seek(0)
                _verify(file, name)
            for key, entry in header.items():
                pieces.setdefault(key, []).append(_rows(file, start, entry, wanted[key]))
    tensors = {
        key: found[0] if len(found) == 1 else torch.cat(found) for key, found in pieces.items()
    }
    return Checkpoint(_step_of(path), tensors, meta)


def _overlap(first: int, shape: Sequence[int], wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Which rows (first, number) of a piece that begins at row ``first`` are wanted."""
    rows = shape[0] if shape else 1
    if wanted is None or not shape:
        return 0, rows
    begin, end = max(first, wanted[0]), min(first + rows, wanted[0] + wanted[1])
    return (begin - first, end - begin) if end > begin else (0, 0)
