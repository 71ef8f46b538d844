"""The features of every sample of a split: read ahead on a thread, encoded in batches, kept.

Legend: n samples, b samples of a batch, D features of one.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.source import DataError
from uml_fast.encoders.cache import Unfinished, fingerprint_of, is_stored, save_features
from uml_fast.runtime.memory import keep_freed_memory
from uml_fast.runtime.progress import StatusLine, duration

_AHEAD = 3
"""Batches that are read before the one being encoded is done."""


class Encoder:
    """A frozen network with what it needs before it; subclasses load one."""

    kind: str
    """Kind of samples it reads: images, text, audio or features."""
    facts: dict[str, Any]
    """All that its features depend on but the samples, as JSON: name and hash of the weights,
    transform, pooling, dtype."""
    width: int
    """D."""
    same_length: bool = False
    """True: the samples of a batch must have one length, since it cannot mask padding."""
    cut: int = 0
    """Samples that were longer than the network can take, and were cut."""

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        """Each sample as ``encode`` takes it, or the DecodeError that says why there is none.

        It runs on a thread of its own, ahead of ``encode``.
        """
        raise NotImplementedError

    def encode(self, prepared: Sequence[Any]) -> Tensor:
        """fp32 (b, D) features, on the device."""
        raise NotImplementedError


class Stored(Protocol):
    """Samples that can be read, such as a ``ShardSet``."""

    @property
    def kind(self) -> str:
        """images, audio, text or features."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def label(self) -> np.ndarray:
        """int32 (n,), -1: none."""

    @property
    def length(self) -> np.ndarray:
        """int32 (n, L)."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Name of a sample."""

    def payload(self, i: int) -> bytes:
        """Its bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Sentences:
    """Texts in memory, of classes."""

    texts: tuple[str, ...]
    label: np.ndarray
    """int32 (n,)."""
    class_names: tuple[str, ...]
    kind: str = "text"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def length(self) -> np.ndarray:
        """int32 (n, 1) bytes."""
        return np.array([len(t.encode()) for t in self.texts], np.int32).reshape(-1, 1)

    def key(self, i: int) -> str:
        """The class of a text and its place among all."""
        label = int(self.label[i])
        return f"{self.class_names[label] if label >= 0 else self.kind}/{i}"

    def payload(self, i: int) -> bytes:
        """A text in UTF-8."""
        return self.texts[i].encode()


def data_facts(samples: Stored) -> dict[str, Any]:
    """What identifies the samples: names, labels and content.

    The content of prepared shards is known by their checksums, that of other tar files by size and
    time of change.
    """
    digest = hashlib.sha256()
    if isinstance(samples, ShardSet):
        for column in ("keys", "offset", "size", "label"):
            digest.update(np.ascontiguousarray(getattr(samples.index, column)).tobytes())
        for path in samples.paths if not samples.sha256 else ():
            digest.update(str(path.stat().st_mtime_ns).encode())
        digest.update("".join(samples.sha256).encode())
    else:
        for i in range(len(samples)):
            digest.update(samples.payload(i) + b"\0")
        digest.update(samples.label.tobytes())
    return {
        "samples": len(samples),
        "class_names": list(samples.class_names),
        "content": digest.hexdigest(),
    }


def extract(
    samples: Stored,
    encoder: Encoder,
    path: Path,
    *,
    max_errors: int = 100,
    batch: int = 64,
    status: StatusLine | None = None,
) -> bool:
    """Write the features of ``samples`` to ``path``; False where they are there already.

    Samples that cannot be decoded, at most ``max_errors``, are left out and named in a .jsonl file
    beside it. Ragged samples go by length, longest first, so that batches hold little padding and
    memory is short at once or never.

    Raises:
        DataError: the samples are of another kind, too many cannot be decoded, a feature is not
            finite, or the file cannot be written.
    """
    status = status or StatusLine()
    keep_freed_memory()
    if samples.kind != encoder.kind:
        raise DataError(f"{path}: the samples are {samples.kind}, the encoder takes {encoder.kind}")
    facts = {"version": 1, "encoder": encoder.facts, "data": data_facts(samples)}
    fingerprint = fingerprint_of(facts)
    try:
        if is_stored(path, fingerprint):
            return False
        if path.exists():
            status.note(f"{path} was made of something else; it is made again")
    except DataError as e:
        status.note(f"{e}: it is")
    order = _order(samples)
    unfinished, named = Unfinished(path, fingerprint), path.with_suffix(".jsonl")
    if not unfinished.done:
        named.unlink(missing_ok=True)  # of other samples
    errors = DataErrors(max_errors, named)
    if unfinished.done:
        status.note(f"{path}: going on behind {unfinished.done:,} of {len(samples):,} samples")
    try:
        _encode_all(samples, encoder, order, unfinished, errors, batch, status, path.stem)
    except KeyboardInterrupt:
        status.note(
            f"{path}: {unfinished.done:,} of {len(samples):,} samples are kept; the same command "
            "goes on there"
        )
        raise
    made = unfinished.rows()
    rows = np.empty_like(made)
    rows[order] = made
    there = np.flatnonzero(~np.isnan(rows[:, 0]))
    if not len(there):
        raise DataError(f"{path}: none of the {len(samples)} samples can be read")
    labels = torch.from_numpy(samples.label[there].astype(np.int64))
    save_features(
        path, torch.from_numpy(rows[there]), labels,
        samples.class_names, [samples.key(int(i)) for i in there], facts,
    )  # fmt: skip
    unfinished.remove()
    if len(errors):
        status.note(f"{path}: {len(errors)} samples could not be read, named in {named}")
    return True


def _order(samples: Stored) -> np.ndarray:
    """int64 (n,) samples as they are visited."""
    if samples.kind == "images":
        return np.arange(len(samples))
    return np.argsort(-samples.length[:, 0].astype(np.int64), kind="stable")


def _batches(
    order: np.ndarray, length: np.ndarray, batch: int, same_length: bool
) -> Iterator[np.ndarray]:
    at = 0
    while at < len(order):
        end = min(at + batch, len(order))
        if same_length:
            other = np.flatnonzero((length[order[at:end]] != length[order[at]]).any(1))
            end = at + int(other[0]) if len(other) else end
        yield order[at:end]
        at = end


def _prepared(
    samples: Stored, encoder: Encoder, batches: Iterator[np.ndarray]
) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Batches with their prepared samples, some of them read ahead."""

    def read(chosen: np.ndarray) -> list[Any]:
        found: list[Any] = []
        for i in chosen:
            try:
                found.append(samples.payload(int(i)))
            except DataError as e:
                found.append(DecodeError(str(e)))
        there = [f for f in found if not isinstance(f, DecodeError)]
        prepared = iter(encoder.prepare(there))
        return [f if isinstance(f, DecodeError) else next(prepared) for f in found]

    ahead: deque[tuple[np.ndarray, Future[list[Any]]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for chosen in batches:
                ahead.append((chosen, reader.submit(read, chosen)))
                if len(ahead) > _AHEAD:
                    chosen, future = ahead.popleft()
                    yield chosen, future.result()
            while ahead:
                chosen, future = ahead.popleft()
                yield chosen, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _encode_all(
    samples: Stored,
    encoder: Encoder,
    order: np.ndarray,
    unfinished: Unfinished,
    errors: DataErrors,
    batch: int,
    status: StatusLine,
    name: str,
) -> None:
    """Add the rows of all samples that have none yet; those that cannot be read get NaN."""
    begun, first = time.monotonic(), unfinished.done

    def keep(chosen: np.ndarray, good: np.ndarray, made: Tensor) -> None:
        values = made.cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise DataError(
                f"{name}, sample {samples.key(int(chosen[good][bad[0]]))}: the encoder's features "
                "are not finite; try --precision fp32"
            )
        rows = np.full((len(chosen), encoder.width), np.nan, np.float32)
        rows[good] = values
        unfinished.add(rows)
        if status.is_due():
            rate = (unfinished.done - first) / (time.monotonic() - begun)
            status.update(
                f"{name}: {unfinished.done:,} of {len(order):,} samples, {rate:,.0f} a second, "
                f"{duration((len(order) - unfinished.done) / rate)} left"
            )

    # the copy of a batch's features waits until the next batch is on its way
    waiting: tuple[np.ndarray, np.ndarray, Tensor] | None = None
    batches = _batches(order[first:], samples.length, batch, encoder.same_length)
    for chosen, prepared in _prepared(samples, encoder, batches):
        for i, sample in zip(chosen, prepared, strict=True):
            if isinstance(sample, DecodeError):
                errors.add(name, samples.key(int(i)), str(sample))
        good = np.array([not isinstance(s, DecodeError) for s in prepared])
        there = [s for s in prepared if not isinstance(s, DecodeError)]
        made = encoder.encode(there) if there else torch.empty(0, encoder.width)
        if waiting is not None:
            keep(*waiting)
        waiting = (chosen, good, made)
    if waiting is not None:
        keep(*waiting)
