"""A source whose samples lie in shards and are decoded when the loader asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uml_fast.data.augment.draws import Draws, visit_keys
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decode import Decode, DecodeError
from uml_fast.data.reading import my_reading
from uml_fast.data.rows import Rows
from uml_fast.data.shards import ShardSet
from uml_fast.data.source import DataError


class ShardSource:
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
        self._seed = seed
        self.offsets = np.concatenate([[0], np.cumsum(rows[self._place])]).astype(np.int64)
        given = shards.label if labels is None else labels
        self.labels = given[self._place].astype(np.int32)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (n,) rows of each sample."""
        return np.diff(self.offsets)

    def lengths_of(self, samples: np.ndarray) -> np.ndarray:
        """int64 rows of some samples."""
        lengths: np.ndarray = self.offsets[samples + 1] - self.offsets[samples]
        return lengths

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
        arrays = self._decoded(samples)
        keys: Sequence[int] = ()
        if epochs is not None and self._writer.is_augmenting:
            keys = visit_keys(self._seed, self.name, epochs, self._place[samples])
        rejected = []
        at = 0
        for place, i in enumerate(samples):
            end = at + int(self.offsets[i + 1] - self.offsets[i])
            array = arrays[place]
            try:
                if isinstance(array, Exception):
                    raise array
                self._writer.write(array, out[at:end], Draws(keys[place]) if keys else None)
            except (DecodeError, DataError) as e:
                self._errors.add(self.name, self.key(int(i)), str(e))
                rejected.append(place)
            at = end
        return rejected

    def _decoded(
        self, samples: Sequence[int] | np.ndarray
    ) -> list[np.ndarray | DecodeError | DataError]:
        """The array of each sample, or why there is none."""
        payloads = []
        missing: list[tuple[int, DataError]] = []
        reading = my_reading()
        for place, i in enumerate(samples):
            reading.enter("read", place)
            try:
                payloads.append(self._shards.payload(int(self._place[i])))
            except DataError as e:
                missing.append((place, e))
        reading.enter("decode", 0)
        arrays: list[np.ndarray | DecodeError | DataError] = [*self._decode(payloads)]
        for place, error in missing:
            arrays.insert(place, error)
        return arrays
