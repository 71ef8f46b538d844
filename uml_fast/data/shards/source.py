"""A source whose samples lie in shards and are decoded when the loader asks for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np

from uml_fast.data.augment.draws import Draws, visit_keys
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import Decode, DecodeError
from uml_fast.data.decoding.rows import Rows
from uml_fast.data.loading.reading import my_reading
from uml_fast.data.shards.direct import DirectImages
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.kept import Kept, Room
from uml_fast.data.source import DataError, Lengths


class ShardSource(Lengths):
    """Samples of one modality in shards.

    Args:
        name: modality.
        shards: the samples' bytes and lengths; those without a row are left out and counted.
        decode: turns bytes into arrays.
        writer: turns arrays into rows.
        errors: takes the samples that cannot be decoded.
        seed: with modality, epoch and place in the shards, it decides how a sample is augmented.
        labels: int32 (n,) class of each sample of ``shards``; None: as they stand there.
        chosen: int64 samples of ``shards`` that there are; None: all.
        direct: reads most samples without ``decode`` and ``writer``, where none is augmented.
        room: memory for samples that ``decode`` decoded; None: each is decoded every time.
        identity: names the place and the options that samples are read with; with ``chosen`` and
            ``labels`` it decides the rows. Empty: not known.

    Raises:
        DataError: the shards hold another kind of sample, or none that has a row.
    """

    def __init__(
        self,
        name: str,
        shards: ShardSet,
        decode: Decode,
        writer: Rows,
        errors: DataErrors,
        seed: int = 0,
        labels: np.ndarray | None = None,
        chosen: np.ndarray | None = None,
        direct: DirectImages | None = None,
        room: Room | None = None,
        identity: str = "",
    ) -> None:
        if shards.kind != writer.kind:
            raise DataError(f"{name}: the shards hold {shards.kind}, this takes {writer.kind}")
        rows = writer.rows(shards.length)
        there = np.arange(len(shards)) if chosen is None else chosen
        for i in there[rows[there] < 1]:
            is_broken = (shards.length[i] < 0).any()
            what = "broken: its length cannot be read" if is_broken else "empty: it has no row"
            errors.add(name, shards.key(int(i)), what)
        self._place = there[rows[there] >= 1]
        if not len(self._place):
            raise DataError(f"{name}: none of the {len(shards)} samples has a row")
        self.name = name
        self._shards, self._decode, self._writer, self._errors = shards, decode, writer, errors
        self._seed, self._direct = seed, direct
        self._kept = Kept(len(self._place), room or Room(0))
        self.offsets = np.concatenate([[0], np.cumsum(rows[self._place])]).astype(np.int64)
        given = shards.label if labels is None else labels
        self.labels = given[self._place].astype(np.int32)
        self.identity = ""
        """The same for sources with the same rows, keys and labels; empty: not known."""
        if identity:
            digest = hashlib.sha256(identity.encode())
            for part in (self._place, self.offsets, self.labels):
                digest.update(part.tobytes())
            for path in shards.paths:
                seen = path.stat()
                digest.update(f"{path} {seen.st_size} {seen.st_mtime_ns}".encode())
            self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._place)

    @property
    def row_elems(self) -> int:
        """Elements of a row."""
        return self._writer.row_elems

    @property
    def row_dtype(self) -> str:
        """numpy name of the elements."""
        return self._writer.row_dtype

    def key(self, i: int) -> str:
        """Name of sample ``i``."""
        return self._shards.key(int(self._place[i]))

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        out: np.ndarray,
        epochs: Sequence[int] | np.ndarray | None = None,
    ) -> list[int]:
        """Decode samples into ``out``; the places of those that cannot be are returned.

        With ``epochs`` they are augmented as the writer does it.

        Raises:
            DataError: too many samples of the run cannot be decoded.
        """
        samples = np.asarray(samples, np.int64)
        is_augmented = epochs is not None and self._writer.is_augmenting
        ends = np.cumsum(self.lengths_of(samples))
        if self._direct is None or is_augmented or not len(samples):
            left = range(len(samples))
        else:
            my_reading().enter("decode", 0)
            is_read = self._direct.read(self._shards, self._place[samples], out[: ends[-1]])
            left = np.flatnonzero(~is_read).tolist()
            if not left:
                return []
        arrays = self._decoded(samples, left)
        keys: Sequence[int] = ()
        if epochs is not None and is_augmented:
            keys = visit_keys(self._seed, self.name, epochs, self._place[samples])
        rejected = []
        for place, array in zip(left, arrays, strict=True):
            i, end = samples[place], int(ends[place])
            at = end - int(self.offsets[i + 1] - self.offsets[i])
            try:
                if isinstance(array, Exception):
                    raise array
                self._writer.write(array, out[at:end], Draws(keys[place]) if keys else None)
            except (DecodeError, DataError) as e:
                self._errors.add(self.name, self.key(int(i)), str(e))
                rejected.append(place)
        return rejected

    def _decoded(
        self, samples: np.ndarray, places: Sequence[int]
    ) -> list[np.ndarray | DecodeError | DataError]:
        """The array of the samples at some places, or why there is none."""
        arrays: list[np.ndarray | DecodeError | DataError | None] = []
        wanted, payloads = [], []
        reading = my_reading()
        for at, place in enumerate(places):
            i = int(samples[place])
            arrays.append(self._kept.get(i))
            if arrays[at] is not None:
                continue
            reading.enter("read", place)
            try:
                payloads.append(self._shards.payload(int(self._place[i])))
                wanted.append((at, i))
            except DataError as e:
                arrays[at] = e
        reading.enter("decode", 0)
        for (at, i), array in zip(wanted, self._decode(payloads), strict=True):
            arrays[at] = array
            if not isinstance(array, Exception):
                self._kept.offer(i, array)
        return cast("list[np.ndarray | DecodeError | DataError]", arrays)
