"""Checkpoints: a checksummed safetensors file per step, written atomically; and a flag to stop on.

A file is ``step-<step>.safetensors`` and any safetensors reader opens it. Its header's
``__metadata__`` holds ``sha256`` (first, so at a fixed place), ``step`` and ``meta`` (JSON). The
digest is that of the whole file with its own 64 characters as zeros, so one flipped, missing or
extra byte anywhere is found. Nothing is ever unpickled.

A write goes to ``step-<step>.safetensors.tmp``, is flushed to the disk and then renamed: a kill at
any moment leaves the old checkpoints and at most one temporary file, which the next save removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
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
    header, ordered = _header(step, tensors, meta)
    path = folder / f"step-{step:09d}{SUFFIX}"
    temporary = path.with_name(path.name + ".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"step-*{SUFFIX}.tmp"):
            stale.unlink(missing_ok=True)
        try:
            _write(temporary, header, ordered)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(folder)
    except OSError as e:
        raise CheckpointError(
            f"cannot write {path}: {e.strerror or e}; free space or choose a writable run folder. "
            f"Earlier checkpoints in {folder} are intact"
        ) from e
    files = _newest_first(folder)
    abandoned = [p for p in files if _step_of(p) > step]
    for old in abandoned + files[len(abandoned) + keep :]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read one checkpoint and verify its checksum.

    Raises:
        CheckpointError: the file is missing, torn or changed since it was written.
    """
    try:
        with path.open("rb") as file:
            _verify(file, path)
            return _read(file)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole; None where there is none at all.

    Broken newer files are named in one warning.

    Raises:
        CheckpointError: there are checkpoints and every one is broken.
    """
    broken: list[str] = []
    for path in _newest_first(folder):
        try:
            checkpoint = load(path)
        except CheckpointError as e:
            broken.append(str(e))
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


def _newest_first(folder: Path) -> list[Path]:
    files = [p for p in folder.glob(f"step-*{SUFFIX}") if _step_of(p) >= 0]
    return sorted(files, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-").removesuffix(SUFFIX)
    return int(digits) if digits.isdecimal() else -1


def _header(step: int, tensors: Mapping[str, Tensor], meta: Any) -> tuple[bytes, list[Tensor]]:
    """The file's first bytes, the digest still zeros, and the tensors in the order they follow.

    The widest dtypes come first, so that each tensor is aligned in the file.
    """
    metadata = {"sha256": NO_DIGEST.decode(), "step": str(step), "meta": json.dumps(meta)}
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
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            data = _bytes_of(tensor)
            digest.update(data)
            file.write(data)
        file.seek(DIGEST_AT)
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


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


def _read(file: BufferedReader) -> Checkpoint:
    """The content of a verified file."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        start, end = entry["data_offsets"]
        data = torch.empty(end - start, dtype=torch.uint8)
        file.readinto(data.numpy().data)
        tensors[name] = data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["meta"]))


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag read between steps; a second Ctrl-C interrupts at once.

    The handlers that were there before come back on exit. Outside the main thread, where Python
    takes no handlers, the flag stays down.

    Example:
        with StopSignal() as stop:
            while step < steps and not stop:
                ...
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that arrived, or None."""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
