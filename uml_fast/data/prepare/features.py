"""Features: finite float32 rows of one width, stored as .npy arrays (rows, features)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uml_fast.data.prepare.items import BadSample, Converter, Item, Moments, Sample
from uml_fast.data.shards.lengths import npy_shape
from uml_fast.data.source import DataError, reason

EXTENSIONS = (".npy",)
"""Files that are taken as the features of one sample."""

_PROBED = 100


@dataclass(frozen=True, slots=True)
class FeatureConverter(Converter):
    """Stores (features,) as one row and (rows, features) as they are, in float32."""

    width: int
    """Features of every row."""
    trims: bool
    """Whether rows of zeros at either end (padding) are cut off."""

    def convert(self, item: Item) -> Sample:
        """See ``Converter``."""
        given = _array(item)
        if given.dtype.kind not in "biuf":
            raise BadSample("not numbers", f"an array of {given.dtype}")
        if given.ndim not in (1, 2):
            raise BadSample("wrong shape", f"{given.shape}; a sample is (rows, features)")
        with np.errstate(over="ignore"):
            x = np.atleast_2d(given).astype(np.float32, order="C")
        if x.shape[1] != self.width:
            raise BadSample("wrong width", f"{x.shape[1]} features, most have {self.width}")
        if not np.isfinite(x).all():
            raise BadSample("not finite", "NaN or infinity, in float32; take the sample out")
        notes: tuple[str, ...] = ()
        if self.trims:
            filled = np.flatnonzero(x.any(1))
            start, stop = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
            notes = ("rows of zeros cut off",) if stop - start < len(x) else ()
            x = np.ascontiguousarray(x[start:stop])
        if len(x) == 0:
            raise BadSample("no rows", "the sample is empty")
        file = io.BytesIO()
        np.save(file, x, allow_pickle=False)
        return Sample(file.getvalue(), "npy", (len(x),), Moments.of(x), notes)


def usual_width(items: Sequence[Item]) -> int:
    """Features per row of most of the first hundred samples that can be read.

    Raises:
        DataError: none can be read.
    """
    widths: Counter[int] = Counter()
    for item in items[:_PROBED]:
        try:
            shape = npy_shape(item.read()) if item.place else _array(item).shape
        except (BadSample, DataError):
            continue
        if shape:
            widths[shape[-1]] += 1
    if not widths:
        raise DataError("none of the first samples is an array of features")
    return max(widths, key=lambda width: (widths[width], width))


def _array(item: Item) -> np.ndarray:
    try:
        if item.place is None:
            return np.asarray(item.value)
        return np.load(io.BytesIO(item.read()), allow_pickle=False)
    except BadSample:
        raise
    except Exception as e:  # numpy parses a header as Python, and passes on what that raises
        raise BadSample("broken array", reason(e)) from e
